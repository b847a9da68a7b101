// What every route does with an error: say in plain words what is wrong and what helps.
import { APICallError, RetryError } from 'ai';
import { baseURL } from './vllm';

export function explain(error: unknown): string {
  if (RetryError.isInstance(error)) return explain(error.lastError);
  const status = APICallError.isInstance(error) ? error.statusCode : undefined;
  const message = error instanceof Error ? error.message : String(error);
  if (status === 401) return `${message} Is VLLM_API_KEY the server's key?`;
  if (status !== undefined) return `The model server answers ${status}: ${message}`;
  if (/fetch failed|cannot connect/i.test(message))
    return `No model server answers at ${baseURL}. Start one with \`minivllm serve\`, then try again.`;
  return message;
}

// A route whose errors before the first byte become a plain 502.
export function route(handle: (request: Request) => Promise<Response>) {
  return async (request: Request) => {
    try {
      return await handle(request);
    } catch (error) {
      return new Response(explain(error), { status: 502 });
    }
  };
}

// What all calls have in common. The errors go to the page, so nobody need log them.
export const common = (request: Request) => ({
  abortSignal: request.signal, // Stop in the browser ends the work of the model server
  maxRetries: 1, // the SDK waits as long as Retry-After says
  onError() {},
});
