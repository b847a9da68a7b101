// What `vllm(MODEL)` means in these generations, the Responses API, beyond single answers: items that the server
// remembers.
import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { isText } from '../checks.mjs';
import { apiKey, baseURL } from '../environment.mjs';
import { recording } from '../fetches.mjs';

export default function responses({ createOpenAI, generateText, streamText, vllm, MODEL }) {
  const SHORT = { maxOutputTokens: 8, temperature: 0 };

  async function conversation(provider, options = {}) {
    const first = await generateText({ model: provider(MODEL), prompt: 'Name a colour.', ...SHORT, ...options });
    const messages = [
      { role: 'user', content: 'Name a colour.' },
      ...first.response.messages,
      { role: 'user', content: 'And another one.' },
    ];
    return { first, second: await generateText({ model: provider(MODEL), messages, ...SHORT, ...options }) };
  }

  // Gives the items of a request's input to look at. No name: then every generation refers to what it got before.
  function watched() {
    const sent = recording();
    const provider = createOpenAI({ baseURL, apiKey, fetch: sent });
    return { provider, itemsOf: (call) => sent.calls[call].body.input.map((item) => item.type ?? item.role) };
  }

  describe('responses', () => {
    test('a conversation refers to items of before', async () => {
      const { provider, itemsOf } = watched();
      const { second } = await conversation(provider);
      assert.deepEqual(itemsOf(1), ['user', 'item_reference', 'user']);
      isText(second.text);
    });

    test('a conversation that is not stored is the same prompt', async () => {
      const { provider, itemsOf } = watched();
      const { second } = await conversation(provider, { providerOptions: { openai: { store: false } } });
      assert.deepEqual(itemsOf(1), ['user', 'assistant', 'user']);
      isText(second.text);
      assert.equal(second.usage.inputTokens, (await conversation(provider)).second.usage.inputTokens);
    });

    test('the previous response is the history', async () => {
      const { first, second } = await conversation(vllm);
      const previousResponseId = first.response.id;
      const next = await generateText({
        model: vllm(MODEL),
        prompt: 'And another one.',
        providerOptions: { openai: { previousResponseId } },
        ...SHORT,
      });
      isText(next.text);
      assert.equal(next.usage.inputTokens, second.usage.inputTokens);
    });

    test('an unknown previous response is an error that names it', async () => {
      const ask = generateText({
        model: vllm(MODEL),
        prompt: 'And?',
        providerOptions: { openai: { previousResponseId: 'resp_none' } },
      });
      await assert.rejects(ask, (error) => error.statusCode === 404 || error.statusCode === 400);
    });

    test('a stream that is cut is incomplete', async () => {
      const result = streamText({ model: vllm(MODEL), prompt: 'Tell a story.', ...SHORT });
      await result.consumeStream();
      assert.equal(await result.finishReason, 'length');
    });

    test('options of OpenAI that change nothing are taken', async () => {
      const openai = { store: true, metadata: { who: 'test' }, user: 'someone', parallelToolCalls: false };
      const { text } = await generateText({ model: vllm(MODEL), prompt: 'Hi', ...SHORT, providerOptions: { openai } });
      isText(text);
    });
  });
}
