// Guide: Monitoring and Observability / Request Logging
// Expect: what was asked and what came back, with the time it took, then the text.
import { createOpenAI } from '@ai-sdk/openai';
import { generateText } from 'ai';
import { MODEL } from './lib/ai-provider.mjs';

const vllmWithLogging = createOpenAI({
  baseURL: process.env.VLLM_BASE_URL,
  apiKey: process.env.VLLM_API_KEY,
  fetch: async (url, options) => {
    const startTime = Date.now();
    const requestId = crypto.randomUUID();

    console.log('vLLM Request:', {
      requestId,
      url,
      method: options?.method,
      timestamp: new Date().toISOString(),
    });

    try {
      const response = await fetch(url, options);
      const duration = Date.now() - startTime;

      console.log('vLLM Response:', {
        requestId,
        status: response.status,
        duration: `${duration}ms`,
        headers: Object.fromEntries(response.headers.entries()),
      });

      return response;
    } catch (error) {
      console.error('vLLM Error:', {
        requestId,
        error: error.message,
        duration: `${Date.now() - startTime}ms`,
      });
      throw error;
    }
  },
});

const { text } = await generateText({ model: vllmWithLogging(MODEL), prompt: 'Say hello.', maxOutputTokens: 16 });
console.log(text);
