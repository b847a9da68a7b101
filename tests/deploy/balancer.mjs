// The guide's load balancer, driven line by line: `check` asks every instance for its health, `ask N` has N texts
// generated. Every line is answered by one line of JSON. Packages are those of the folder SDK_FOLDER, generation 4.
import { createRequire } from 'node:module';
import readline from 'node:readline';

const require = createRequire(`${process.env.SDK_FOLDER}/package.json`);
const { createOpenAI } = require('@ai-sdk/openai');
const { generateText } = require('ai');

// The guide's but for two things: a provider has no baseURL of its own, so it is given one; and the health check can be
// called, where the guide has it in a timer of 30 s. (As it stands, every instance's health is that of "undefined".)
class VLLMLoadBalancer {
  constructor(urls) {
    this.currentIndex = 0;
    this.instances = urls.map((url) =>
      Object.assign(
        createOpenAI({
          baseURL: url,
          apiKey: process.env.VLLM_API_KEY,
          compatibility: 'strict',
        }),
        { baseURL: url }
      )
    );
    this.healthStatus = new Map(urls.map((url) => [url, true]));
  }

  async checkHealth() {
    for (let i = 0; i < this.instances.length; i++) {
      try {
        // Simple health check
        await fetch(`${this.instances[i].baseURL}/health`);
        this.healthStatus.set(this.instances[i].baseURL, true);
      } catch {
        this.healthStatus.set(this.instances[i].baseURL, false);
      }
    }
  }

  getNextInstance() {
    // Round-robin with health checking
    const startIndex = this.currentIndex;
    do {
      this.currentIndex = (this.currentIndex + 1) % this.instances.length;
      if (this.healthStatus.get(this.instances[this.currentIndex].baseURL)) {
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

const balancer = new VLLMLoadBalancer(process.argv.slice(2));
for await (const line of readline.createInterface({ input: process.stdin })) {
  const [command, count] = line.split(' ');
  let answer;
  try {
    if (command === 'check') {
      await balancer.checkHealth();
      answer = [...balancer.healthStatus.values()];
    } else {
      answer = [];
      for (let i = 0; i < Number(count); i++) {
        const params = { model: 'tiny', prompt: 'Hello', maxTokens: 4, maxRetries: 0 };
        answer.push((await balancer.generateText(params)).usage.completionTokens);
      }
    }
  } catch (error) {
    answer = `${error.message}`;
  }
  console.log(JSON.stringify(answer));
}
