// The guide's "Advanced Configuration": headers, vLLM's own parameters, several models.
//
// providerOptions.openai drops every parameter that it does not know (it knows logprobs), without a word. What the
// guide means reaches a server in two ways: a fetch that adds to the body, and the provider openai-compatible.
import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { collect, isText } from '../checks.mjs';
import { apiKey, baseURL, EMBEDDING_MODEL, root, smallURL } from '../environment.mjs';
import { adding, recording } from '../fetches.mjs';

export default function advancedConfiguration({
  alone,
  cosineSimilarity,
  createOpenAI,
  createOpenAICompatible,
  embedMany,
  generateText,
  MODEL,
  streamText,
  vllm,
}) {
  const PROMPT = { prompt: 'Explain relativity', maxOutputTokens: 8 };
  // No two words are equally likely here.
  // Greedy answers to it have no near-ties, which bfloat16 decides by the chunk that a prompt is computed in.
  const COUNTING = { prompt: 'Count from 1 to 10.', maxOutputTokens: 6 };
  const compatible = createOpenAICompatible({ name: 'vllm', baseURL: smallURL, apiKey, includeUsage: true });

  // A provider of this generation whose requests carry more.
  const withFields = (fields) => createOpenAI({ baseURL: smallURL, apiKey, name: 'vllm', fetch: adding(fields) });

  // An answer through openai-compatible, with what came over the wire.
  async function compatibly(options, request = {}) {
    const { text, response } = await generateText({
      model: compatible(MODEL),
      temperature: 0,
      ...PROMPT,
      providerOptions: { vllm: options },
      include: { responseBody: true }, // 7 leaves it out otherwise
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
      assert.deepEqual(seen, Array(2).fill([`${baseURL}/responses`, 200]));
      assert.notEqual(first.response.id, second.response.id, 'the header is the same for both, the ids are not');
    });

    test('provider options as the guide writes them', async () => {
      const result = await generateText({
        model: vllm.chat(MODEL), // the other API has no penalties and no stop sequences
        prompt: 'Explain relativity',
        temperature: 0.7,
        maxOutputTokens: 16,
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

      // Access logprobs from metadata
      const logprobs = result.providerMetadata?.openai?.logprobs;
      assert.ok(logprobs.length > 0);
    });

    test('the same options in one body', async () => {
      const fields = { logprobs: true, top_logprobs: 5, best_of: 3, use_beam_search: true, repetition_penalty: 1.1 };
      const request = { ...PROMPT, temperature: 0.7, topP: 0.95, frequencyPenalty: 0.5, presencePenalty: 0.3 };
      const sent = recording();
      const provider = createOpenAI({ baseURL, apiKey, fetch: adding({ ...fields, top_k: 50 }, sent) });
      const { text, providerMetadata } = await generateText({ model: provider.chat(MODEL), ...request });
      isText(text);
      assert.equal(sent.calls[0].body.use_beam_search, true);
      assert.equal(providerMetadata.openai.logprobs[0].top_logprobs.length, 5);
    });

    test('logprobs', async () => {
      const providerOptions = { openai: { logprobs: 5 } };
      const request = { model: vllm.chat(MODEL), temperature: 0, ...PROMPT, providerOptions };
      const { providerMetadata, usage } = await generateText(request);
      const { logprobs } = providerMetadata.openai;
      assert.equal(logprobs.length, usage.outputTokens);
      for (const { logprob, top_logprobs } of logprobs) {
        assert.ok(logprob <= 0);
        assert.equal(top_logprobs.length, 5);
        assert.equal(top_logprobs[0].logprob, logprob, 'a greedy token is the likeliest');
      }
    });

    test('logprobs of the responses API', async () => {
      const providerOptions = { openai: { logprobs: 3 } };
      const { providerMetadata, usage } = await generateText({ model: vllm(MODEL), ...PROMPT, providerOptions });
      const [logprobs] = (providerMetadata.openai ?? providerMetadata.vllm).logprobs; // 5: under the provider's name
      assert.equal(logprobs.length, usage.outputTokens);
      assert.equal(logprobs[0].top_logprobs.length, 3);
    });

    test('logprobs of a stream', async () => {
      const result = streamText({
        model: vllm.chat(MODEL),
        ...PROMPT,
        providerOptions: { openai: { logprobs: true } },
      });
      await result.consumeStream();
      assert.ok((await result.providerMetadata).openai.logprobs.length > 0);
    });

    test('logit bias', async () => {
      const request = { prompt: 'Say yes.', temperature: 0, maxOutputTokens: 3 };
      const tokens = await fetch(`${root(baseURL)}/tokenize`, {
        method: 'POST',
        headers: { 'Content-Type': 'application/json', Authorization: `Bearer ${apiKey}` },
        body: JSON.stringify({ prompt: ' wolf', add_special_tokens: false }),
      }).then((response) => response.json());
      const providerOptions = { openai: { logitBias: { [tokens.tokens[0]]: 100 } } };
      const { text } = await generateText({ model: vllm.chat(MODEL), ...request, providerOptions });
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
      const request = { prompt: 'Repeat without end: a a a a a a a a a a a a', maxOutputTokens: 16 };
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
      const model = withFields({ min_p: 1.0, seed: 3 }).chat(MODEL);
      const greedy = await generateText({ model: alone.chat(MODEL), temperature: 0, ...COUNTING });
      assert.equal((await generateText({ model, temperature: 2, ...COUNTING })).text, greedy.text);
    });

    test('an option that nobody knows is named in a header', async () => {
      const sent = recording();
      const provider = createOpenAI({ baseURL, apiKey, fetch: adding({ sparkle: 3 }, sent) });
      isText((await generateText({ model: provider(MODEL), ...PROMPT })).text);
      assert.equal(sent.calls[0].response.headers.get('x-minivllm-ignored'), 'sparkle');
    });

    test('several models and servers', async () => {
      const named = (name, url) => createOpenAI({ baseURL: url, apiKey, name });
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
      const { textStream } = streamText({
        model: compatible(MODEL),
        ...PROMPT,
        providerOptions: { vllm: { top_k: 1 } },
      });
      isText((await collect(textStream)).join(''));
    });
  });
}
