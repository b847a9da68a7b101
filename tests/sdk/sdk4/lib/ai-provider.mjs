// The guide's lib/ai-provider.ts; the model's name comes from the environment, as in its .env.local.
import { createOpenAI } from '@ai-sdk/openai';

// Create vLLM provider instance
export const vllm = createOpenAI({
  baseURL: process.env.VLLM_BASE_URL || 'http://localhost:8000/v1',
  apiKey: process.env.VLLM_API_KEY || 'vllm-api-key',
  compatibility: 'strict', // Important for full compatibility
  name: 'vllm', // Optional: changes provider name in responses
  headers: {
    'X-Custom-Header': 'value', // Optional custom headers
  },
});

export const MODEL = process.env.VLLM_MODEL;

// A server that runs one request at a time: two answers are compared there, for company changes the last bits.
export const alone = createOpenAI({
  baseURL: process.env.VLLM_SMALL_URL,
  apiKey: 'none',
  compatibility: 'strict',
  name: 'vllm',
});

// Create model instances
export const llama3Chat = vllm.chat(MODEL);
export const llama3Completion = vllm.completion(MODEL);
