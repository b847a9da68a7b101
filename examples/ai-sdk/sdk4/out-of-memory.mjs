// Guide: Troubleshooting / Common Issues and Solutions / 3. Out of Memory
// Expect: seven short texts, asked for five at a time.
import { createOpenAI } from '@ai-sdk/openai';
import { generateText } from 'ai';
import { MODEL } from './lib/ai-provider.mjs';

// Problem: CUDA out of memory
// Solution: Reduce batch size or use smaller model

const vllmOptimized = createOpenAI({
  baseURL: process.env.VLLM_BASE_URL,
  apiKey: process.env.VLLM_API_KEY,
  compatibility: 'strict',
});

// Use smaller batches
async function generateWithReducedMemory(prompts) {
  const batchSize = 5; // Smaller batch size
  const results = [];

  for (let i = 0; i < prompts.length; i += batchSize) {
    const batch = prompts.slice(i, i + batchSize);
    const batchResults = await Promise.all(
      batch.map((prompt) =>
        generateText({
          model: vllmOptimized(MODEL),
          prompt,
          maxTokens: 100, // Limit token generation
        })
      )
    );
    results.push(...batchResults);
  }

  return results;
}

const prompts = ['one', 'two', 'three', 'four', 'five', 'six', 'seven'].map((word) => `Use "${word}" in a sentence.`);
const results = await generateWithReducedMemory(prompts);
results.forEach((result, index) => console.log(`${index + 1}:`, result.text));
