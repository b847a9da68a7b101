// The guide's "Error Handling and Retries": its two clients, and what a client sees of every kind of refusal. The
// case that needs the end of a server stands in draining.mjs.
import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { createOpenAI } from '@ai-sdk/openai';
import { APICallError, generateText, InvalidResponseDataError, RetryError, streamText } from 'ai';
import { collect, isText, rejection } from '../shared/checks.mjs';
import { apiKey, baseURL, deadURL, smallURL } from '../shared/environment.mjs';
import { recording } from '../shared/fetches.mjs';
import { whileOccupied } from '../shared/occupied.mjs';
import { MODEL, vllm } from './lib/ai-provider.mjs';

const providerAt = (url, options = {}) => createOpenAI({ baseURL: url, apiKey, compatibility: 'strict', ...options });
const LONG = 'Write a long story about a lighthouse.';
const HELLO = { prompt: 'Hello, world!', maxTokens: 8 };

async function robustGeneration(model, prompt, settings = {}) {
  try {
    const result = await generateText({
      model,
      prompt,
      maxRetries: 3,
      abortSignal: AbortSignal.timeout(30000), // 30s timeout
      maxTokens: 8,
      ...settings,
    });

    return result.text;
  } catch (error) {
    if (error instanceof APICallError) {
      // Handle specific status codes
      switch (error.statusCode) {
        case 429:
          await new Promise((resolve) => setTimeout(resolve, 500));
          return robustGeneration(model, prompt, settings); // Retry
        case 503:
          break;
        default:
          throw error;
      }
    } else if (error instanceof RetryError) {
      assert.ok(error.lastError);
    } else if (error instanceof InvalidResponseDataError) {
      assert.fail(error.message);
    }

    throw error;
  }
}

class VLLMClient {
  constructor(baseURL, maxRetries = 3) {
    this.baseURL = baseURL;
    this.maxRetries = maxRetries;
    this.failed = [];
  }

  async generateWithFallback(prompt, models) {
    for (const model of models) {
      try {
        const provider = createOpenAI({
          baseURL: this.baseURL,
          apiKey: process.env.VLLM_API_KEY,
          compatibility: 'strict',
        });

        const result = await generateText({
          model: provider(model),
          prompt,
          maxRetries: this.maxRetries,
          maxTokens: 8,
        });

        return result.text;
      } catch (error) {
        this.failed.push(model);
        continue;
      }
    }

    throw new Error('All models failed');
  }
}

// The error of a call that was made once, and the error body of the server in it.
async function refusal(settings, provider = providerAt) {
  const sent = recording();
  const model = provider(baseURL, { fetch: sent }).chat(settings.model ?? MODEL);
  const error = await rejection(generateText({ ...HELLO, ...settings, model }));
  assert.ok(APICallError.isInstance(error), `${error}`);
  assert.equal(error.isRetryable, false);
  assert.equal(sent.calls.length, 1, 'it was asked again');
  const { error: body } = JSON.parse(error.responseBody);
  assert.equal(error.message, body.message);
  assert.deepEqual(Object.keys(body).sort(), ['code', 'message', 'param', 'type']);
  return { error, body };
}

describe('error handling', () => {
  test('robust generation', async () => {
    isText(await robustGeneration(vllm(MODEL), 'Hello'));
  });

  test('robust generation waits while the server is full', async () => {
    const small = providerAt(smallURL);
    await whileOccupied(smallURL, MODEL, 16, async () => {
      isText(await robustGeneration(small(MODEL), 'Hello', { maxRetries: 0 }));
    });
  });

  test('a fallback to the next model', async () => {
    const client = new VLLMClient(baseURL);
    const text = await client.generateWithFallback('Hello, world!', [
      'meta-llama/Meta-Llama-3-8B-Instruct',
      'mistralai/Mistral-7B-Instruct-v0.2',
      MODEL,
    ]);
    isText(text);
    assert.equal(client.failed.length, 2);
  });

  test('no model is left', async () => {
    const client = new VLLMClient(baseURL);
    const error = await rejection(client.generateWithFallback('Hello', ['one', 'two']));
    assert.equal(error.message, 'All models failed');
  });

  test('an unknown model is a 404', async () => {
    const { error, body } = await refusal({ model: 'no-such-model' });
    assert.equal(error.statusCode, 404);
    assert.match(body.message, /no-such-model/);
    assert.equal(body.code, 'model_not_found');
  });

  test('a bad value is a 400 that names it', async () => {
    const { error, body } = await refusal({ temperature: 9 });
    assert.equal(error.statusCode, 400);
    assert.equal(body.param, 'temperature');
    assert.equal(body.type, 'invalid_request_error');
  });

  test('a prompt that is too long is a 400 with the counts', async () => {
    const { error, body } = await refusal({ prompt: 'word '.repeat(20_000) });
    assert.equal(error.statusCode, 400);
    assert.equal(body.code, 'context_length_exceeded');
    assert.match(body.message, /\d{4,}/);
  });

  test('a wrong key is a 401', async () => {
    const { error, body } = await refusal({}, (url, options) => providerAt(url, { ...options, apiKey: 'wrong' }));
    assert.equal(error.statusCode, 401);
    assert.equal(body.code, 'invalid_api_key');
  });

  test('no key is a 401', async () => {
    const response = await fetch(`${baseURL}/chat/completions`, { method: 'POST', body: '{}' });
    assert.equal(response.status, 401);
    assert.ok((await response.json()).error.message);
  });

  test('an error before a stream is an error part', async () => {
    const result = streamText({ model: vllm('no-such-model'), ...HELLO, onError() {} });
    const parts = await collect(result.fullStream);
    const { error } = parts.find((part) => part.type === 'error');
    assert.equal(error.statusCode, 404);
  });

  test('a full server is a 429 with Retry-After', async () => {
    const ask = () => generateText({ model: providerAt(smallURL)(MODEL), ...HELLO, maxRetries: 0 });
    const error = await whileOccupied(smallURL, MODEL, 200, () => rejection(ask()));
    assert.ok(APICallError.isInstance(error), `${error}`);
    assert.equal(error.statusCode, 429);
    assert.equal(error.isRetryable, true);
    assert.ok(Number(error.responseHeaders['retry-after']) >= 1);
    assert.ok(Number(error.responseHeaders['retry-after-ms']) >= 1);
    assert.equal(error.data.error.type, 'rate_limit_error');
  });

  test('a full server is asked again until it answers', async () => {
    const sent = recording();
    const model = providerAt(smallURL, { fetch: sent })(MODEL);
    await whileOccupied(smallURL, MODEL, 16, async () => {
      isText((await generateText({ model, ...HELLO, maxRetries: 5 })).text);
    });
    assert.equal(sent.calls[0].response.status, 429);
    assert.equal(sent.calls.at(-1).response.status, 200);
  });

  test('a server that stays full is a RetryError', async () => {
    const ask = () => generateText({ model: providerAt(smallURL)(MODEL), ...HELLO, maxRetries: 1 });
    const error = await whileOccupied(smallURL, MODEL, 2000, () => rejection(ask()));
    assert.ok(RetryError.isInstance(error), `${error}`);
    assert.equal(error.reason, 'maxRetriesExceeded');
    assert.deepEqual(
      error.errors.map((each) => each.statusCode),
      [429, 429]
    );
    assert.equal(error.lastError.statusCode, 429);
  });

  test('a server that is not there is a connection failure', async () => {
    const error = await rejection(generateText({ model: providerAt(deadURL)(MODEL), ...HELLO, maxRetries: 0 }));
    assert.ok(APICallError.isInstance(error), `${error}`);
    assert.equal(error.isRetryable, true);
    assert.match(error.message, /Cannot connect/);
  });

  test('an abort ends a stream, and the server takes the next', async () => {
    const stop = new AbortController();
    const small = providerAt(smallURL);
    const result = streamText({
      model: small(MODEL),
      prompt: 'Count: 1, 2, 3,',
      maxTokens: 2000,
      abortSignal: stop.signal,
      onError() {},
    });
    const read = async () => {
      for await (const part of result.fullStream) {
        if (part.type === 'text-delta') stop.abort();
      }
    };
    assert.equal((await rejection(read())).name, 'AbortError');
    // The server runs one request and keeps none waiting: it answers only if the aborted one is gone.
    isText((await generateText({ model: small(MODEL), ...HELLO, maxRetries: 4 })).text);
  });

  test('a timeout ends a whole answer, and the server takes the next', async () => {
    const small = providerAt(smallURL);
    const request = { model: small(MODEL), prompt: LONG, maxTokens: 2000 };
    const error = await rejection(generateText({ ...request, abortSignal: AbortSignal.timeout(150) }));
    assert.match(error.name, /TimeoutError|AbortError/);
    isText((await generateText({ model: small(MODEL), ...HELLO, maxRetries: 4 })).text);
  });
});
