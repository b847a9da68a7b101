// Guide: Performance Optimization Tips / 2. Optimize Client Configuration
// Expect: a text, whose response came compressed.
import { createOpenAI } from '@ai-sdk/openai';
import { generateText } from 'ai';
import { MODEL } from './lib/ai-provider.mjs';

const optimizedVLLM = createOpenAI({
  baseURL: process.env.VLLM_BASE_URL,
  apiKey: process.env.VLLM_API_KEY,
  // Add keep-alive for connection reuse
  fetch: (url, options) => {
    return fetch(url, {
      ...options,
      keepalive: true,
      // Add compression
      headers: {
        ...options?.headers,
        'Accept-Encoding': 'gzip, deflate',
      },
    });
  },
});

const { text } = await generateText({ model: optimizedVLLM(MODEL), prompt: 'Say hello.', maxOutputTokens: 64 });
console.log('Text:', text);
