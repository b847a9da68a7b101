// The guide's recipe. With limits: whatever a model does, the object comes to an end.
import { z } from 'zod';

export const Recipe = z.object({
  name: z.string().min(3).max(50),
  servings: z.number().int().min(1).max(12),
  prepTime: z.number().int().min(1).max(240).describe('Preparation time in minutes'),
  cookTime: z.number().int().min(0).max(480).describe('Cooking time in minutes'),
  difficulty: z.enum(['easy', 'medium', 'hard']),
  ingredients: z
    .array(z.object({ item: z.string().min(2).max(30), amount: z.number().min(0).max(1000), unit: z.string().max(12) }))
    .min(2)
    .max(5),
  instructions: z.array(z.string().min(5).max(80)).min(2).max(4),
});
