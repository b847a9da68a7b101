// Guide: Structured Outputs / JSON Generation with Zod Schema
// Expect: a recipe as JSON, with every key of the schema.
import { generateObject, NoObjectGeneratedError } from 'ai';
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
  const { object } = await generateObject({
    model: vllm(MODEL),
    schema: RecipeSchema,
    prompt: 'Generate a detailed recipe for vegetarian lasagna.',
    ...endingSoon(seed), // not in the guide: for models of this size
  });

  console.log('Generated recipe:', JSON.stringify(object, null, 2));
}

await untilItEnds(NoObjectGeneratedError, generateRecipe);
