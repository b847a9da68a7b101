// Guide: Text Generation Examples / Basic Text Generation
// Expect: the text, its token usage, and how it ended: stop or length.
import { generateText } from 'ai';
import { MODEL, vllm } from './lib/ai-provider.mjs';

async function basicGeneration() {
  const { text, usage, finishReason } = await generateText({
    model: vllm(MODEL),
    prompt: 'Explain quantum computing in simple terms.',
    temperature: 0.7,
    maxOutputTokens: 500,
  });

  console.log('Generated text:', text);
  console.log('Token usage:', usage);
  console.log('Finish reason:', finishReason);
}

await basicGeneration();
