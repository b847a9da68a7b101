// The guide's "Text Generation Examples": its code, with a shorter answer, and what it promises about the results.
import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { appearInOrder, collect, isCount, isText, kindsOf } from '../checks.mjs';
import { bothOf } from './both.mjs';

function isUsage(usage, maxTokens) {
  isCount(usage.inputTokens);
  isCount(usage.outputTokens);
  assert.ok(usage.outputTokens <= maxTokens);
  assert.equal(usage.totalTokens, usage.inputTokens + usage.outputTokens);
}

const STORY = [{ role: 'user', content: 'Write a story about a robot learning to paint.' }];

export default function textGeneration({ generateText, streamText, instructed, alone, vllm, MODEL }) {
  const both = bothOf(vllm);
  // The prefix cache holds the prompt afterwards. In bfloat16 a prompt that it holds and one that it does not may round
  // two equally likely words differently, so answers are compared only behind this.
  const warm = (request) => generateText({ ...request, maxOutputTokens: 1 });
  const story = { ...instructed('You are a helpful assistant.'), messages: STORY };

  describe('text generation', () => {
    both('basic text generation', async (model) => {
      const { text, usage, finishReason, warnings } = await generateText({
        model: model(MODEL),
        prompt: 'Explain quantum computing in simple terms.',
        temperature: 0.7,
        maxOutputTokens: 16,
      });
      isText(text);
      isUsage(usage, 16);
      assert.ok(['stop', 'length'].includes(finishReason), finishReason);
      assert.deepEqual(warnings ?? [], []);
    });

    test('a limit is kept and called length', async () => {
      const { usage, finishReason } = await generateText({ model: vllm(MODEL), ...story, maxOutputTokens: 5 });
      assert.equal(usage.outputTokens, 5);
      assert.equal(finishReason, 'length');
    });

    both('streaming text generation', async (model) => {
      const result = streamText({ model: model(MODEL), ...story, temperature: 0.8, maxOutputTokens: 16 });
      const chunks = await collect(result.textStream);
      assert.ok(chunks.length > 5, `the text came in ${chunks.length} pieces`);
      isText(chunks.join(''));
      assert.equal(await result.text, chunks.join(''));
      isUsage(await result.usage, 16);
      assert.ok(['stop', 'length'].includes(await result.finishReason));
    });

    both('the parts of a stream come in order', async (model) => {
      const parts = await collect(streamText({ model: model(MODEL), ...story, maxOutputTokens: 8 }).fullStream);
      const kinds = kindsOf(parts);
      assert.ok(!kinds.includes('error'), JSON.stringify(parts.find((part) => part.type === 'error')));
      appearInOrder(kinds, ['start', 'start-step', 'text-start', 'text-delta', 'text-end', 'finish-step', 'finish']);
      isUsage(parts.at(-1).totalUsage, 8);
      assert.equal(parts.find((part) => part.type === 'finish-step').response.modelId, MODEL);
    });

    bothOf(alone)('a stream says what the whole answer says', async (model) => {
      const request = { model: model(MODEL), ...story, temperature: 0, maxOutputTokens: 16 };
      await warm(request);
      const whole = await generateText(request);
      const streamed = streamText(request);
      assert.equal((await collect(streamed.textStream)).join(''), whole.text);
      assert.equal((await streamed.usage).outputTokens, whole.usage.outputTokens);
    });

    both('chat conversation', async (model) => {
      const messages = [
        { role: 'user', content: 'How do I sort an array in Python?' },
        { role: 'assistant', content: 'You can sort an array in Python using...' },
        { role: 'user', content: 'What about sorting in reverse order?' },
      ];
      const { text, response } = await generateText({
        model: model(MODEL),
        ...instructed('You are a helpful coding assistant.'),
        messages,
        temperature: 0.3,
        maxOutputTokens: 16,
      });
      isText(text);
      assert.equal(response.messages.at(-1).role, 'assistant');
    });

    test('both APIs give the same answer', async () => {
      const request = { ...story, temperature: 0, maxOutputTokens: 12 };
      await warm({ model: alone(MODEL), ...request });
      const { text } = await generateText({ model: alone(MODEL), ...request });
      assert.equal((await generateText({ model: alone.chat(MODEL), ...request })).text, text);
    });

    test('an answer without a limit ends by itself', async () => {
      const question = 'What is 2 + 2? Answer with one number.';
      const { text, finishReason } = await generateText({ model: vllm(MODEL), prompt: question, temperature: 0 });
      isText(text);
      assert.equal(finishReason, 'stop');
    });

    test('a seed repeats an answer', async () => {
      const request = { model: alone.chat(MODEL), ...story, temperature: 1, seed: 7, maxOutputTokens: 12 };
      await warm(request);
      const first = await generateText(request);
      assert.equal((await generateText(request)).text, first.text);
      assert.notEqual((await generateText({ ...request, seed: 8 })).text, first.text);
    });

    test('stop sequences end an answer and are left out', async () => {
      const request = { model: alone.chat(MODEL), ...story, temperature: 0, maxOutputTokens: 16 };
      await warm(request);
      const { text } = await generateText(request);
      const stop = text.slice(12, 17);
      const cut = await generateText({ ...request, stopSequences: [stop] });
      assert.equal(cut.text, text.slice(0, text.indexOf(stop)));
      assert.equal(cut.finishReason, 'stop');
    });

    both('response metadata', async (model, api) => {
      const { response, request } = await generateText({
        model: model(MODEL),
        prompt: 'Hello',
        maxOutputTokens: 4,
        include: { requestBody: true }, // 7 leaves it out otherwise
      });
      assert.match(response.id, api === 'chat' ? /^chatcmpl-/ : /^resp_/);
      assert.equal(response.modelId, MODEL);
      assert.ok(Math.abs(response.timestamp - Date.now()) < 60_000);
      assert.ok(request.body);
    });
  });
}
