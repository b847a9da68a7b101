// The guide's vllm.completion(...): a text is continued as it is, without a chat template.
import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { generateText, streamText } from 'ai';
import { collect, isCount, isText } from '../shared/checks.mjs';
import { alone, MODEL, vllm } from './lib/ai-provider.mjs';

const REQUEST = { prompt: 'The capital of France is', temperature: 0, maxTokens: 8 };

describe('completion model', () => {
  test('a text is continued', async () => {
    const { text, usage, finishReason } = await generateText({ model: vllm.completion(MODEL), ...REQUEST });
    assert.match(text, /Paris/);
    isCount(usage.promptTokens);
    assert.equal(usage.completionTokens, 8);
    assert.equal(finishReason, 'length');
  });

  test('a stream says the same', async () => {
    await generateText({ model: alone.completion(MODEL), ...REQUEST, maxTokens: 1 }); // the prefix cache holds it now
    const { text } = await generateText({ model: alone.completion(MODEL), ...REQUEST });
    const result = streamText({ model: alone.completion(MODEL), ...REQUEST });
    assert.equal((await collect(result.textStream)).join(''), text);
    assert.equal((await result.usage).completionTokens, 8);
    assert.equal(await result.finishReason, 'length');
  });

  test('echo gives the prompt back', async () => {
    const { text } = await generateText({ model: vllm.completion(MODEL, { echo: true }), ...REQUEST });
    assert.ok(text.startsWith(REQUEST.prompt) && text.length > REQUEST.prompt.length, text);
  });

  test('logprobs', async () => {
    const { logprobs } = await generateText({ model: vllm.completion(MODEL, { logprobs: 2 }), ...REQUEST });
    assert.equal(logprobs.length, 8);
    logprobs.forEach(({ logprob, topLogprobs }) => assert.ok(logprob <= 0 && topLogprobs.length >= 2));
  });

  test('messages become a prompt', async () => {
    const messages = [{ role: 'user', content: 'Say hello.' }];
    const { text } = await generateText({ model: vllm.completion(MODEL), messages, maxTokens: 12 });
    isText(text);
  });
});
