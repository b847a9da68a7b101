// The guide's "Text Generation Examples": its code, with a shorter answer, and what it promises about the results.
import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { generateText, streamText } from 'ai';
import { collect, isCount, isText, kindsOf } from '../shared/checks.mjs';
import { alone, llama3Chat, llama3Completion, MODEL, vllm } from './lib/ai-provider.mjs';

function isUsage(usage, maxTokens) {
  isCount(usage.promptTokens);
  isCount(usage.completionTokens);
  assert.ok(usage.completionTokens <= maxTokens);
  assert.equal(usage.totalTokens, usage.promptTokens + usage.completionTokens);
}

// The prefix cache holds the prompt afterwards. In bfloat16 a prompt that it holds and one that it does not may round
// two equally likely words differently, so answers are compared only behind this.
const warm = (request) => generateText({ ...request, maxTokens: 1 });

const STORY = [
  { role: 'system', content: 'You are a helpful assistant.' },
  { role: 'user', content: 'Write a story about a robot learning to paint.' },
];

describe('text generation', () => {
  test('basic text generation', async () => {
    const { text, usage, finishReason, warnings } = await generateText({
      model: vllm(MODEL),
      prompt: 'Explain quantum computing in simple terms.',
      temperature: 0.7,
      maxTokens: 16,
    });
    isText(text);
    isUsage(usage, 16);
    assert.ok(['stop', 'length'].includes(finishReason), finishReason);
    assert.deepEqual(warnings, []);
  });

  test('a limit is kept and called length', async () => {
    const { usage, finishReason } = await generateText({ model: vllm(MODEL), messages: STORY, maxTokens: 5 });
    assert.equal(usage.completionTokens, 5);
    assert.equal(finishReason, 'length');
  });

  test('streaming text generation', async () => {
    const result = await streamText({ model: vllm(MODEL), messages: STORY, temperature: 0.8, maxTokens: 16 });
    const chunks = await collect(result.textStream);
    assert.ok(chunks.length > 5, `the text came in ${chunks.length} pieces`);
    isText(chunks.join(''));
    assert.equal(await result.text, chunks.join(''));
    isUsage(await result.usage, 16);
    assert.ok(['stop', 'length'].includes(await result.finishReason));
  });

  test('the parts of a stream come in order', async () => {
    const parts = await collect(streamText({ model: vllm(MODEL), messages: STORY, maxTokens: 8 }).fullStream);
    assert.deepEqual(kindsOf(parts), ['step-start', 'text-delta', 'step-finish', 'finish']);
    const { response, usage } = parts.at(-1);
    isUsage(usage, 8);
    assert.equal(response.modelId, MODEL);
    assert.match(response.id, /^chatcmpl-/);
  });

  test('a stream says what the whole answer says', async () => {
    const request = { model: alone(MODEL), messages: STORY, temperature: 0, maxTokens: 16 };
    await warm(request);
    const whole = await generateText(request);
    const streamed = streamText(request);
    assert.equal((await collect(streamed.textStream)).join(''), whole.text);
    assert.deepEqual(await streamed.usage, whole.usage);
  });

  test('chat conversation', async () => {
    const messages = [
      { role: 'system', content: 'You are a helpful coding assistant.' },
      { role: 'user', content: 'How do I sort an array in Python?' },
      { role: 'assistant', content: 'You can sort an array in Python using...' },
      { role: 'user', content: 'What about sorting in reverse order?' },
    ];
    const { text, response } = await generateText({ model: vllm(MODEL), messages, temperature: 0.3, maxTokens: 16 });
    isText(text);
    assert.equal(response.messages.at(-1).role, 'assistant');
  });

  test('an answer without a limit ends by itself', async () => {
    const question = 'What is 2 + 2? Answer with one number.';
    const { text, finishReason } = await generateText({ model: vllm(MODEL), prompt: question, seed: 1 });
    isText(text);
    assert.equal(finishReason, 'stop');
  });

  test('a seed repeats an answer', async () => {
    const request = { model: alone(MODEL), messages: STORY, temperature: 1, seed: 7, maxTokens: 12 };
    await warm(request);
    const texts = [
      await generateText(request),
      await generateText(request),
      await generateText({ ...request, seed: 8 }),
    ];
    assert.equal(texts[0].text, texts[1].text);
    assert.notEqual(texts[0].text, texts[2].text);
  });

  test('stop sequences end an answer and are left out', async () => {
    const request = { model: alone(MODEL), messages: STORY, temperature: 0, maxTokens: 16 };
    await warm(request);
    const { text } = await generateText(request);
    const stop = text.slice(12, 17);
    const cut = await generateText({ ...request, stopSequences: [stop] });
    assert.equal(cut.text, text.slice(0, text.indexOf(stop)));
    assert.equal(cut.finishReason, 'stop');
  });

  test('chat and completion instances', async () => {
    isText((await generateText({ model: llama3Chat, prompt: 'Say hello.', maxTokens: 8 })).text);
    isText((await generateText({ model: llama3Completion, prompt: 'Once upon a time', maxTokens: 8 })).text);
  });

  test('response metadata', async () => {
    const { response, request } = await generateText({ model: vllm(MODEL), prompt: 'Hello', maxTokens: 4 });
    assert.match(response.id, /^chatcmpl-/);
    assert.equal(response.modelId, MODEL);
    assert.ok(Math.abs(response.timestamp - Date.now()) < 60_000);
    assert.equal(JSON.parse(request.body).model, MODEL);
  });
});
