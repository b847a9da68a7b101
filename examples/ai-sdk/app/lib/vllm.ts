// Where the model server is, and its two models: one that talks, one that continues a text. The guide's
// lib/ai-provider.ts, with the provider that speaks plain /chat/completions and /completions.
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';

export const baseURL = (process.env.VLLM_BASE_URL || 'http://localhost:8000/v1').replace(/\/$/, '');
export const headers: Record<string, string> = process.env.VLLM_API_KEY
  ? { Authorization: `Bearer ${process.env.VLLM_API_KEY}` }
  : {};

const settings = {
  name: 'vllm',
  baseURL,
  headers,
  includeUsage: true, // token counts, also of a stream
  supportsStructuredOutputs: true, // objects follow their schema, instead of being asked to
};

// VLLM_MODEL, or the first that the server lists.
async function modelName(): Promise<string> {
  if (process.env.VLLM_MODEL) return process.env.VLLM_MODEL;
  const response = await fetch(`${baseURL}/models`, { headers });
  const body = await response.json();
  if (!response.ok) throw new Error(body.error?.message ?? response.statusText);
  return body.data[0].id;
}

export const chatModel = async () => createOpenAICompatible(settings).chatModel(await modelName());

export const textModel = async () =>
  createOpenAICompatible({ ...settings, fetch: asTyped }).completionModel(await modelName());

// The SDK writes "user:\n...\n\nassistant:\n" around a prompt. A text that is to be continued goes out as it was typed.
const asTyped: typeof fetch = (url, init) => {
  const { stop, ...body } = JSON.parse(String(init?.body));
  body.prompt = body.prompt.replace(/^user:\n([\s\S]*)\n\nassistant:\n$/, '$1');
  return fetch(url, { ...init, body: JSON.stringify(body) });
};
