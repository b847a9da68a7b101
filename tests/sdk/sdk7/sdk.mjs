// Generation 7 of the SDK as the sections in ../shared/migrated take it: its packages, and where it differs from the
// others.
import { createOpenAI } from '@ai-sdk/openai';

export * from 'ai';
export { createOpenAI };
export { createOpenAICompatible } from '@ai-sdk/openai-compatible';
export { useChat, useCompletion } from '@ai-sdk/react';
export { RateLimiter } from 'limiter';
export { LRUCache } from 'lru-cache';
export * as react from 'react';
export { renderToStaticMarkup } from 'react-dom/server';
export * as testRenderer from 'react-test-renderer';
export { z } from 'zod';

export const generation = 7;

// The guide's lib/ai-provider.ts, without `compatibility`, which this generation no longer has.
export const vllm = createOpenAI({
  baseURL: process.env.VLLM_BASE_URL || 'http://localhost:8000/v1',
  apiKey: process.env.VLLM_API_KEY || 'vllm-api-key',
  name: 'vllm', // Optional: changes provider name in responses
  headers: {
    'X-Custom-Header': 'value', // Optional custom headers
  },
});
export const MODEL = process.env.VLLM_MODEL;

// A server that runs one request at a time: two answers are compared there, for company changes the last bits.
export const alone = createOpenAI({ baseURL: process.env.VLLM_SMALL_URL, apiKey: 'none', name: 'vllm' });

// What the guide writes as a message of the role system.
export const instructed = (text) => ({ instructions: text });
