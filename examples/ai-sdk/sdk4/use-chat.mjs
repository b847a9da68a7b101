// Guide: Client-Side Integration with Hooks / useChat Hook
// Expect: a conversation of two questions and two answers, as the component shows it.
// The guide's component and its route, without JSX, and a page and a server as small as they get. toAIStreamResponse is
// gone from this generation: toDataStreamResponse. The same with a browser and Next.js: ../app.
import { useChat } from '@ai-sdk/react';
import { streamText } from 'ai';
import * as react from 'react';
import * as testRenderer from 'react-test-renderer';
import { pageOf } from '../shared/page.mjs';
import { withApp } from '../shared/web-app.mjs';
import { MODEL, vllm } from './lib/ai-provider.mjs';

const h = react.createElement;

function ChatInterface() {
  const { messages, input, handleInputChange, handleSubmit, isLoading } = useChat({
    api: '/api/chat',
  });

  return h(
    'div',
    null,
    messages.map((message) => h('span', { key: message.id }, `${message.role}: ${message.content}`)),
    h(
      'form',
      { onSubmit: handleSubmit },
      h('input', {
        type: 'text',
        value: input,
        onChange: handleInputChange,
        placeholder: 'Type your message...',
        disabled: isLoading,
      }),
      h('button', { type: 'submit', disabled: isLoading }, 'Send')
    )
  );
}

// app/api/chat/route.ts
async function POST(req) {
  const { messages } = await req.json();

  const result = await streamText({
    model: vllm(MODEL),
    messages,
    temperature: 0.7,
    maxTokens: 40, // not in the guide: a model of this size may talk without end
    abortSignal: req.signal,
  });

  return result.toDataStreamResponse();
}

await withApp({ '/api/chat': POST }, async () => {
  const page = pageOf(react, testRenderer, ChatInterface);
  await page.open();
  for (const question of ['What is the capital of France?', 'And of Italy?']) {
    await page.type('input', question);
    await page.submit();
    await page.sees(() => page.isDisabled('button'), 'the question to be on its way');
    await page.sees(() => !page.isDisabled('button'), 'the end of the answer');
  }
  page.texts('span').forEach((text) => console.log(text));
  await page.close();
});
