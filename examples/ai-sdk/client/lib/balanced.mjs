// A fetch over several servers: to the one with the fewest requests, and on to the next where one fails or is full.
//
// A server that fails rests for a while, or as long as its Retry-After says; with every server at rest they are asked
// all the same. Until the headers of an answer are there nothing is lost: a whole answer survives the end of its
// server. A stream that has begun ends with it.
import { waitOf } from './retrying.mjs';
import { watched } from './body.mjs';

const NEXT_PLEASE = new Set([429, 502, 503, 504]);

// urls end as a provider's baseURL does; give the provider the first. onFailure gets { url, status } or { url, error }.
// An answer has a header X-Served-By with the server's url.
export function balanced(urls, { restMs = 5000, onFailure = () => {}, inner = fetch } = {}) {
  const servers = urls.map((url) => ({ url, running: 0, restsUntil: 0, lastUse: 0 }));
  let uses = 0;

  const inOrder = () => {
    const rests = (server) => Number(server.restsUntil > Date.now());
    return [...servers].sort((a, b) => rests(a) - rests(b) || a.running - b.running || a.lastUse - b.lastUse);
  };

  async function ask(server, path, options) {
    server.running += 1;
    server.lastUse = uses += 1;
    const onEnd = () => (server.running -= 1);
    try {
      return watched(await inner(server.url + path, options), { onEnd });
    } catch (error) {
      onEnd();
      throw error;
    }
  }

  return async (url, options) => {
    const path = String(url).slice(urls[0].length);
    let failure;
    for (const server of inOrder()) {
      await failure?.response?.body?.cancel();
      try {
        const response = await ask(server, path, options);
        if (!NEXT_PLEASE.has(response.status)) {
          response.headers.set('X-Served-By', server.url);
          return response;
        }
        server.restsUntil = Date.now() + waitOf(response, 1, restMs);
        failure = { response };
        onFailure({ url: server.url, status: response.status });
      } catch (error) {
        if (options?.signal?.aborted) throw error;
        server.restsUntil = Date.now() + restMs;
        failure = { error };
        onFailure({ url: server.url, error });
      }
    }
    if (failure.error) throw failure.error;
    return failure.response;
  };
}
