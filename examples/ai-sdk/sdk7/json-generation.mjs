// Guide: Structured Outputs / JSON Generation with Zod Schema
// Expect: a recipe as JSON, with every key of the schema. generateText and streamText with an output replace
// generateObject and streamObject here. Chat completions, because the Responses API has neither penalties nor seeds for
// a small model.
import { generateText, NoObjectGeneratedError, Output } from 'ai';
import { z } from 'zod';
import { MODEL, vllm } from './lib/ai-provider.mjs';
import { endingSoon, untilItEnds } from './lib/patient.mjs';

const RecipeSchema = z.object({
  name: z.string(),
  servings: z.number(),
  prepTime: z.number().describe('Preparation time in minutes'),
  cookTime: z.number().describe('Cooking time in minutes'),
  ingredients: z.array(
    z.object({
      item: z.string(),
      amount: z.string(),
      unit: z.string(),
    })
  ),
  instructions: z.array(z.string()),
  difficulty: z.enum(['easy', 'medium', 'hard']),
});

async function generateRecipe(seed) {
  const { output } = await generateText({
    model: vllm.chat(MODEL),
    output: Output.object({ schema: RecipeSchema }),
    prompt: 'Generate a detailed recipe for vegetarian lasagna.',
    ...endingSoon(seed), // not in the guide: for models of this size
  });

  console.log('Generated recipe:', JSON.stringify(output, null, 2));
}

await untilItEnds(NoObjectGeneratedError, generateRecipe);
