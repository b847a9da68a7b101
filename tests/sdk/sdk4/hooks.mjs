// The guide's "Client-Side Integration with Hooks": its components and routes, with real hooks in a rendered tree and
// a real HTTP server between them. Elements are written without JSX; toAIStreamResponse, gone since, became
// toDataStreamResponse.
import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { useChat, useCompletion } from '@ai-sdk/react';
import { streamText } from 'ai';
import * as react from 'react';
import * as testRenderer from 'react-test-renderer';
import { isText } from '../shared/checks.mjs';
import { pageOf } from '../../../examples/ai-sdk/shared/page.mjs';
import { withApp } from '../../../examples/ai-sdk/shared/web-app.mjs';
import { MODEL, vllm } from './lib/ai-provider.mjs';

const h = react.createElement;

function ChatInterface() {
  const { messages, input, handleInputChange, handleSubmit, isLoading, error } = useChat({
    api: '/api/chat',
  });

  return h(
    'div',
    { className: 'flex flex-col h-screen' },
    messages.map((message) => h('span', { key: message.id, className: message.role }, message.content)),
    h(
      'form',
      { onSubmit: handleSubmit },
      h('input', { type: 'text', value: input, onChange: handleInputChange, disabled: isLoading }),
      h('button', { type: 'submit', disabled: isLoading }, 'Send')
    ),
    h('em', null, isLoading ? 'busy' : 'idle'),
    error && h('strong', null, error.message)
  );
}

// app/api/chat/route.ts
async function postChat(req) {
  const { messages } = await req.json();

  const result = await streamText({
    model: vllm(MODEL),
    messages,
    temperature: 0.7,
    maxTokens: 16,
    abortSignal: req.signal,
  });

  return result.toDataStreamResponse({ getErrorMessage: (error) => error.message });
}

function CompletionInterface() {
  const { completion, input, handleInputChange, handleSubmit, isLoading, stop } = useCompletion({
    api: '/api/completion',
  });

  return h(
    'div',
    { className: 'p-4' },
    h(
      'form',
      { onSubmit: handleSubmit, className: 'mb-4' },
      h('textarea', { value: input, onChange: handleInputChange, rows: 4, disabled: isLoading }),
      h('button', { type: 'submit', disabled: isLoading }, 'Complete'),
      isLoading && h('button', { type: 'button', onClick: stop }, 'Stop')
    ),
    completion && h('pre', { className: 'whitespace-pre-wrap' }, completion),
    h('em', null, isLoading ? 'busy' : 'idle')
  );
}

// app/api/completion/route.ts
const completionRoute = (maxTokens, temperature = 0.8) =>
  async function POST(req) {
    const { prompt } = await req.json();

    const result = await streamText({
      model: vllm(MODEL),
      prompt,
      temperature,
      maxTokens,
      abortSignal: req.signal,
    });

    return result.toDataStreamResponse();
  };

const isIdle = (page) => page.texts('em')[0] === 'idle';

async function ask(page, text) {
  await page.type('input', text);
  await page.submit();
  await page.sees(() => !isIdle(page), 'the question to be on its way');
  await page.sees(isIdle, 'the end of the answer');
}

describe('hooks', () => {
  test('useChat holds a conversation', async () => {
    const sent = [];
    const POST = async (req) => {
      sent.push((await req.clone().json()).messages.map((message) => message.role));
      return postChat(req);
    };
    await withApp({ '/api/chat': POST }, async () => {
      const page = pageOf(react, testRenderer, ChatInterface);
      await page.open();
      await ask(page, 'What is the capital of France?');
      await ask(page, 'And of Italy?');
      const texts = page.texts('span');
      assert.equal(texts.length, 4);
      assert.equal(texts[0], 'What is the capital of France?');
      assert.equal(texts[2], 'And of Italy?');
      texts.forEach(isText);
      assert.deepEqual(sent, [['user'], ['user', 'assistant', 'user']]);
      await page.close();
    });
  });

  test('useChat shows an error of the server', async () => {
    const POST = async () => {
      const result = streamText({ model: vllm('no-such-model'), prompt: 'Hello' });
      return result.toDataStreamResponse({ getErrorMessage: (error) => error.message });
    };
    await withApp({ '/api/chat': POST }, async () => {
      const page = pageOf(react, testRenderer, ChatInterface);
      await page.open();
      await page.type('input', 'Hello');
      await page.submit();
      await page.sees(() => page.texts('strong').length > 0, 'the error');
      assert.match(page.texts('strong')[0], /no-such-model/);
      await page.close();
    });
  });

  test('useCompletion completes a text', async () => {
    await withApp({ '/api/completion': completionRoute(16) }, async () => {
      const page = pageOf(react, testRenderer, CompletionInterface);
      await page.open();
      await page.type('textarea', 'Once upon a time');
      await page.submit();
      await page.sees(() => page.texts('pre').length > 0, 'a first word');
      await page.sees(isIdle, 'the end of the answer');
      isText(page.texts('pre')[0]);
      await page.close();
    });
  });

  test('useCompletion stops', async () => {
    // Greedy: this model then counts until it is stopped; drawn, one answer in a hundred is over at once.
    await withApp({ '/api/completion': completionRoute(2000, 0) }, async () => {
      const page = pageOf(react, testRenderer, CompletionInterface);
      await page.open();
      await page.type('textarea', 'Count to one million: 1, 2, 3,');
      await page.submit();
      await page.sees(() => page.texts('pre')[0]?.length > 10, 'some words');
      await page.click('Stop');
      await page.sees(isIdle, 'the end of the answer');
      const text = page.texts('pre')[0];
      await new Promise((resolve) => setTimeout(resolve, 300));
      assert.equal(page.texts('pre')[0], text, 'words came after the stop');
      await page.close();
    });
  });

  test('the route speaks the protocol of the hooks', async () => {
    await withApp({ '/api/completion': completionRoute(6) }, async () => {
      const response = await fetch('/api/completion', { method: 'POST', body: JSON.stringify({ prompt: 'Hello' }) });
      assert.equal(response.headers.get('x-vercel-ai-data-stream'), 'v1');
      const kinds = (await response.text())
        .trim()
        .split('\n')
        .map((line) => line.split(':')[0]);
      assert.deepEqual([...new Set(kinds)], ['f', '0', 'e', 'd']);
    });
  });
});
