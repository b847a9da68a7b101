// Guide: Client-Side Integration with Hooks / useCompletion Hook
// Expect: a text that is stopped by its button while it grows, then a whole one.
// The guide's component and its route, without JSX, and a page and a server as small as they get. toAIStreamResponse is
// gone from this generation: toDataStreamResponse.
import { useCompletion } from '@ai-sdk/react';
import { streamText } from 'ai';
import * as react from 'react';
import * as testRenderer from 'react-test-renderer';
import { pageOf } from '../shared/page.mjs';
import { withApp } from '../shared/web-app.mjs';
import { MODEL, vllm } from './lib/ai-provider.mjs';

const h = react.createElement;

function CompletionInterface() {
  const { completion, input, handleInputChange, handleSubmit, isLoading, stop } = useCompletion({
    api: '/api/completion',
  });

  return h(
    'div',
    null,
    h(
      'form',
      { onSubmit: handleSubmit },
      h('textarea', {
        value: input,
        onChange: handleInputChange,
        placeholder: 'Start typing...',
        rows: 4,
        disabled: isLoading,
      }),
      h('button', { type: 'submit', disabled: isLoading }, 'Complete'),
      isLoading && h('button', { type: 'button', onClick: stop }, 'Stop')
    ),
    completion && h('pre', null, completion)
  );
}

// app/api/completion/route.ts
async function POST(req) {
  const { prompt } = await req.json();

  const result = await streamText({
    model: vllm(MODEL),
    prompt,
    temperature: 0.8,
    maxTokens: 500,
    abortSignal: req.signal,
  });

  return result.toDataStreamResponse();
}

await withApp({ '/api/completion': POST }, async () => {
  const page = pageOf(react, testRenderer, CompletionInterface);
  const idle = () => !page.isDisabled('button');
  await page.open();

  await page.type('textarea', 'Write a long story about a lighthouse.');
  await page.submit();
  await page.sees(() => page.texts('pre')[0]?.length > 10 || idle(), 'some words');
  if (!idle()) await page.click('Stop');
  await page.sees(idle, 'the end of the answer');
  console.log('Stopped:', page.texts('pre')[0]);

  await page.type('textarea', 'Name a fruit.');
  await page.submit();
  await page.sees(() => !idle(), 'the prompt to be on its way');
  await page.sees(idle, 'the end of the answer');
  console.log('Whole:', page.texts('pre')[0]);
  await page.close();
});
