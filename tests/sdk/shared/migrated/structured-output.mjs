// The guide's "Structured Outputs".
import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { collect, isCount, rejection } from '../checks.mjs';
import { adding } from '../fetches.mjs';
import { untilItEnds } from '../../../../examples/ai-sdk/shared/patient.mjs';
import { bothOf } from './both.mjs';

export default function structuredOutput(sdk) {
  const { generateObject, streamObject, NoObjectGeneratedError, vllm, MODEL, z } = sdk;
  const both = bothOf(vllm);

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

  // Small, and with keywords of every kind: an answer takes few tokens however little the model understands.
  const CitySchema = z.object({
    city: z.string().min(1).max(12),
    inhabitants: z.number().int().min(1000).max(9_999_999),
    climate: z.enum(['dry', 'wet']),
    rivers: z.array(z.string().max(8)).min(1).max(2),
    mayor: z.string().max(8).nullable(),
    code: z.string().regex(/^[A-Z]{2}-\d{2}$/),
  });
  const ASK_CITY = { prompt: 'Describe a city.', schema: CitySchema, maxOutputTokens: 120, temperature: 0 };

  const isWhole = (object, schema) => assert.deepEqual(schema.parse(object), object);

  // The guide's providers and requests; the penalty keeps the model from saying one thing for ever.
  const talkative = { temperature: 1, maxOutputTokens: 400 };
  const terse = (seed) =>
    sdk.createOpenAI({
      baseURL: process.env.VLLM_BASE_URL,
      apiKey: process.env.VLLM_API_KEY,
      name: 'vllm',
      fetch: adding({ presence_penalty: 1, seed }),
    });

  describe('structured output', () => {
    test('a recipe with a zod schema', async () => {
      await untilItEnds(NoObjectGeneratedError, async (seed) => {
        const { object, usage } = await generateObject({
          model: terse(seed)(MODEL),
          schema: RecipeSchema,
          prompt: 'Generate a detailed recipe for vegetarian lasagna.',
          ...talkative,
        });
        isWhole(object, RecipeSchema);
        isCount(usage.outputTokens);
      });
    });

    test('a story as a stream of growing objects', async () => {
      await untilItEnds(NoObjectGeneratedError, async (seed) => {
        const result = streamObject({
          model: terse(seed).chat(MODEL),
          schema: StorySchema,
          prompt: 'Create an original science fiction story outline.',
          ...talkative,
          onError({ error }) {
            throw error;
          },
        });
        const object = result.object;
        object.catch(() => {});
        const partials = await collect(result.partialObjectStream);
        assert.ok(partials.length > 5, `the object came in ${partials.length} pieces`);
        const sizes = partials.map((partial) => JSON.stringify(partial).length);
        assert.deepEqual(
          sizes,
          [...sizes].sort((a, b) => a - b),
          'an object shrank'
        );
        isWhole(await object, StorySchema);
        assert.deepEqual(partials.at(-1), await object);
        isCount((await result.usage).outputTokens);
      });
    });

    both('every keyword of a schema is kept', async (model) => {
      const { object, finishReason } = await generateObject({ model: model(MODEL), ...ASK_CITY });
      isWhole(object, CitySchema);
      assert.equal(finishReason, 'stop');
    });

    test('random drawing keeps a schema', async () => {
      for (const temperature of [1, 2]) {
        isWhole((await generateObject({ model: vllm(MODEL), ...ASK_CITY, temperature })).object, CitySchema);
      }
    });

    both('a stream keeps a schema', async (model) => {
      const { partialObjectStream, object } = streamObject({ model: model(MODEL), ...ASK_CITY });
      assert.ok((await collect(partialObjectStream)).length > 3);
      isWhole(await object, CitySchema);
    });

    test('a name and a description of the schema', async () => {
      const names = { schemaName: 'city', schemaDescription: 'A city of this world.' };
      isWhole((await generateObject({ model: vllm.chat(MODEL), ...names, ...ASK_CITY })).object, CitySchema);
    });

    test('one of an enumeration', async () => {
      const { object } = await generateObject({
        model: vllm(MODEL),
        output: 'enum',
        enum: ['action', 'comedy', 'drama'],
        prompt: 'Classify: two clowns fall into a pool.',
        maxOutputTokens: 32,
      });
      assert.ok(['action', 'comedy', 'drama'].includes(object), object);
    });

    test('a list, element by element', async () => {
      const element = z.object({ name: z.string().max(8), age: z.number().int().min(1).max(99) });
      const { elementStream } = streamObject({
        model: vllm.chat(MODEL),
        output: 'array',
        schema: element,
        prompt: 'List two people.',
        temperature: 1,
        maxOutputTokens: 80,
      });
      const elements = await collect(elementStream);
      assert.ok(elements.length > 0);
      elements.forEach((item) => isWhole(item, element));
    });

    test('an object without a schema', async () => {
      await untilItEnds(NoObjectGeneratedError, async () => {
        const { object } = await generateObject({
          model: vllm(MODEL),
          output: 'no-schema',
          prompt: 'A JSON object with one key, please.',
          temperature: 1,
          maxOutputTokens: 100,
        });
        assert.ok(object !== null && typeof object === 'object');
      });
    });

    test('an object that does not fit the limit is an error that tells', async () => {
      const error = await rejection(generateObject({ model: vllm.chat(MODEL), ...ASK_CITY, maxOutputTokens: 6 }));
      assert.ok(NoObjectGeneratedError.isInstance(error), `${error}`);
      assert.equal(error.finishReason, 'length');
      assert.equal(error.usage.outputTokens, 6);
    });

    test('an object through openai-compatible', async () => {
      const compatible = sdk.createOpenAICompatible({
        name: 'vllm',
        baseURL: process.env.VLLM_BASE_URL,
        apiKey: process.env.VLLM_API_KEY,
        includeUsage: true,
        supportsStructuredOutputs: true,
      });
      isWhole((await generateObject({ model: compatible(MODEL), ...ASK_CITY })).object, CitySchema);
    });
  });
}
