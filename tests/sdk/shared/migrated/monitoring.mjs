// The guide's "Monitoring and Observability".
import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { isText, rejection } from '../checks.mjs';
import { apiKey, baseURL, deadURL, root, smallURL } from '../environment.mjs';
import { idleMetricsOf, metricsOf } from '../metrics.mjs';

export default function monitoring({ alone, createOpenAI, generateText, MODEL, streamText, vllm }) {
  function withLogging(baseURL, log) {
    return createOpenAI({
      baseURL,
      apiKey: process.env.VLLM_API_KEY,
      fetch: async (url, options) => {
        const startTime = Date.now();
        const requestId = crypto.randomUUID();

        log('vLLM Request:', {
          requestId,
          url,
          method: options?.method,
          timestamp: new Date().toISOString(),
        });

        try {
          const response = await fetch(url, options);
          const duration = Date.now() - startTime;

          log('vLLM Response:', {
            requestId,
            status: response.status,
            duration: `${duration}ms`,
            headers: Object.fromEntries(response.headers.entries()),
          });

          return response;
        } catch (error) {
          log('vLLM Error:', {
            requestId,
            error: error.message,
            duration: `${Date.now() - startTime}ms`,
          });
          throw error;
        }
      },
    });
  }

  async function generateWithMetrics(prompt, model, sendMetrics, provider = vllm) {
    const startTime = Date.now();

    const result = await generateText({
      model: provider(model),
      prompt,
      temperature: 0.7,
      maxOutputTokens: 12,
    });

    const latency = Date.now() - startTime;
    const tokensPerSecond = result.usage.outputTokens / (latency / 1000);

    const metrics = {
      inputTokens: result.usage.inputTokens,
      outputTokens: result.usage.outputTokens,
      totalTokens: result.usage.totalTokens,
      latency,
      tokensPerSecond,
      model,
      temperature: 0.7,
    };

    // Send to monitoring service
    await sendMetrics(metrics);

    return { text: result.text, metrics };
  }

  describe('monitoring', () => {
    test('request logging', async () => {
      const lines = [];
      const provider = withLogging(baseURL, (...line) => lines.push(line));
      isText((await generateText({ model: provider(MODEL), prompt: 'Hello', maxOutputTokens: 4 })).text);
      assert.deepEqual(
        lines.map(([title]) => title),
        ['vLLM Request:', 'vLLM Response:']
      );
      const [, [, response]] = lines;
      assert.equal(response.status, 200);
      assert.equal(response.headers['content-type'], 'application/json');
      assert.equal(response.requestId, lines[0][1].requestId);
    });

    test('request logging of a stream', async () => {
      const lines = [];
      const provider = withLogging(baseURL, (...line) => lines.push(line));
      await streamText({ model: provider(MODEL), prompt: 'Hello', maxOutputTokens: 4 }).consumeStream();
      assert.match(lines[1][1].headers['content-type'], /^text\/event-stream/);
    });

    test('logging of a connection that fails', async () => {
      const lines = [];
      const provider = withLogging(deadURL, (...line) => lines.push(line));
      await rejection(generateText({ model: provider(MODEL), prompt: 'Hello', maxRetries: 0 }));
      assert.deepEqual(
        lines.map(([title]) => title),
        ['vLLM Request:', 'vLLM Error:']
      );
    });

    test('metrics collection', async () => {
      const sent = [];
      const { text, metrics } = await generateWithMetrics('Name three colours.', MODEL, (each) => sent.push(each));
      isText(text);
      assert.deepEqual(sent, [metrics]);
      for (const name of ['inputTokens', 'outputTokens', 'totalTokens', 'latency', 'tokensPerSecond']) {
        assert.ok(metrics[name] > 0, name);
      }
    });

    test('the server counts what the client counts', async () => {
      const before = await idleMetricsOf(root(smallURL), apiKey);
      const { metrics } = await generateWithMetrics('Name three colours.', MODEL, () => {}, alone);
      const after = await metricsOf(root(smallURL), apiKey);
      const grown = (name) => after.get(name) - before.get(name);
      assert.equal(grown('vllm:generation_tokens_total'), metrics.outputTokens);
      assert.equal(grown('vllm:prompt_tokens_total'), metrics.inputTokens);
    });
  });
}
