// The guide's vllm.completion(...). These generations write a prompt as "user:\n...\n\nassistant:\n" and stop at
// "\nuser:".
import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { collect, isCount, isText } from '../checks.mjs';

export default function completionModel({ alone, generateText, MODEL, streamText, vllm }) {
  const REQUEST = { prompt: 'The capital of France is', temperature: 0, maxOutputTokens: 8 };

  describe('completion model', () => {
    test('a prompt is answered', async () => {
      const { text, usage, finishReason } = await generateText({ model: vllm.completion(MODEL), ...REQUEST });
      isText(text);
      isCount(usage.inputTokens);
      assert.ok(usage.outputTokens <= 8);
      assert.ok(['stop', 'length'].includes(finishReason));
    });

    test('a stream says the same', async () => {
      // Now the prefix cache holds the prompt.
      await generateText({ model: alone.completion(MODEL), ...REQUEST, maxOutputTokens: 1 });
      const { text, usage, finishReason } = await generateText({ model: alone.completion(MODEL), ...REQUEST });
      const result = streamText({ model: alone.completion(MODEL), ...REQUEST });
      assert.equal((await collect(result.textStream)).join(''), text);
      assert.equal((await result.usage).outputTokens, usage.outputTokens);
      assert.equal(await result.finishReason, finishReason);
    });

    test('echo gives the prompt back', async () => {
      const providerOptions = { openai: { echo: true } };
      const { text } = await generateText({ model: vllm.completion(MODEL), ...REQUEST, providerOptions });
      assert.ok(text.includes(REQUEST.prompt) && text.length > REQUEST.prompt.length, text);
    });

    test('logprobs', async () => {
      const providerOptions = { openai: { logprobs: 2 } };
      const result = await generateText({ model: vllm.completion(MODEL), ...REQUEST, providerOptions });
      const { logprobs } = result.providerMetadata.openai;
      assert.equal(logprobs.token_logprobs.length, result.usage.outputTokens);
      logprobs.top_logprobs.forEach((top) => assert.ok(Object.keys(top).length >= 2));
    });

    test('messages become a prompt', async () => {
      const messages = [{ role: 'user', content: 'Say hello.' }];
      const { text } = await generateText({ model: vllm.completion(MODEL), messages, maxOutputTokens: 12 });
      isText(text);
    });
  });
}
