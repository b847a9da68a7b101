// Guide: React Server Components Integration / Server Component Example
// Expect: the HTML of the page without a prompt, then with one and the answer in it.
// A server component is an async function that returns elements. Here it is called as the framework would call it, and
// written without JSX, so that no build step is needed.
import { generateText } from 'ai';
import { createElement as h } from 'react';
import { renderToStaticMarkup } from 'react-dom/server';
import { MODEL, vllm } from './lib/ai-provider.mjs';

async function ChatPage({ searchParams }) {
  if (!searchParams.prompt) {
    return h('div', null, 'No prompt provided');
  }

  const { text } = await generateText({
    model: vllm(MODEL),
    prompt: searchParams.prompt,
    temperature: 0.7,
  });

  return h(
    'div',
    { className: 'p-4' },
    h('h2', { className: 'text-xl font-bold mb-2' }, 'Response:'),
    h('p', { className: 'whitespace-pre-wrap' }, text)
  );
}

console.log(renderToStaticMarkup(await ChatPage({ searchParams: {} })));
console.log(renderToStaticMarkup(await ChatPage({ searchParams: { prompt: 'Name a colour.' } })));
