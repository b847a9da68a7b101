// The guide's "React Server Components Integration". A server component is an async function that returns elements:
// it is called as the framework would call it and what it returns is rendered to HTML. Elements are written without
// JSX, so that no build step is needed; toAIStream, which is gone, became toUIMessageStream.
import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { appearInOrder, collect, isText, kindsOf } from '../checks.mjs';
import { pageOf } from '../../../../examples/ai-sdk/shared/page.mjs';
import { withApp } from '../../../../examples/ai-sdk/shared/web-app.mjs';

export default function serverComponents(sdk) {
  const { generateText, streamText, useCompletion, react, renderToStaticMarkup, testRenderer, vllm, MODEL } = sdk;
  const h = react.createElement;

  async function ChatPage({ searchParams }) {
    const { prompt } = await searchParams; // a promise by now
    if (!prompt) {
      return h('div', null, 'No prompt provided');
    }

    const { text } = await generateText({
      model: vllm(MODEL),
      prompt,
      temperature: 0.7,
      maxOutputTokens: 16,
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
    maxOutputTokens: 16,
  };

  describe('server components', () => {
    test('a page with the answer', async () => {
      const html = renderToStaticMarkup(
        await ChatPage({ searchParams: Promise.resolve({ prompt: 'Name a colour.' }) })
      );
      assert.match(
        html,
        /^<div class="p-4"><h2 [^>]*>Response:<\/h2><p class="whitespace-pre-wrap">[^<]+<\/p><\/div>$/
      );
    });

    test('a page without a prompt asks nothing', async () => {
      const html = renderToStaticMarkup(await ChatPage({ searchParams: Promise.resolve({}) }));
      assert.equal(html, '<div>No prompt provided</div>');
    });

    test('the stream of a page', async () => {
      const chunks = await collect(streamText(FACT).toUIMessageStream());
      appearInOrder(kindsOf(chunks), [
        'start',
        'start-step',
        'text-start',
        'text-delta',
        'text-end',
        'finish-step',
        'finish',
      ]);
      isText(chunks.map((chunk) => (chunk.type === 'text-delta' ? chunk.delta : '')).join(''));
    });

    test('a component that shows a stream', async () => {
      function StreamingResponse() {
        const { completion, isLoading, complete } = useCompletion({ api: '/api/chat', streamProtocol: 'text' });
        react.useEffect(() => void complete('go'), []);
        return h('div', null, isLoading && h('div', null, 'Generating...'), h('p', null, completion));
      }
      const POST = async () => streamText(FACT).toTextStreamResponse();
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
}
