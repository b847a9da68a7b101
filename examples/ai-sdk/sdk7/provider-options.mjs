// Guide: Advanced Configuration / Provider-Specific Options
// Expect: a text and the log-probabilities of its tokens.
import { generateText } from 'ai';
import { MODEL, vllm } from './lib/openai-compatible.mjs';

async function advancedGeneration() {
  const result = await generateText({
    model: vllm(MODEL),
    prompt: 'Explain relativity',
    include: { responseBody: true },
    temperature: 0.7,
    maxOutputTokens: 1000,
    topP: 0.95,
    topK: 50,
    frequencyPenalty: 0.5,
    presencePenalty: 0.3,
    stopSequences: ['\n\n', 'END'],
    // vLLM-specific options via providerOptions
    providerOptions: {
      vllm: {
        // Enable logprobs for debugging
        logprobs: true,
        // Set number of logprobs to return
        top_logprobs: 5,
        // Enable best_of sampling
        best_of: 3,
        // Use beam search
        use_beam_search: true,
        // Repetition penalty
        repetition_penalty: 1.1,
      },
    },
  });

  console.log('Text:', result.text);
  // Access logprobs
  const { logprobs } = result.response.body.choices[0]; // openai-compatible puts them nowhere else
  console.log('Logprobs:', logprobs);
}

await advancedGeneration();
