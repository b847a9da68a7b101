// Guide: Production Best Practices / 2. Caching Responses
// Expect: "Cache hit", and the same answer twice.
// The key leaves the prompt out: ask with messages, or two prompts share an answer. ../client/caching.mjs.
import crypto from 'node:crypto';
import { generateText } from 'ai';
import { LRUCache } from 'lru-cache';
import { MODEL, vllm } from './lib/ai-provider.mjs';

class CachedVLLMClient {
  cache;

  constructor() {
    this.cache = new LRUCache({
      max: 500, // Maximum cache entries
      ttl: 1000 * 60 * 60, // 1 hour TTL
      updateAgeOnGet: true,
    });
  }

  getCacheKey(params) {
    const normalized = {
      model: params.model,
      messages: params.messages,
      temperature: params.temperature,
      maxTokens: params.maxTokens,
    };
    return crypto.createHash('sha256').update(JSON.stringify(normalized)).digest('hex');
  }

  async generateText(params) {
    const cacheKey = this.getCacheKey(params);

    // Check cache
    const cached = this.cache.get(cacheKey);
    if (cached) {
      console.log('Cache hit');
      return cached;
    }

    // Generate new response
    const result = await generateText({
      ...params,
      model: vllm(params.model),
    });

    // Cache the result
    this.cache.set(cacheKey, result.text);

    return result.text;
  }
}

const client = new CachedVLLMClient();
const request = { model: MODEL, messages: [{ role: 'user', content: 'Say hello.' }], temperature: 1, maxTokens: 16 };
console.log(await client.generateText(request));
console.log(await client.generateText(request));
