// Every kind of error on purpose, and what it means: lib/explain.mjs.
// Expect: a line for each. Full is only a server that takes no second request:
//
//   minivllm serve --api-key your-vllm-api-key --max-num-seqs 1 --max-queue 0
import { streamText } from 'ai';
import { explain } from './lib/explain.mjs';
import { ask, MODEL, providerWith } from './lib/provider.mjs';
import { retrying } from './lib/retrying.mjs';

const provider = providerWith(fetch);
const patient = providerWith(retrying()); // the case before may not have left the server yet
const story = 'Write a long story about a lighthouse.';
const CASES = {
  'a wrong key': () => ask(providerWith(fetch, { apiKey: 'wrong' }), 'Hello'),
  'an unknown model': () => ask(provider, 'Hello', { model: provider.chat('no-such-model') }),
  'a bad value': () => ask(provider, 'Hello', { temperature: 9 }),
  'a prompt that is too long': () => ask(provider, 'word '.repeat(20_000)),
  'nobody there': () => ask(providerWith(fetch, { baseURL: 'http://127.0.0.1:2/v1' }), 'Hello'),
  'nobody there, asked twice': () =>
    ask(providerWith(fetch, { baseURL: 'http://127.0.0.1:2/v1' }), 'Hello', { maxRetries: 1 }),
  'a limit': () => ask(provider, story, { maxOutputTokens: 400, abortSignal: AbortSignal.timeout(300) }),
  'a change of mind': () => {
    const stop = new AbortController();
    setTimeout(() => stop.abort(), 300);
    return ask(patient, story, { maxOutputTokens: 400, abortSignal: stop.signal });
  },
  'a full server': async () => {
    const stop = new AbortController();
    const first = streamText({ model: patient.chat(MODEL), prompt: story, abortSignal: stop.signal });
    const words = first.textStream[Symbol.asyncIterator]();
    await words.next(); // it runs
    try {
      return await ask(provider, 'Hello');
    } finally {
      stop.abort();
    }
  },
};

for (const [name, run] of Object.entries(CASES)) {
  console.log(JSON.stringify({ case: name, ...(await run().then((text) => ({ kind: 'none', text }), explain)) }));
}
