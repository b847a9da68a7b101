// Guide: Advanced Configuration / Custom Headers and Authentication
// Expect: "API Request" and "API Response: 200", then the text.
// A header that is a function is not called: its text is sent, the same with every request.
import { createOpenAI } from '@ai-sdk/openai';
import { generateText } from 'ai';
import { MODEL } from './lib/ai-provider.mjs';

process.env.CUSTOM_TOKEN ||= process.env.VLLM_API_KEY;
process.env.ORG_ID ||= 'my-organization';

const vllm = createOpenAI({
  baseURL: process.env.VLLM_BASE_URL,
  apiKey: process.env.VLLM_API_KEY,
  compatibility: 'strict',
  headers: {
    Authorization: `Bearer ${process.env.CUSTOM_TOKEN}`,
    'X-Organization-Id': process.env.ORG_ID,
    'X-Request-Id': () => crypto.randomUUID(), // Dynamic header
  },
  fetch: async (url, options) => {
    // Custom fetch implementation for monitoring
    console.log('API Request:', url);
    const response = await fetch(url, options);
    console.log('API Response:', response.status);
    return response;
  },
});

const { text } = await generateText({ model: vllm(MODEL), prompt: 'Say hello.', maxTokens: 16 });
console.log(text);
