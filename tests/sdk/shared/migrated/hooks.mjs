// The guide's "Client-Side Integration with Hooks": its components and routes, with real hooks in a rendered tree and
// a real HTTP server between them. Elements are written without JSX. useChat no longer keeps the input, a message has
// parts, and toAIStreamResponse became toUIMessageStreamResponse.
import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { isText } from '../checks.mjs';
import { pageOf } from '../../../../examples/ai-sdk/shared/page.mjs';
import { withApp } from '../../../../examples/ai-sdk/shared/web-app.mjs';

export default function hooks(sdk) {
  const { convertToModelMessages, streamText, useChat, useCompletion, react, testRenderer, vllm, MODEL } = sdk;
  const h = react.createElement;

  function ChatInterface() {
    const [input, setInput] = react.useState('');
    const { messages, sendMessage, status, error } = useChat({
      transport: new sdk.DefaultChatTransport({ api: '/api/chat' }),
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
      { className: 'flex flex-col h-screen' },
      messages.map((message) => h('span', { key: message.id, className: message.role }, textOf(message))),
      h(
        'form',
        { onSubmit: handleSubmit },
        h('input', {
          type: 'text',
          value: input,
          onChange: (event) => setInput(event.target.value),
          disabled: isLoading,
        }),
        h('button', { type: 'submit', disabled: isLoading }, 'Send')
      ),
      h('em', null, isLoading ? 'busy' : 'idle'),
      error && h('strong', null, error.message)
    );
  }

  // app/api/chat/route.ts
  const chatRoute = (model) =>
    async function POST(req) {
      const { messages } = await req.json();

      const result = streamText({
        model,
        messages: await convertToModelMessages(messages),
        temperature: 0.7,
        maxOutputTokens: 12,
        abortSignal: req.signal,
        onError() {},
      });

      return result.toUIMessageStreamResponse({ onError: (error) => error.message });
    };

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
  const completionRoute = (maxOutputTokens, temperature = 0.8) =>
    async function POST(req) {
      const { prompt } = await req.json();

      const result = streamText({
        model: vllm(MODEL),
        prompt,
        temperature,
        maxOutputTokens,
        abortSignal: req.signal,
        onError() {},
      });

      return result.toUIMessageStreamResponse();
    };

  const isIdle = (page) => page.texts('em')[0] === 'idle';

  async function ask(page, text) {
    await page.type('input', text);
    await page.submit();
    await page.sees(() => !isIdle(page), 'the question to be on its way');
    await page.sees(isIdle, 'the end of the answer');
  }

  async function holdsAConversation(model) {
    const sent = [];
    const POST = async (req) => {
      sent.push((await req.clone().json()).messages.map((message) => message.role));
      return chatRoute(model)(req);
    };
    await withApp({ '/api/chat': POST }, async () => {
      const page = pageOf(react, testRenderer, ChatInterface);
      await page.open();
      await ask(page, 'What is the capital of France?');
      await ask(page, 'And of Italy?');
      assert.deepEqual(page.texts('strong'), []);
      const texts = page.texts('span');
      assert.equal(texts.length, 4);
      assert.equal(texts[0], 'What is the capital of France?');
      assert.equal(texts[2], 'And of Italy?');
      texts.forEach(isText);
      assert.deepEqual(sent, [['user'], ['user', 'assistant', 'user']]);
      await page.close();
    });
  }

  describe('hooks', () => {
    test('useChat holds a conversation', () => holdsAConversation(vllm(MODEL)));

    test('useChat holds a conversation over chat', () => holdsAConversation(vllm.chat(MODEL)));

    test('useChat shows an error of the server', async () => {
      await withApp({ '/api/chat': chatRoute(vllm('no-such-model')) }, async () => {
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
      await withApp({ '/api/completion': completionRoute(12) }, async () => {
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
        assert.equal(response.headers.get('x-vercel-ai-ui-message-stream'), 'v1');
        assert.ok((await response.text()).trimEnd().endsWith('data: [DONE]'));
      });
    });
  });
}
