// What an error of the SDK means, in one word, and whether it helps to ask again.
import { APICallError, RetryError } from 'ai';

const KINDS = { 400: 'refused', 401: 'key', 404: 'unknown', 413: 'refused', 429: 'full', 503: 'unavailable' };

// { kind, again, status, message, attempts }
export function explain(error) {
  if (RetryError.isInstance(error)) {
    // lastError, not cause: the SDK leaves cause empty.
    return { ...explain(error.lastError), attempts: error.errors.length };
  }
  if (error.name === 'TimeoutError') return { kind: 'timeout', again: true, message: error.message };
  if (error.name === 'AbortError') return { kind: 'aborted', again: false, message: error.message };
  if (APICallError.isInstance(error)) {
    const { statusCode: status, isRetryable: again, message } = error;
    if (status === undefined) return { kind: 'unreachable', again, message };
    if (status === 200) return { kind: 'cut', again, message }; // the headers came, the rest did not
    return { kind: KINDS[status] ?? (status >= 500 ? 'server' : 'refused'), again, status, message };
  }
  return { kind: 'other', again: false, message: error.message };
}
