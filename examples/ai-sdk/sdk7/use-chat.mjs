// Guide: Client-Side Integration with Hooks / useChat Hook
// Expect: a conversation of two questions and two answers, as the component shows it. The guide's component and its
// route, without JSX, and a page and a server as small as they get. The hook no longer keeps the input, a message has
// parts, and toAIStreamResponse became toUIMessageStreamResponse. The same with a browser and Next.js: ../app.
import { useChat } from '@ai-sdk/react';
import { convertToModelMessages, DefaultChatTransport, streamText } from 'ai';
import * as react from 'react';
import * as testRenderer from 'react-test-renderer';
import { pageOf } from '../shared/page.mjs';
import { withApp } from '../shared/web-app.mjs';
import { MODEL, vllm } from './lib/ai-provider.mjs';

const h = react.createElement;

function ChatInterface() {
  const [input, setInput] = react.useState('');
  const { messages, sendMessage, status } = useChat({
    transport: new DefaultChatTransport({ api: '/api/chat' }),
  });
  const isLoading = status === 'submitted' || status === 'streaming';
  const handleSubmit = (event) => {
    event.preventDefault();
    sendMessage({ text: input });
    setInput('');
  };
  const textOf = (message) => message.parts.map((part) => (part.type === 'text' ? part.text : '')).join('');

  return h(
    'div',
    null,
    messages.map((message) => h('span', { key: message.id }, `${message.role}: ${textOf(message)}`)),
    h(
      'form',
      { onSubmit: handleSubmit },
      h('input', {
        type: 'text',
        value: input,
        onChange: (event) => setInput(event.target.value),
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

  const result = streamText({
    model: vllm(MODEL),
    messages: await convertToModelMessages(messages),
    temperature: 0.7,
    maxOutputTokens: 40, // not in the guide: a model of this size may talk without end
    abortSignal: req.signal,
  });

  return result.toUIMessageStreamResponse();
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
