// Guide: Basic Integration / 2. Configuration
// Its lib/ai-provider.ts; the address, the key and the model come from the environment, as in its .env.local.
import { createOpenAI } from '@ai-sdk/openai';
import { MODEL } from '../../shared/environment.mjs';

export { MODEL };

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

// Create model instances
export const llama3Chat = vllm.chat(MODEL);
export const llama3Completion = vllm.completion(MODEL);
