// The guide's "Production Best Practices": load balancing, caching, rate limiting, configuration by environment.
import assert from 'node:assert/strict';
import crypto from 'node:crypto';
import { describe, test } from 'node:test';
import { isText } from '../checks.mjs';
import { apiKey, baseURL, deadURL, root, smallURL } from '../environment.mjs';
import { recording } from '../fetches.mjs';

export default function bestPractices({ createOpenAI, generateText, LRUCache, MODEL, RateLimiter, vllm }) {
  // The guide's, but that it keeps the addresses itself (a provider has no baseURL) and checks when told.
  class VLLMLoadBalancer {
    constructor(urls, options = {}) {
      this.urls = urls;
      this.instances = urls.map((url) =>
        createOpenAI({
          baseURL: url,
          apiKey: process.env.VLLM_API_KEY,
          ...options,
        })
      );
      this.currentIndex = 0;
      this.healthStatus = new Map(urls.map((url) => [url, true]));
    }

    async checkHealth() {
      for (let i = 0; i < this.instances.length; i++) {
        try {
          // Simple health check
          const response = await fetch(`${this.urls[i]}/health`);
          this.healthStatus.set(this.urls[i], response.ok);
        } catch {
          this.healthStatus.set(this.urls[i], false);
        }
      }
    }

    getNextInstance() {
      // Round-robin with health checking
      const startIndex = this.currentIndex;
      do {
        this.currentIndex = (this.currentIndex + 1) % this.instances.length;
        if (this.healthStatus.get(this.urls[this.currentIndex])) {
          return this.instances[this.currentIndex];
        }
      } while (this.currentIndex !== startIndex);

      throw new Error('No healthy vLLM instances available');
    }

    async generateText(params) {
      const instance = this.getNextInstance();
      return generateText({
        ...params,
        model: instance(params.model),
      });
    }
  }

  class CachedVLLMClient {
    constructor() {
      this.cache = new LRUCache({
        max: 500, // Maximum cache entries
        ttl: 1000 * 60 * 60, // 1 hour TTL
        updateAgeOnGet: true,
      });
      this.hits = 0;
    }

    getCacheKey(params) {
      const normalized = {
        model: params.model,
        messages: params.messages,
        temperature: params.temperature,
        maxOutputTokens: params.maxOutputTokens,
      };
      return crypto.createHash('sha256').update(JSON.stringify(normalized)).digest('hex');
    }

    async generateText(params) {
      const cacheKey = this.getCacheKey(params);

      // Check cache
      const cached = this.cache.get(cacheKey);
      if (cached) {
        this.hits += 1;
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

  class RateLimitedVLLMClient {
    constructor(requestsPerMinute = 60) {
      this.limiter = new RateLimiter({
        tokensPerInterval: requestsPerMinute,
        interval: 'minute',
        fireImmediately: true,
      });
    }

    async generateText(params) {
      // Wait for rate limit token
      await this.limiter.removeTokens(1);

      return generateText({
        ...params,
        model: vllm(params.model),
      });
    }
  }

  function getVLLMConfig() {
    const env = process.env.NODE_ENV;

    const configs = {
      development: {
        baseURL: 'http://localhost:8000/v1',
        apiKey: 'dev-key',
        model: 'TinyLlama/TinyLlama-1.1B-Chat-v1.0',
        maxRetries: 3,
        timeout: 30000,
      },
      staging: {
        baseURL: process.env.STAGING_VLLM_URL,
        apiKey: process.env.STAGING_API_KEY,
        model: MODEL,
        maxRetries: 5,
        timeout: 60000,
      },
      production: {
        baseURL: process.env.PROD_VLLM_URL,
        apiKey: process.env.PROD_API_KEY,
        model: MODEL,
        maxRetries: 5,
        timeout: 120000,
      },
    };

    return configs[env] || configs.development;
  }

  const SHORT = { model: MODEL, prompt: 'Hello', maxOutputTokens: 4 };

  describe('best practices', () => {
    test('three instances take turns', async () => {
      const sent = recording();
      const urls = [baseURL, baseURL.replace('127.0.0.1', 'localhost'), `${baseURL}/`];
      const balancer = new VLLMLoadBalancer(urls, { fetch: sent });
      await balancer.checkHealth();
      assert.deepEqual([...balancer.healthStatus.values()], [true, true, true]);
      for (let i = 0; i < 3; i++) isText((await balancer.generateText(SHORT)).text);
      const hosts = sent.calls.map((call) => new URL(call.url).hostname).sort();
      assert.deepEqual(hosts, ['127.0.0.1', '127.0.0.1', 'localhost']);
    });

    test('a dead instance is left out', async () => {
      const balancer = new VLLMLoadBalancer([deadURL, baseURL, smallURL]);
      await balancer.checkHealth();
      assert.deepEqual([...balancer.healthStatus.values()], [false, true, true]);
      for (let i = 0; i < 3; i++) isText((await balancer.generateText(SHORT)).text);
    });

    test('no healthy instance', async () => {
      const balancer = new VLLMLoadBalancer([deadURL]);
      await balancer.checkHealth();
      await assert.rejects(balancer.generateText(SHORT), /No healthy vLLM instances available/);
    });

    test('health under every address that the guide uses', async () => {
      for (const path of ['/health', '/v1/health', '/ping', '/v1//health/']) {
        assert.equal((await fetch(root(baseURL) + path)).status, 200, path);
      }
    });

    test('a cached answer is not asked for twice', async () => {
      const client = new CachedVLLMClient();
      const request = {
        model: MODEL,
        messages: [{ role: 'user', content: 'Hello' }],
        temperature: 1,
        maxOutputTokens: 8,
      };
      const first = await client.generateText(request);
      isText(first);
      assert.equal(await client.generateText(request), first);
      assert.equal(client.hits, 1);
      await client.generateText({ ...request, maxOutputTokens: 4 });
      assert.equal(client.hits, 1);
    });

    test('a limited rate lets requests through', async () => {
      const client = new RateLimitedVLLMClient(60);
      const results = await Promise.all([client.generateText(SHORT), client.generateText(SHORT)]);
      results.forEach((result) => isText(result.text));
    });

    test('configuration by environment', async () => {
      Object.assign(process.env, { NODE_ENV: 'production', PROD_VLLM_URL: baseURL, PROD_API_KEY: apiKey });
      const config = getVLLMConfig();
      const provider = createOpenAI({ baseURL: config.baseURL, apiKey: config.apiKey });
      const { text } = await generateText({
        ...SHORT,
        model: provider(config.model),
        maxRetries: config.maxRetries,
        abortSignal: AbortSignal.timeout(config.timeout),
      });
      isText(text);
      process.env.NODE_ENV = 'test';
      assert.equal(getVLLMConfig().apiKey, 'dev-key');
    });
  });
}
