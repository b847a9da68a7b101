// node --import watch.mjs SCRIPT: writes every request of the script that was answered or failed to the file WATCH_FILE,
// one JSON object a line. The script itself knows nothing of it.
import { appendFileSync } from 'node:fs';

const plainFetch = globalThis.fetch;

globalThis.fetch = async (url, options) => {
  const call = { path: new URL(url).pathname, body: options?.body, startedMs: Date.now() };
  try {
    const response = await plainFetch(url, options);
    call.status = response.status;
    return response;
  } finally {
    call.endedMs = Date.now();
    appendFileSync(process.env.WATCH_FILE, `${JSON.stringify(call)}\n`);
  }
};
