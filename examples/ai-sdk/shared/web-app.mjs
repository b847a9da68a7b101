// A web application as small as it gets: route handlers of the kind of app/api/chat/route.ts behind a real HTTP server,
// and the relative addresses of a page.
import http from 'node:http';
import { Readable } from 'node:stream';

async function answer(handler, incoming, outgoing) {
  const gone = new AbortController();
  outgoing.on('close', () => gone.abort());
  const body = Readable.toWeb(incoming);
  const options = { method: incoming.method, headers: incoming.headers, body, duplex: 'half', signal: gone.signal };
  const response = await handler(new Request(`http://app${incoming.url}`, options));
  outgoing.writeHead(response.status, Object.fromEntries(response.headers));
  for await (const chunk of response.body ?? []) outgoing.write(chunk);
  outgoing.end();
}

// Serves { '/api/chat': POST } while `visit` runs; meanwhile fetch('/api/chat') means that server, as in a page of it.
export async function withApp(routes, visit) {
  const server = http.createServer((incoming, outgoing) => {
    answer(routes[incoming.url], incoming, outgoing).catch((error) => outgoing.destroy(error));
  });
  await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));
  const origin = `http://127.0.0.1:${server.address().port}`;
  const plainFetch = globalThis.fetch;
  globalThis.fetch = (url, options) =>
    plainFetch(typeof url === 'string' && url.startsWith('/') ? origin + url : url, options);
  try {
    return await visit(origin);
  } finally {
    globalThis.fetch = plainFetch;
    server.closeAllConnections();
    await new Promise((resolve) => server.close(resolve));
  }
}
