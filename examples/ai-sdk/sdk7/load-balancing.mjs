// Guide: Production Best Practices / 1. Load Balancing Multiple vLLM Instances
// Expect: a line for each request: which instance it went to, and its answer or its error. When an instance is killed
// meanwhile, what is sent there fails until the next health check; they come every 30 seconds. Nothing is lost with
// ../client/load-balancing.mjs.
//
//   VLLM_BASE_URLS=http://vllm1:8000/v1,http://vllm2:8000/v1,http://vllm3:8000/v1 SECONDS=40 node load-balancing.mjs
import * as openai from '@ai-sdk/openai';
import { generateText } from 'ai';
import { MODEL } from './lib/ai-provider.mjs';

// Not in the guide, and all that its balancer lacks: it reads baseURL of its providers, which have none.
const createOpenAI = (settings) => Object.assign(openai.createOpenAI(settings), { baseURL: settings.baseURL });

class VLLMLoadBalancer {
  instances;
  currentIndex = 0;
  healthStatus;

  constructor(urls) {
    this.instances = urls.map((url) =>
      createOpenAI({
        baseURL: url,
        apiKey: process.env.VLLM_API_KEY,
      })
    );
    this.healthStatus = new Map(urls.map((url) => [url, true]));
    this.startHealthChecks();
  }

  startHealthChecks() {
    setInterval(async () => {
      for (let i = 0; i < this.instances.length; i++) {
        try {
          // Simple health check
          await fetch(`${this.instances[i].baseURL}/health`);
          this.healthStatus.set(this.instances[i].baseURL, true);
        } catch {
          this.healthStatus.set(this.instances[i].baseURL, false);
        }
      }
    }, 30000); // Check every 30 seconds
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

// Usage
const urls = (process.env.VLLM_BASE_URLS || process.env.VLLM_BASE_URL).split(',');
const balancer = new VLLMLoadBalancer(urls);

// Tells which instance is next; the guide's own method chooses.
const choose = balancer.getNextInstance.bind(balancer);
let chosen;
balancer.getNextInstance = () => (chosen = choose());

async function ask(number) {
  const answer = balancer.generateText({ model: MODEL, prompt: `Say ${number}.`, maxOutputTokens: 8 });
  const url = chosen.baseURL;
  try {
    const { text } = await answer;
    console.log(JSON.stringify({ number, url, text }));
  } catch (error) {
    console.log(JSON.stringify({ number, url, error: error.message }));
  }
}

// Two requests a second, whether or not the earlier ones have answers.
const requests = [];
for (let number = 1; number <= 2 * Number(process.env.SECONDS || 3); number++) {
  requests.push(ask(number));
  await new Promise((resolve) => setTimeout(resolve, 500));
}
await Promise.all(requests);
process.exit(); // the health checks would go on for ever
