// Guide: Performance Optimization Tips / 3. Batch Processing
// Expect: four texts.
import { generateText } from 'ai';
import { MODEL, vllm } from './lib/ai-provider.mjs';

async function batchGenerate(prompts) {
  // vLLM handles batching internally for better throughput
  const results = await Promise.all(
    prompts.map((prompt) =>
      generateText({
        model: vllm(MODEL),
        prompt,
        temperature: 0.7,
      })
    )
  );

  return results.map((r) => r.text);
}

const texts = await batchGenerate(['Name a fruit.', 'Name a bird.', 'Name a tree.', 'Name a fish.']);
texts.forEach((text, index) => console.log(`${index + 1}:`, text));
