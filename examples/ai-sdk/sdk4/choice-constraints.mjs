// Guide: Guided Generation with vLLM / Choice Constraints
// Expect: positive, negative or neutral.
import { generateText } from 'ai';
import { MODEL } from './lib/ai-provider.mjs';
import { vllm } from './lib/passing-options.mjs';

async function choiceGeneration() {
  const result = await generateText({
    model: vllm(MODEL),
    prompt: 'What is the sentiment of this review: "Amazing product!"',
    providerOptions: {
      openai: {
        guided_choice: ['positive', 'negative', 'neutral'],
      },
    },
  });

  console.log('Sentiment:', result.text);
}

await choiceGeneration();
