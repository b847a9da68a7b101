// Guide: Guided Generation with vLLM / JSON Schema Constraints
// Expect: a user as JSON, with a name, an age and an email.
import { generateText } from 'ai';
import { MODEL, vllm } from './lib/openai-compatible.mjs';
import { endingSoon, untilItStops } from './lib/patient.mjs';

async function guidedGeneration() {
  // vLLM with guided generation enabled
  const result = await untilItStops((seed) =>
    generateText({
      ...endingSoon(seed), // not in the guide: for models of this size
      model: vllm(MODEL),
      prompt: 'Generate user profile data',
      // Pass guided generation parameters via provider options
      providerOptions: {
        vllm: {
          guided_json: {
            type: 'object',
            properties: {
              name: { type: 'string' },
              age: { type: 'integer', minimum: 0, maximum: 120 },
              email: { type: 'string', format: 'email' },
              interests: {
                type: 'array',
                items: { type: 'string' },
                minItems: 1,
                maxItems: 5,
              },
            },
            required: ['name', 'age', 'email'],
          },
        },
      },
    })
  );

  const userData = JSON.parse(result.text);
  console.log('Generated user:', userData);
}

await guidedGeneration();
