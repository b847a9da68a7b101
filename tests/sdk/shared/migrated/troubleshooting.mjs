// The guide's "Troubleshooting", its four problems, and "Performance Optimization Tips".
import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { collect, isCount, isText, rejection } from '../checks.mjs';
import { apiKey, baseURL, deadURL, smallURL } from '../environment.mjs';
import { recording } from '../fetches.mjs';

export default function troubleshooting({ createOpenAI, generateText, MODEL, streamText, vllm }) {
  async function checkVLLMConnection(url) {
    try {
      const response = await fetch(`${url}/health`);
      return response.ok ? 'healthy' : `returned ${response.status}`;
    } catch (error) {
      return `cannot connect: ${error.cause.code}`;
    }
  }

  async function listAvailableModels(url, headers = {}) {
    const response = await fetch(`${url}/v1/models`, { headers });
    const data = await response.json();
    return data.data.map((m) => m.id);
  }

  const vllmOptimized = createOpenAI({
    baseURL: process.env.VLLM_BASE_URL,
    apiKey: process.env.VLLM_API_KEY,
  });

  // Use smaller batches
  async function generateWithReducedMemory(prompts) {
    const batchSize = 5; // Smaller batch size
    const results = [];

    for (let i = 0; i < prompts.length; i += batchSize) {
      const batch = prompts.slice(i, i + batchSize);
      const batchResults = await Promise.all(
        batch.map((prompt) =>
          generateText({
            model: vllmOptimized(MODEL),
            prompt,
            maxOutputTokens: 8, // Limit token generation
          })
        )
      );
      results.push(...batchResults);
    }

    return results;
  }

  const optimizedVLLM = (inner) =>
    createOpenAI({
      baseURL: process.env.VLLM_BASE_URL,
      apiKey: process.env.VLLM_API_KEY,
      // Add keep-alive for connection reuse
      fetch: (url, options) => {
        return inner(url, {
          ...options,
          keepalive: true,
          // Add compression
          headers: {
            ...options?.headers,
            'Accept-Encoding': 'gzip, deflate',
          },
        });
      },
    });

  async function batchGenerate(prompts) {
    // vLLM handles batching internally for better throughput
    const results = await Promise.all(
      prompts.map((prompt) =>
        generateText({
          model: vllm(MODEL),
          prompt,
          temperature: 0.7,
          maxOutputTokens: 8,
        })
      )
    );

    return results.map((r) => r.text);
  }

  describe('troubleshooting', () => {
    test('connection refused', async () => {
      assert.equal(await checkVLLMConnection(process.env.VLLM_BASE_URL), 'healthy');
      assert.match(await checkVLLMConnection(deadURL), /ECONNREFUSED/);
    });

    test('model not found: the models are listed', async () => {
      assert.deepEqual(await listAvailableModels(smallURL), [MODEL]); // no key, no headers: as the guide has it
      const ids = await listAvailableModels(process.env.VLLM_BASE_URL, { Authorization: `Bearer ${apiKey}` });
      assert.ok(ids.includes(MODEL), `${ids}`);
    });

    test('out of memory: smaller batches', async () => {
      const prompts = Array.from({ length: 7 }, (_, index) => `Say ${index}.`);
      const results = await generateWithReducedMemory(prompts);
      assert.equal(results.length, 7);
      results.forEach((result) => isText(result.text));
    });

    test('what needed a compatibility mode', async () => {
      const result = await generateText({
        model: vllmOptimized(MODEL),
        prompt: 'Test',
        maxOutputTokens: 4,
        providerOptions: {
          openai: {
            logprobs: true,
          },
        },
      });
      isCount(result.usage.totalTokens);
      const stream = streamText({ model: vllmOptimized(MODEL), prompt: 'Test', maxOutputTokens: 4 });
      await stream.consumeStream();
      isCount((await stream.usage).totalTokens);
    });

    test('keep-alive and compression', async () => {
      const sent = recording();
      const request = { prompt: 'Count to ten.', temperature: 0, maxOutputTokens: 12 };
      const providerOptions = { openai: { logprobs: 5 } }; // they make the body long
      const { text } = await generateText({ model: optimizedVLLM(sent)(MODEL), ...request, providerOptions });
      isText(text);
      assert.match(sent.calls[0].response.headers.get('content-encoding') ?? 'none', /^(gzip|deflate)$/);
    });

    test('a stream is never compressed', async () => {
      const sent = recording();
      const result = streamText({ model: optimizedVLLM(sent)(MODEL), prompt: 'Hello', maxOutputTokens: 8 });
      assert.ok((await collect(result.textStream)).length > 3);
      assert.equal(sent.calls[0].response.headers.get('content-encoding'), null);
    });

    test('batch processing', async () => {
      const texts = await batchGenerate(['Name a fruit.', 'Name a bird.', 'Name a tree.', 'Name a fish.']);
      assert.equal(texts.length, 4);
      texts.forEach(isText);
    });
  });
}
