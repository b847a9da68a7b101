// Guide: Error Handling and Retries / Custom Retry Logic
// Expect: two models fail, for this server has only one; the last one answers.
import { createOpenAI } from '@ai-sdk/openai';
import { generateText } from 'ai';
import { MODEL } from './lib/ai-provider.mjs';

class VLLMClient {
  baseURL;
  maxRetries;

  constructor(baseURL, maxRetries = 3) {
    this.baseURL = baseURL;
    this.maxRetries = maxRetries;
  }

  async generateWithFallback(prompt, models) {
    for (const model of models) {
      try {
        const provider = createOpenAI({
          baseURL: this.baseURL,
          apiKey: process.env.VLLM_API_KEY,
          compatibility: 'strict',
        });

        const result = await generateText({
          model: provider(model),
          prompt,
          maxRetries: this.maxRetries,
        });

        return result.text;
      } catch (error) {
        console.log(`Model ${model} failed, trying next...`);
        continue;
      }
    }

    throw new Error('All models failed');
  }
}

// Usage
const client = new VLLMClient(process.env.VLLM_BASE_URL);
const text = await client.generateWithFallback('Hello, world!', [
  'meta-llama/Meta-Llama-3-8B-Instruct',
  'mistralai/Mistral-7B-Instruct-v0.2',
  MODEL,
]);
console.log('Text:', text);
