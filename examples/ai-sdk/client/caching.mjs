// Does not ask twice what it knows.
// Expect: six calls, and three requests: two prompts, and one more setting. The guide's cache leaves the prompt out of
// its key, and whoever asks with `prompt` gets the first answer to everything.
import { cached } from './lib/cached.mjs';
import { ask, providerWith } from './lib/provider.mjs';

let requests = 0;
const counting = (url, options) => {
  requests += 1;
  return fetch(url, options);
};
const provider = providerWith(cached({ inner: counting }));

const [first, shared] = await Promise.all([ask(provider, 'Name a fruit.'), ask(provider, 'Name a fruit.')]);
const again = await ask(provider, 'Name a fruit.');
const other = await ask(provider, 'Name a bird.');
const otherAgain = await ask(provider, 'Name a bird.');
const longer = await ask(provider, 'Name a bird.', { maxOutputTokens: 9 });
console.log(JSON.stringify({ calls: 6, requests, first, shared, again, other, otherAgain, longer }));
