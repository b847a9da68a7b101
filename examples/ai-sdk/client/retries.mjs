// Asks a busy server again and again, as late as its Retry-After says.
// Expect: with `minivllm serve --max-num-seqs 1 --max-queue 0`, which runs one request and keeps none waiting: a line
// for each wait, and an answer to every call. A server that is told to end answers 503, then is not there; started
// again in time, it answers the rest.
import { ask, providerWith } from './lib/provider.mjs';
import { retrying } from './lib/retrying.mjs';

const onRetry = (wait) => console.log('wait', JSON.stringify(wait));
const provider = providerWith(retrying({ attempts: Number(process.env.ATTEMPTS || 12), onRetry }));

const calls = ['one', 'two', 'three', 'four'].map(async (word) => {
  console.log('answer', JSON.stringify({ word, text: await ask(provider, `Say ${word}.`) }));
});
await Promise.all(calls);
