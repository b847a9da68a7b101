// A provider that sends whatever a call has under providerOptions.vllm: the way to vLLM's own parameters.
// @ai-sdk/openai drops every option that OpenAI's API does not have, without a word.
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { MODEL } from '../../shared/environment.mjs';

export { MODEL };

export const vllm = createOpenAICompatible({
  name: 'vllm',
  baseURL: process.env.VLLM_BASE_URL,
  apiKey: process.env.VLLM_API_KEY,
  includeUsage: true,
  supportsStructuredOutputs: true,
});
