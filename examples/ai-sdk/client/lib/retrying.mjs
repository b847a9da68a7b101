// A fetch that asks again where that may help, and waits as long as the server says.
//
// Give the SDK maxRetries: 0 beside it. Its own retries are as good from generation 5 on; 3 and 4 ignore Retry-After.
// A request is asked again until its headers are there; what breaks later, in the middle of a stream, is the caller's.
import { setTimeout as sleep } from 'node:timers/promises';

const RETRYABLE = new Set([408, 409, 429, 500, 502, 503, 504]);

// Milliseconds until the next attempt, counted from 1: the server's word, or longer each time, with some chance in it,
// or clients who were refused together would come back together.
export function waitOf(response, attempt, longestMs = 60_000) {
  const milliseconds = Number(response?.headers.get('retry-after-ms') ?? NaN);
  if (milliseconds >= 0) return Math.min(milliseconds, longestMs);
  const after = response?.headers.get('retry-after');
  const said =
    after == null ? NaN : Number.isNaN(Number(after)) ? Date.parse(after) - Date.now() : Number(after) * 1000;
  if (said >= 0) return Math.min(said, longestMs);
  return Math.min(500 * 2 ** (attempt - 1), longestMs) * (0.5 + Math.random() / 2);
}

// onRetry gets { attempt, status, waitMs }; the status is undefined where nobody answered.
export function retrying({ attempts = 5, longestMs = 60_000, onRetry = () => {}, inner = fetch } = {}) {
  return async (url, options) => {
    for (let attempt = 1; ; attempt++) {
      let response;
      let failure;
      try {
        response = await inner(url, options);
      } catch (error) {
        failure = error;
      }
      const isDone = response && !RETRYABLE.has(response.status);
      if (isDone || attempt === attempts || options?.signal?.aborted) {
        if (failure) throw failure;
        return response;
      }
      const waitMs = waitOf(response, attempt, longestMs);
      await response?.body?.cancel();
      onRetry({ attempt, status: response?.status, waitMs });
      await sleep(waitMs, undefined, { signal: options?.signal }).catch(() => {
        throw options.signal.reason; // who gave up, and why
      });
    }
  };
}
