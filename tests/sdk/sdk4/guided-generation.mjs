// The guide's "Guided Generation with vLLM". What it writes under providerOptions.openai never leaves this generation's
// provider; openai-compatible sends it, and so does a fetch that adds to the body. Both are tried for every constraint.
import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { createOpenAI } from '@ai-sdk/openai';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { APICallError, generateText, streamText } from 'ai';
import { z } from 'zod';
import { collect, isText, rejection } from '../shared/checks.mjs';
import { apiKey, baseURL } from '../shared/environment.mjs';
import { adding } from '../shared/fetches.mjs';
import { untilItStops } from '../../../examples/ai-sdk/shared/patient.mjs';
import { MODEL, vllm } from './lib/ai-provider.mjs';

const compatible = createOpenAICompatible({ name: 'vllm', baseURL, apiKey });

// The guide's call, with its options under the name that openai-compatible sends on.
const guided = (prompt, options, request = {}) =>
  generateText({ model: compatible(MODEL), prompt, maxTokens: 100, providerOptions: { vllm: options }, ...request });

// The guide's call as it is, on a provider whose fetch adds the options.
function guidedByFetch(prompt, options) {
  const provider = createOpenAI({ baseURL, apiKey, compatibility: 'strict', fetch: adding(options) });
  return generateText({ model: provider(MODEL), prompt, maxTokens: 100, providerOptions: { openai: options } });
}

const PROFILE = 'Generate user profile data';
const guided_json = {
  type: 'object',
  properties: {
    name: { type: 'string' },
    age: { type: 'integer', minimum: 0, maximum: 120 },
    email: { type: 'string', format: 'email' },
    interests: {
      type: 'array',
      items: { type: 'string' },
      minItems: 1,
      maxItems: 5,
    },
  },
  required: ['name', 'age', 'email'],
};
const Profile = z.object({
  name: z.string(),
  age: z.number().int().min(0).max(120),
  email: z.string().email(),
  interests: z.array(z.string()).min(1).max(5).optional(),
});

const PHONE = 'Generate a valid US phone number';
const guided_regex = '^\\d{3}-\\d{3}-\\d{4}$';
const SENTIMENT = 'What is the sentiment of this review: "Amazing product!"';
const guided_choice = ['positive', 'negative', 'neutral'];

describe('guided generation', () => {
  test('the calls as the guide writes them answer', async () => {
    const { text } = await generateText({
      model: vllm(MODEL),
      prompt: SENTIMENT,
      maxTokens: 8,
      providerOptions: { openai: { guided_choice } },
    });
    isText(text);
  });

  test('json schema', async () => {
    const result = await untilItStops((seed) => guided(PROFILE, { guided_json, seed }, { temperature: 0.7 }));
    const userData = JSON.parse(result.text);
    Profile.parse(userData);
    assert.equal(result.finishReason, 'stop');
  });

  test('json schema through a rewriting fetch', async () => {
    const result = await untilItStops((seed) => guidedByFetch(PROFILE, { guided_json, seed, temperature: 0.7 }));
    Profile.parse(JSON.parse(result.text));
  });

  test('regex', async () => {
    assert.match((await guided(PHONE, { guided_regex })).text, /^\d{3}-\d{3}-\d{4}$/);
  });

  test('regex through a rewriting fetch', async () => {
    assert.match((await guidedByFetch(PHONE, { guided_regex })).text, /^\d{3}-\d{3}-\d{4}$/);
  });

  test('choice', async () => {
    assert.ok(guided_choice.includes((await guided(SENTIMENT, { guided_choice })).text));
  });

  test('choice through a rewriting fetch', async () => {
    assert.ok(guided_choice.includes((await guidedByFetch(SENTIMENT, { guided_choice })).text));
  });

  test('choice at a high temperature', async () => {
    for (const seed of [1, 2, 3, 4]) {
      const { text } = await guided(SENTIMENT, { guided_choice }, { temperature: 2, seed });
      assert.ok(guided_choice.includes(text), text);
    }
  });

  test('grammar', async () => {
    const guided_grammar = 'start: ("yes" | "no") " " /[0-9]{2}/';
    assert.match((await guided('Sure?', { guided_grammar })).text, /^(yes|no) \d\d$/);
  });

  test('structured_outputs, as vLLM calls it now', async () => {
    const { text } = await guided(SENTIMENT, { structured_outputs: { choice: guided_choice } });
    assert.ok(guided_choice.includes(text), text);
  });

  test('a choice as a stream', async () => {
    const { textStream } = streamText({
      model: compatible(MODEL),
      prompt: SENTIMENT,
      providerOptions: { vllm: { guided_choice } },
    });
    assert.ok(guided_choice.includes((await collect(textStream)).join('')));
  });

  test('a choice with the completion model', async () => {
    const { text } = await generateText({
      model: compatible.completionModel(MODEL),
      prompt: `${SENTIMENT} It is `,
      maxTokens: 8,
      providerOptions: { vllm: { guided_choice } },
    });
    assert.ok(guided_choice.includes(text), text);
  });

  test('a broken regex is refused and named', async () => {
    const error = await rejection(guided(PHONE, { guided_regex: '(' }));
    assert.ok(APICallError.isInstance(error), `${error}`);
    assert.equal(error.statusCode, 400);
    assert.match(error.responseBody, /guided_regex/);
  });
});
