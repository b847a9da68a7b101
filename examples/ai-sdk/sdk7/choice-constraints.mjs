// Guide: Guided Generation with vLLM / Choice Constraints
// Expect: positive, negative or neutral.
import { generateText } from 'ai';
import { MODEL, vllm } from './lib/openai-compatible.mjs';

async function choiceGeneration() {
  const result = await generateText({
    model: vllm(MODEL),
    prompt: 'What is the sentiment of this review: "Amazing product!"',
    providerOptions: {
      vllm: {
        guided_choice: ['positive', 'negative', 'neutral'],
      },
    },
  });

  console.log('Sentiment:', result.text);
}

await choiceGeneration();
