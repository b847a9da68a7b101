// Guide: Troubleshooting / Common Issues and Solutions / 4. Compatibility Mode Issues
// Expect: token usage.
import { createOpenAI } from '@ai-sdk/openai';
import { generateText } from 'ai';
import { MODEL } from './lib/ai-provider.mjs';

// Problem: Features not working as expected
// Solution: Ensure strict compatibility mode

const vllmStrict = createOpenAI({
  baseURL: process.env.VLLM_BASE_URL,
  apiKey: process.env.VLLM_API_KEY,
  compatibility: 'strict', // IMPORTANT: Must be 'strict' for full compatibility
});

// Verify compatibility
async function verifyCompatibility() {
  try {
    const result = await generateText({
      model: vllmStrict(MODEL),
      prompt: 'Test',
      // These features require strict compatibility:
      providerOptions: {
        openai: {
          logprobs: true, // Requires strict mode
        },
      },
    });

    console.log('Usage stats:', result.usage); // Works with strict mode
  } catch (error) {
    console.error('Compatibility issue:', error);
  }
}

await verifyCompatibility();
