// Guide: Guided Generation with vLLM / Regex Patterns
// Expect: a number like 555-123-4567.
import { generateText } from 'ai';
import { MODEL } from './lib/ai-provider.mjs';
import { vllm } from './lib/passing-options.mjs';

async function regexConstrainedGeneration() {
  const result = await generateText({
    model: vllm(MODEL),
    prompt: 'Generate a valid US phone number',
    providerOptions: {
      openai: {
        guided_regex: '^\\d{3}-\\d{3}-\\d{4}$',
      },
    },
  });

  console.log('Phone number:', result.text);
}

await regexConstrainedGeneration();
