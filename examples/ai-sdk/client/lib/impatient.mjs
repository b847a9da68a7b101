// A fetch that gives up on a server that has gone quiet: no headers for a while, or no piece of a body for a while.
//
// A limit for the whole answer is the SDK's abortSignal: AbortSignal.timeout(ms). It cuts a long answer that is doing
// well; these two do not. A whole answer has its headers when it is done, so firstMs is its limit.
import { watched } from './body.mjs';

export function impatient({ firstMs = 60_000, idleMs = 15_000, inner = fetch } = {}) {
  return async (url, options) => {
    const quiet = new AbortController();
    const giveUp = (what, ms) => () => quiet.abort(new DOMException(`${what} for ${ms} ms`, 'TimeoutError'));
    let timer = setTimeout(giveUp('no answer', firstMs), firstMs);
    const waitForMore = () => {
      clearTimeout(timer);
      timer = setTimeout(giveUp('not a word', idleMs), idleMs);
    };
    const signal = options?.signal ? AbortSignal.any([options.signal, quiet.signal]) : quiet.signal;
    try {
      const response = await inner(url, { ...options, signal });
      waitForMore();
      return watched(response, { onChunk: waitForMore, onEnd: () => clearTimeout(timer) });
    } catch (error) {
      clearTimeout(timer);
      throw error;
    }
  };
}
