// Guide: Monitoring and Observability / Metrics Collection
// Expect: the metrics of one answer, then its text.
import { generateText } from 'ai';
import { MODEL, vllm } from './lib/ai-provider.mjs';

async function generateWithMetrics(prompt, model) {
  const startTime = Date.now();

  const result = await generateText({
    model: vllm(model),
    prompt,
    temperature: 0.7,
  });

  const latency = Date.now() - startTime;
  const tokensPerSecond = result.usage.completionTokens / (latency / 1000);

  const metrics = {
    promptTokens: result.usage.promptTokens,
    completionTokens: result.usage.completionTokens,
    totalTokens: result.usage.totalTokens,
    latency,
    tokensPerSecond,
    model,
    temperature: 0.7,
  };

  // Send to monitoring service
  await sendMetrics(metrics);

  return { text: result.text, metrics };
}

async function sendMetrics(metrics) {
  // Send to Prometheus, DataDog, etc.
  console.log('Metrics:', metrics);
}

const { text } = await generateWithMetrics('Name three colours.', MODEL);
console.log('Text:', text);
