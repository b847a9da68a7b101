// Guide: Production Best Practices / 4. Environment-Specific Configuration
// Expect: which settings NODE_ENV chooses, and an answer with them.
// Development is the server of ../README.md; the guide has another address, key and model there.
import { createOpenAI } from '@ai-sdk/openai';
import { generateText } from 'ai';
import { MODEL } from './lib/ai-provider.mjs';

function getVLLMConfig() {
  const env = process.env.NODE_ENV;

  const configs = {
    development: {
      baseURL: process.env.VLLM_BASE_URL,
      apiKey: process.env.VLLM_API_KEY,
      model: MODEL,
      maxRetries: 3,
      timeout: 30000,
    },
    staging: {
      baseURL: process.env.STAGING_VLLM_URL,
      apiKey: process.env.STAGING_API_KEY,
      model: 'meta-llama/Meta-Llama-3-8B-Instruct',
      maxRetries: 5,
      timeout: 60000,
    },
    production: {
      baseURL: process.env.PROD_VLLM_URL,
      apiKey: process.env.PROD_API_KEY,
      model: 'meta-llama/Meta-Llama-3-70B-Instruct',
      maxRetries: 5,
      timeout: 120000,
    },
  };

  return configs[env] || configs.development;
}

const vllmConfig = getVLLMConfig();

const { baseURL, apiKey, model, maxRetries, timeout } = vllmConfig;
console.log('Settings:', { baseURL, model, maxRetries, timeout });
const provider = createOpenAI({ baseURL, apiKey });
const { text } = await generateText({
  model: provider(model),
  prompt: 'Say hello.',
  maxOutputTokens: 16,
  maxRetries,
  abortSignal: AbortSignal.timeout(timeout),
});
console.log('Text:', text);
