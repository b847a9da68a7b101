// Guide: Guided Generation with vLLM / Regex Patterns
// Expect: a number like 555-123-4567.
import { generateText } from 'ai';
import { MODEL, vllm } from './lib/openai-compatible.mjs';

async function regexConstrainedGeneration() {
  const result = await generateText({
    model: vllm(MODEL),
    prompt: 'Generate a valid US phone number',
    providerOptions: {
      vllm: {
        guided_regex: '^\\d{3}-\\d{3}-\\d{4}$',
      },
    },
  });

  console.log('Phone number:', result.text);
}

await regexConstrainedGeneration();
