// A fetch that remembers whole answers. The key is the whole body, so everything that can change an answer is in it.
//
// Two who ask the same at the same time share one request. Streams and refusals are not kept. What was drawn at random
// is kept, too: whoever wants another answer changes the seed or does without this.
import { createHash } from 'node:crypto';

export function cached({ max = 500, ttlMs = 3_600_000, inner = fetch } = {}) {
  const entries = new Map(); // key -> { answer: a promise, until }, the one used longest ago first

  async function ask(url, options) {
    const response = await inner(url, options);
    return { text: await response.text(), status: response.status, headers: new Headers(response.headers) };
  }

  return async (url, options) => {
    if (options?.body === undefined || JSON.parse(options.body).stream) return inner(url, options);
    const key = createHash('sha256').update(`${url}\n${options.body}`).digest('hex');
    let entry = entries.get(key);
    entries.delete(key);
    const isHit = entry !== undefined && entry.until > Date.now();
    if (!isHit) entry = { answer: ask(url, options), until: Date.now() + ttlMs };
    entries.set(key, entry);
    if (entries.size > max) entries.delete(entries.keys().next().value);
    const forget = () => entries.get(key) === entry && entries.delete(key);
    try {
      const { text, status, headers } = await entry.answer;
      if (status !== 200) forget();
      const response = new Response(text, { status, headers });
      response.headers.set('X-Cache', isHit ? 'hit' : 'miss');
      return response;
    } catch (error) {
      forget();
      throw error;
    }
  };
}
