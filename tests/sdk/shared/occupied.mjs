// Keeps a server that runs one request at a time busy with an answer of so many tokens, while `meanwhile` takes place.
import { until } from './checks.mjs';

export async function whileOccupied(url, model, tokens, meanwhile) {
  const gone = new AbortController();
  let response;
  const isTaken = async () => {
    response = await fetch(`${url}/completions`, {
      method: 'POST',
      headers: { 'Content-Type': 'application/json' },
      body: JSON.stringify({ model, prompt: 'One, two,', max_tokens: tokens, ignore_eos: true, stream: true }),
      signal: gone.signal,
    });
    return response.status !== 429; // the one that left a moment ago may not be gone yet
  };
  await until(isTaken, 'the server to take a request');
  if (!response.ok) throw new Error(`the server would not be occupied: ${response.status} ${await response.text()}`);
  try {
    const reader = response.body.getReader();
    await reader.read(); // it runs
    return await meanwhile(() => rest(reader));
  } finally {
    gone.abort();
  }
}

// What is still to come, to the end.
async function rest(reader) {
  const decoder = new TextDecoder();
  let text = '';
  for (let next = await reader.read(); !next.done; next = await reader.read()) {
    text += decoder.decode(next.value, { stream: true });
  }
  return text;
}
