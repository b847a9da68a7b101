// The guide's "React Server Components Integration". A server component is an async function that returns elements:
// it is called as the framework would call it and what it returns is rendered to HTML. Elements are written without
// JSX, so that no build step is needed; toAIStream, which this generation no longer has, became toDataStream.
import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { useCompletion } from '@ai-sdk/react';
import { generateText, processDataStream, streamText } from 'ai';
import * as react from 'react';
import * as testRenderer from 'react-test-renderer';
import { renderToStaticMarkup } from 'react-dom/server';
import { isText } from '../shared/checks.mjs';
import { pageOf } from '../../../examples/ai-sdk/shared/page.mjs';
import { withApp } from '../../../examples/ai-sdk/shared/web-app.mjs';
import { MODEL, vllm } from './lib/ai-provider.mjs';

const h = react.createElement;

async function ChatPage({ searchParams }) {
  if (!searchParams.prompt) {
    return h('div', null, 'No prompt provided');
  }

  const { text } = await generateText({
    model: vllm(MODEL),
    prompt: searchParams.prompt,
    temperature: 0.7,
    maxTokens: 16,
  });

  return h(
    'div',
    { className: 'p-4' },
    h('h2', { className: 'text-xl font-bold mb-2' }, 'Response:'),
    h('p', { className: 'whitespace-pre-wrap' }, text)
  );
}

const FACT = {
  model: vllm(MODEL),
  messages: [
    {
      role: 'user',
      content: 'Tell me an interesting fact about space.',
    },
  ],
  maxTokens: 16,
};

describe('server components', () => {
  test('a page with the answer', async () => {
    const html = renderToStaticMarkup(await ChatPage({ searchParams: { prompt: 'Name a colour.' } }));
    assert.match(html, /^<div class="p-4"><h2 [^>]*>Response:<\/h2><p class="whitespace-pre-wrap">[^<]+<\/p><\/div>$/);
  });

  test('a page without a prompt asks nothing', async () => {
    const html = renderToStaticMarkup(await ChatPage({ searchParams: {} }));
    assert.equal(html, '<div>No prompt provided</div>');
  });

  test('the stream of a page', async () => {
    const result = await streamText(FACT);
    let text = '';
    let finish;
    await processDataStream({
      stream: result.toDataStream(),
      onTextPart: (part) => (text += part),
      onFinishMessagePart: (part) => (finish = part),
    });
    isText(text);
    assert.ok(['stop', 'length'].includes(finish.finishReason));
    assert.ok(finish.usage.completionTokens > 0);
  });

  test('a component that shows a stream', async () => {
    function StreamingResponse() {
      const { completion, isLoading, complete } = useCompletion({ api: '/api/chat', streamProtocol: 'text' });
      react.useEffect(() => void complete(''), []);
      return h('div', null, isLoading && h('div', null, 'Generating...'), h('p', null, completion));
    }
    const POST = async () => new Response((await streamText(FACT)).textStream.pipeThrough(new TextEncoderStream()));
    await withApp({ '/api/chat': POST }, async () => {
      const page = pageOf(react, testRenderer, StreamingResponse);
      await page.open();
      await page.sees(() => page.texts('p')[0].length > 0, 'a first word');
      await page.sees(() => page.texts('div').length === 1, 'the end of the answer');
      isText(page.texts('p')[0]);
      await page.close();
    });
  });
});
