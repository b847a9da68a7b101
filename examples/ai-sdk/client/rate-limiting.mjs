// Asks no faster than the server takes it.
// Expect: with `minivllm serve --max-num-seqs 1 --max-queue 1`: six answers and no refusal. With AT_ONCE=6 the server
// refuses most. PER_MINUTE=60 starts one request a second.
import { limited } from './lib/limited.mjs';
import { ask, providerWith } from './lib/provider.mjs';

const atOnce = Number(process.env.AT_ONCE || 1);
const perMinute = Number(process.env.PER_MINUTE || Infinity);
const provider = providerWith(limited({ atOnce, perMinute }));

const started = Date.now();
const calls = Array.from({ length: 6 }, (_, number) => ask(provider, `Say ${number}.`));
const outcomes = await Promise.allSettled(calls);
const refused = outcomes.filter((outcome) => outcome.reason?.statusCode === 429).length;
const answered = outcomes.filter((outcome) => outcome.status === 'fulfilled').length;
console.log(JSON.stringify({ answered, refused, seconds: (Date.now() - started) / 1000 }));
