// A fetch that holds requests back: so many at once, so many a minute. A request counts until its body is read.
//
// Set `atOnce` to what the server takes, its --max-num-seqs and --max-queue together, and it never answers 429 to you
// alone.
import { setTimeout as sleep } from 'node:timers/promises';
import { watched } from './body.mjs';

export function limited({ atOnce = Infinity, perMinute = Infinity, inner = fetch } = {}) {
  const waiting = [];
  let running = 0;
  let nextStart = 0;

  async function enter() {
    if (running < atOnce) running += 1;
    else await new Promise((resolve) => waiting.push(resolve)); // whoever leaves hands on its place
    const start = Math.max(Date.now(), nextStart);
    nextStart = start + 60_000 / perMinute;
    await sleep(start - Date.now());
  }

  function leave() {
    const next = waiting.shift();
    if (next) next();
    else running -= 1;
  }

  return async (url, options) => {
    await enter();
    try {
      return watched(await inner(url, options), { onEnd: leave });
    } catch (error) {
      leave();
      throw error;
    }
  };
}
