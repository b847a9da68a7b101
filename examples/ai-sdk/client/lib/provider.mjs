// The server of ../../README.md through a fetch of one's own. Asking again is that fetch's affair: maxRetries is 0.
import { createOpenAI } from '@ai-sdk/openai';
import { generateText } from 'ai';
import { MODEL } from '../../shared/environment.mjs';

export { MODEL };
export const baseURLs = (process.env.VLLM_BASE_URLS || process.env.VLLM_BASE_URL).split(',');

export const providerWith = (fetch, settings = {}) =>
  createOpenAI({ baseURL: baseURLs[0], apiKey: process.env.VLLM_API_KEY, name: 'vllm', fetch, ...settings });

// A short answer.
export async function ask(provider, prompt, settings = {}) {
  const { text } = await generateText({
    model: provider.chat(MODEL),
    prompt,
    maxOutputTokens: 8,
    maxRetries: 0,
    ...settings,
  });
  return text;
}
