// Guide: Production Best Practices / 3. Rate Limiting
// Expect: three answers, one right after another. fireImmediately makes removeTokens return at once, with a negative
// number when the rate is exceeded, and the guide does not look at it. One that waits: ../client/rate-limiting.mjs.
import { generateText } from 'ai';
import { RateLimiter } from 'limiter';
import { MODEL, vllm } from './lib/ai-provider.mjs';

class RateLimitedVLLMClient {
  limiter;

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

const client = new RateLimitedVLLMClient(2);
const started = Date.now();
for (let i = 1; i <= 3; i++) {
  const { text } = await client.generateText({ model: MODEL, prompt: 'Say hello.', maxTokens: 8 });
  console.log(`${((Date.now() - started) / 1000).toFixed(1)} s:`, text);
}
