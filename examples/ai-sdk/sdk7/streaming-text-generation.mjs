// Guide: Text Generation Examples / Streaming Text Generation
// Expect: a story, word by word, then its token usage.
import { streamText } from 'ai';
import { MODEL, vllm } from './lib/ai-provider.mjs';

async function streamGeneration() {
  const result = streamText({
    model: vllm(MODEL),
    instructions: 'You are a helpful assistant.',
    messages: [
      {
        role: 'user',
        content: 'Write a story about a robot learning to paint.',
      },
    ],
    temperature: 0.8,
    maxOutputTokens: 1000,
  });

  // Stream the response
  for await (const chunk of result.textStream) {
    process.stdout.write(chunk);
  }

  // Get final usage stats
  const usage = await result.usage;
  console.log('\nToken usage:', usage);
}

await streamGeneration();
