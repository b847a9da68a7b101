// Guide: Structured Outputs / Streaming Objects
// Expect: an outline as JSON that grows, printed again at every step. generateText and streamText with an output
// replace generateObject and streamObject here. Chat completions, because the Responses API has neither penalties nor
// seeds for a small model.
import { NoObjectGeneratedError, Output, streamText } from 'ai';
import { z } from 'zod';
import { MODEL, vllm } from './lib/ai-provider.mjs';
import { endingSoon, untilItEnds } from './lib/patient.mjs';

const StorySchema = z.object({
  title: z.string(),
  genre: z.string(),
  characters: z.array(
    z.object({
      name: z.string(),
      role: z.string(),
      description: z.string(),
    })
  ),
  plot: z.string(),
  twist: z.string(),
});

async function streamStory(seed) {
  const { partialOutputStream, output } = streamText({
    model: vllm.chat(MODEL),
    output: Output.object({ schema: StorySchema }),
    prompt: 'Create an original science fiction story outline.',
    ...endingSoon(seed), // not in the guide: for models of this size
  });

  // Stream partial objects as they're generated
  for await (const partialObject of partialOutputStream) {
    if (process.stdout.isTTY) console.clear();
    console.log('Story outline:', JSON.stringify(partialObject, null, 2));
  }
  await output; // not in the guide: whether it became whole
}

await untilItEnds(NoObjectGeneratedError, streamStory);
