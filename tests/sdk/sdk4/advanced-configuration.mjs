// The guide's "Advanced Configuration": headers, vLLM's own parameters, several models.
//
// This generation's providerOptions.openai drops every parameter that it does not know, without a word. What the
// guide means reaches a server in two ways: a fetch that adds to the body, and the provider openai-compatible.
import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { createOpenAI } from '@ai-sdk/openai';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { cosineSimilarity, embedMany, generateText, streamText } from 'ai';
import { collect, isText } from '../shared/checks.mjs';
import { apiKey, baseURL, EMBEDDING_MODEL, smallURL } from '../shared/environment.mjs';
import { adding, recording } from '../shared/fetches.mjs';
import { alone, MODEL, vllm } from './lib/ai-provider.mjs';

const PROMPT = { prompt: 'Explain relativity', maxTokens: 8 };
// No two words are equally likely here.
// Greedy answers to it have no near-ties, which bfloat16 decides by the chunk that a prompt is computed in.
const COUNTING = { prompt: 'Count from 1 to 10.', maxTokens: 6 };
const compatible = createOpenAICompatible({ name: 'vllm', baseURL: smallURL, apiKey });

// A provider of this generation whose requests carry more.
const withFields = (fields) =>
  createOpenAI({ baseURL: smallURL, apiKey, compatibility: 'strict', name: 'vllm', fetch: adding(fields) });

// An answer through openai-compatible, with what came over the wire.
async function compatibly(options, request = {}) {
  const { text, response } = await generateText({
    model: compatible(MODEL),
    temperature: 0,
    ...PROMPT,
    providerOptions: { vllm: options },
    ...request,
  });
  return { text, choice: response.body.choices[0], body: response.body };
}

describe('advanced configuration', () => {
  test('custom headers and authentication', async () => {
    const seen = [];
    const custom = createOpenAI({
      baseURL: process.env.VLLM_BASE_URL,
      apiKey: 'not the key',
      compatibility: 'strict',
      headers: {
        Authorization: `Bearer ${process.env.VLLM_API_KEY}`,
        'X-Organization-Id': 'org-1',
        'X-Request-Id': () => crypto.randomUUID(), // Dynamic header
      },
      fetch: async (url, options) => {
        // Custom fetch implementation for monitoring
        const response = await fetch(url, options);
        seen.push([url, response.status]);
        return response;
      },
    });
    const first = await generateText({ model: custom(MODEL), ...PROMPT });
    const second = await generateText({ model: custom(MODEL), ...PROMPT });
    isText(first.text);
    assert.deepEqual(seen, Array(2).fill([`${baseURL}/chat/completions`, 200]));
    assert.notEqual(first.response.id, second.response.id, 'the header is the same for both, the ids are not');
  });

  test('provider options as the guide writes them', async () => {
    const result = await generateText({
      model: vllm(MODEL),
      prompt: 'Explain relativity',
      temperature: 0.7,
      maxTokens: 16,
      topP: 0.95,
      topK: 50,
      frequencyPenalty: 0.5,
      presencePenalty: 0.3,
      stopSequences: ['\n\n', 'END'],
      // vLLM-specific options via providerOptions
      providerOptions: {
        openai: {
          // Enable logprobs for debugging
          logprobs: true,
          // Set number of logprobs to return
          top_logprobs: 5,
          // Enable best_of sampling
          best_of: 3,
          // Use beam search
          use_beam_search: true,
          // Repetition penalty
          repetition_penalty: 1.1,
        },
      },
    });
    isText(result.text);
    assert.ok(!/\n\n|END/.test(result.text));
  });

  test('the same options in one body', async () => {
    const fields = { logprobs: true, top_logprobs: 5, best_of: 3, use_beam_search: true, repetition_penalty: 1.1 };
    const request = { ...PROMPT, temperature: 0.7, topP: 0.95, frequencyPenalty: 0.5, presencePenalty: 0.3 };
    const sent = recording();
    const provider = createOpenAI({
      baseURL,
      apiKey,
      compatibility: 'strict',
      fetch: adding({ ...fields, top_k: 50 }, sent),
    });
    const { text, logprobs } = await generateText({ model: provider(MODEL), ...request });
    isText(text);
    assert.equal(sent.calls[0].body.use_beam_search, true);
    assert.ok(logprobs.length > 0);
    assert.equal(logprobs[0].topLogprobs.length, 5);
  });

  test('logprobs as a setting of the model', async () => {
    const { logprobs, usage } = await generateText({ model: vllm(MODEL, { logprobs: 5 }), temperature: 0, ...PROMPT });
    assert.equal(logprobs.length, usage.completionTokens);
    for (const { logprob, topLogprobs } of logprobs) {
      assert.ok(logprob <= 0);
      assert.equal(topLogprobs.length, 5);
      assert.equal(topLogprobs[0].logprob, logprob, 'a greedy token is the likeliest');
    }
  });

  test('logprobs of a stream', async () => {
    const result = streamText({ model: vllm(MODEL, { logprobs: true }), ...PROMPT });
    const finish = (await collect(result.fullStream)).find((part) => part.type === 'finish');
    assert.equal(finish.logprobs.length, finish.usage.completionTokens);
  });

  test('logit bias as a setting of the model', async () => {
    const request = { prompt: 'Say yes.', temperature: 0, maxTokens: 3 };
    const tokens = await fetch(`${baseURL.replace('/v1', '')}/tokenize`, {
      method: 'POST',
      headers: { 'Content-Type': 'application/json', Authorization: `Bearer ${apiKey}` },
      body: JSON.stringify({ prompt: ' wolf', add_special_tokens: false }),
    }).then((response) => response.json());
    const logitBias = { [tokens.tokens[0]]: 100 };
    const { text } = await generateText({ model: vllm(MODEL, { logitBias }), ...request });
    assert.equal(text, ' wolf wolf wolf');
  });

  test('best_of through openai-compatible', async () => {
    const request = { temperature: 1, seed: 11 };
    const likelihood = ({ choice }) => choice.logprobs.content.reduce((sum, { logprob }) => sum + logprob, 0);
    const one = await compatibly({ logprobs: true }, request);
    const best = await compatibly({ logprobs: true, best_of: 4 }, request);
    isText(best.text);
    assert.equal(best.body.choices.length, 1);
    assert.ok(likelihood(best) >= likelihood(one), 'the first candidate is the answer to best_of 1');
  });

  test('beam search through openai-compatible', async () => {
    // On the server that takes more than one request, for every beam is one.
    const model = createOpenAICompatible({ name: 'vllm', baseURL, apiKey })(MODEL);
    const options = { use_beam_search: true, best_of: 3 };
    const { text, body } = await compatibly(options, { model });
    isText(text);
    assert.equal(body.choices.length, 1);
  });

  test('logprobs and top_logprobs through openai-compatible', async () => {
    const { choice } = await compatibly({ logprobs: true, top_logprobs: 5 });
    assert.equal(choice.logprobs.content[0].top_logprobs.length, 5);
  });

  test('repetition_penalty through openai-compatible', async () => {
    const request = { prompt: 'Repeat without end: a a a a a a a a a a a a', maxTokens: 16 };
    const plain = await compatibly({}, request);
    const penalised = await compatibly({ repetition_penalty: 2.0 }, request);
    assert.notEqual(penalised.text, plain.text);
  });

  test('top_k 1 is greedy at any temperature', async () => {
    await compatibly({}, COUNTING); // now the prefix cache holds the prompt
    const greedy = await compatibly({}, COUNTING);
    const hot = await compatibly({ top_k: 1 }, { ...COUNTING, temperature: 2, seed: 5 });
    assert.equal(hot.text, greedy.text);
  });

  test('min_p and a seed through a rewriting fetch', async () => {
    const model = withFields({ min_p: 1.0, seed: 3 })(MODEL);
    const greedy = await generateText({ model: alone(MODEL), temperature: 0, ...COUNTING });
    assert.equal((await generateText({ model, temperature: 2, ...COUNTING })).text, greedy.text);
  });

  test('an option that nobody knows is named in a header', async () => {
    const sent = recording();
    const provider = createOpenAI({ baseURL, apiKey, compatibility: 'strict', fetch: adding({ sparkle: 3 }, sent) });
    isText((await generateText({ model: provider(MODEL), ...PROMPT })).text);
    assert.equal(sent.calls[0].response.headers.get('x-minivllm-ignored'), 'sparkle');
  });

  test('several models and servers', async () => {
    const named = (name, url) => createOpenAI({ baseURL: url, apiKey, compatibility: 'strict', name });
    const models = {
      chat: named('vllm-chat', baseURL)(MODEL),
      code: named('vllm-code', smallURL)(MODEL),
      embedding: named('vllm-embedding', baseURL).textEmbedding(EMBEDDING_MODEL),
    };
    isText((await generateText({ model: models.chat, ...PROMPT })).text);
    isText((await generateText({ model: models.code, ...PROMPT })).text);
    const { embeddings } = await embedMany({ model: models.embedding, values: ['one', 'one'] });
    assert.ok(cosineSimilarity(embeddings[0], embeddings[1]) > 0.999);
  });

  test('streaming through openai-compatible', async () => {
    const { textStream } = streamText({ model: compatible(MODEL), ...PROMPT, providerOptions: { vllm: { top_k: 1 } } });
    isText((await collect(textStream)).join(''));
  });
});
