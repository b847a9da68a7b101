// Three limits: for a whole answer, for its first word, and for the time between two words.
// Expect: "timeout" for a long answer that must be there in half a second; then a stream, which goes on to its end
// unless the server goes quiet: stop it meanwhile (kill -STOP) and the stream is given up after IDLE_MS; kill it and
// the stream is cut.
import { streamText } from 'ai';
import { explain } from './lib/explain.mjs';
import { impatient } from './lib/impatient.mjs';
import { ask, MODEL, providerWith } from './lib/provider.mjs';

const idleMs = Number(process.env.IDLE_MS || 15_000);
const provider = providerWith(impatient({ firstMs: 60_000, idleMs }));
const long = { prompt: 'Write a long story about a lighthouse.', maxOutputTokens: 400 };

const whole = ask(provider, long.prompt, { ...long, abortSignal: AbortSignal.timeout(500) });
console.log('whole', JSON.stringify(await whole.then((text) => ({ text }), explain)));

let failure;
const onError = ({ error }) => (failure = error);
const result = streamText({ model: provider.chat(MODEL), ...long, maxRetries: 0, onError });
try {
  for await (const word of result.textStream) console.log('word', JSON.stringify(word));
} catch (error) {
  failure ??= error;
}
console.log('stream', JSON.stringify(failure ? explain(failure) : { kind: 'whole' }));
