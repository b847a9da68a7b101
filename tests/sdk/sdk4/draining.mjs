// The guide's `case 503`: a server that is told to end finishes what it runs and refuses the rest. The last section,
// for it ends the small server.
import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { createOpenAI } from '@ai-sdk/openai';
import { APICallError, generateText } from 'ai';
import { rejection, until } from '../shared/checks.mjs';
import { smallPid, smallURL } from '../shared/environment.mjs';
import { whileOccupied } from '../shared/occupied.mjs';
import { MODEL } from './lib/ai-provider.mjs';

const small = createOpenAI({ baseURL: smallURL, apiKey: 'none', compatibility: 'strict' });

describe('draining', () => {
  test('a draining server is a 503 with Retry-After, and finishes its work', async () => {
    await whileOccupied(smallURL, MODEL, 24, async (rest) => {
      process.kill(smallPid, 'SIGTERM');
      const ask = () => generateText({ model: small(MODEL), prompt: 'Hello', maxRetries: 0 });
      let error;
      const isDraining = async () => (error = await rejection(ask())).statusCode !== 429; // it is full at first
      await until(isDraining, 'the server to drain');
      assert.ok(APICallError.isInstance(error), `${error}`);
      assert.equal(error.statusCode, 503);
      assert.equal(error.isRetryable, true);
      assert.ok(Number(error.responseHeaders['retry-after']) >= 1);
      const text = await rest();
      assert.match(text, /"finish_reason":"length"/);
      assert.ok(text.trim().endsWith('data: [DONE]'));
    });
  });
});
