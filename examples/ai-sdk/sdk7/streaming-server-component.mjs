// Guide: React Server Components Integration / Streaming in Server Components
// Expect: a fact about space that grows, as the component shows it.
// The guide hands the component a stream as a property, which nobody reads. Here the component asks its route.
// toAIStream is gone; a route streams with toUIMessageStreamResponse.
import { useCompletion } from '@ai-sdk/react';
import { streamText } from 'ai';
import * as react from 'react';
import * as testRenderer from 'react-test-renderer';
import { pageOf } from '../shared/page.mjs';
import { withApp } from '../shared/web-app.mjs';
import { MODEL, vllm } from './lib/ai-provider.mjs';

const h = react.createElement;

// app/api/chat/route.ts
async function POST() {
  const result = streamText({
    model: vllm(MODEL),
    messages: [
      {
        role: 'user',
        content: 'Tell me an interesting fact about space.',
      },
    ],
  });

  return result.toUIMessageStreamResponse();
}

// components/streaming-response.tsx
function StreamingResponse() {
  const { completion, isLoading, complete } = useCompletion({
    api: '/api/chat',
  });
  react.useEffect(() => void complete('Go.'), []);

  return h('div', null, isLoading && h('em', null, 'Generating...'), h('p', null, completion));
}

await withApp({ '/api/chat': POST }, async () => {
  const page = pageOf(react, testRenderer, StreamingResponse);
  await page.open();
  await page.sees(() => page.texts('p')[0].length > 0, 'a first word');
  console.log('First:', page.texts('p')[0], page.texts('em')[0] ?? '');
  await page.sees(() => page.texts('em').length === 0, 'the end of the answer');
  console.log('Whole:', page.texts('p')[0]);
  await page.close();
});
