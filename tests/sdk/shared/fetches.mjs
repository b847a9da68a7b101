// Functions to give a provider as `fetch`.

// Keeps what was sent and what came; `calls` grows with every request.
export function recording(inner = fetch) {
  const calls = [];
  const recorder = async (url, options) => {
    const call = { url: String(url), body: options?.body ? JSON.parse(options.body) : undefined, options };
    calls.push(call);
    call.response = await inner(url, options);
    return call.response;
  };
  return Object.assign(recorder, { calls });
}

// Adds fields to the JSON body: the way to vLLM's own parameters that every generation and every API has.
export function adding(fields, inner = fetch) {
  return (url, options) => inner(url, { ...options, body: JSON.stringify({ ...JSON.parse(options.body), ...fields }) });
}
