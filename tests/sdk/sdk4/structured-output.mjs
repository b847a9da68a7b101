// The guide's "Structured Outputs". This generation asks for an object as the arguments of a tool, unless told
// otherwise.
import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { generateObject, jsonSchema, NoObjectGeneratedError, streamObject } from 'ai';
import { z } from 'zod';
import { collect, isCount, rejection } from '../shared/checks.mjs';
import { untilItEnds } from '../../../examples/ai-sdk/shared/patient.mjs';
import { MODEL, vllm } from './lib/ai-provider.mjs';

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
// Without these a model of this size says one thing for ever.
const talkative = { temperature: 1, presencePenalty: 1, maxTokens: 400 };
const ASK_CITY = { prompt: 'Describe a city.', schema: CitySchema, maxTokens: 120 };

function isWhole(object, schema) {
  assert.deepEqual(schema.parse(object), object);
}

describe('structured output', () => {
  test('a recipe with a zod schema', async () => {
    await untilItEnds(NoObjectGeneratedError, async (seed) => {
      const { object, usage } = await generateObject({
        model: vllm(MODEL),
        schema: RecipeSchema,
        prompt: 'Generate a detailed recipe for vegetarian lasagna.',
        ...talkative,
        seed,
      });
      isWhole(object, RecipeSchema);
      isCount(usage.completionTokens);
    });
  });

  test('a story as a stream of growing objects', async () => {
    await untilItEnds(NoObjectGeneratedError, async (seed) => {
      const { partialObjectStream, object, usage } = await streamObject({
        model: vllm(MODEL),
        schema: StorySchema,
        prompt: 'Create an original science fiction story outline.',
        ...talkative,
        seed,
      });
      object.catch(() => {});
      const partials = await collect(partialObjectStream);
      assert.ok(partials.length > 5, `the object came in ${partials.length} pieces`);
      const sizes = partials.map((partial) => JSON.stringify(partial).length);
      assert.deepEqual(
        sizes,
        [...sizes].sort((a, b) => a - b),
        'an object shrank'
      );
      isWhole(await object, StorySchema);
      assert.deepEqual(partials.at(-1), await object);
      isCount((await usage).completionTokens);
    });
  });

  test('every keyword of a schema is kept', async () => {
    const { object, finishReason } = await generateObject({ model: vllm(MODEL), ...ASK_CITY });
    isWhole(object, CitySchema);
    assert.equal(finishReason, 'stop');
  });

  test('random drawing keeps a schema', async () => {
    for (const seed of [1, 2]) {
      const request = { model: vllm(MODEL), ...ASK_CITY, temperature: 1.5, seed };
      isWhole((await generateObject(request)).object, CitySchema);
    }
  });

  test('json mode with the schema in the prompt', async () => {
    await untilItEnds(NoObjectGeneratedError, async (seed) => {
      const { object } = await generateObject({
        model: vllm(MODEL),
        mode: 'json',
        schema: jsonSchema({ type: 'object' }), // this mode constrains to JSON alone
        prompt: 'Say hello.',
        temperature: 1,
        maxTokens: 100,
        seed,
      });
      assert.equal(typeof object, 'object');
    });
  });

  test('json schema as the response format', async () => {
    const model = vllm(MODEL, { structuredOutputs: true });
    const { object } = await generateObject({ model, mode: 'json', ...ASK_CITY });
    isWhole(object, CitySchema);
  });

  test('a stream with json schema as the response format', async () => {
    const model = vllm(MODEL, { structuredOutputs: true });
    const { partialObjectStream, object } = streamObject({ model, mode: 'json', ...ASK_CITY });
    assert.ok((await collect(partialObjectStream)).length > 3);
    isWhole(await object, CitySchema);
  });

  test('a name and a description of the schema', async () => {
    const names = { schemaName: 'city', schemaDescription: 'A city of this world.' };
    isWhole((await generateObject({ model: vllm(MODEL), ...names, ...ASK_CITY })).object, CitySchema);
  });

  test('one of an enumeration', async () => {
    const { object } = await generateObject({
      model: vllm(MODEL, { structuredOutputs: true }),
      output: 'enum',
      enum: ['action', 'comedy', 'drama'],
      prompt: 'Classify: two clowns fall into a pool.',
      maxTokens: 32,
    });
    assert.ok(['action', 'comedy', 'drama'].includes(object), object);
  });

  test('a list, element by element', async () => {
    const element = z.object({ name: z.string().max(8), age: z.number().int().min(1).max(99) });
    const { elementStream } = streamObject({
      model: vllm(MODEL, { structuredOutputs: true }),
      output: 'array',
      schema: element,
      prompt: 'List two people.',
      temperature: 1,
      seed: 3,
      maxTokens: 80,
    });
    const elements = await collect(elementStream);
    assert.ok(elements.length > 0);
    elements.forEach((item) => isWhole(item, element));
  });

  test('an object without a schema', async () => {
    await untilItEnds(NoObjectGeneratedError, async (seed) => {
      const { object } = await generateObject({
        model: vllm(MODEL),
        output: 'no-schema',
        prompt: 'A JSON object with one key, please.',
        temperature: 1,
        maxTokens: 100,
        seed,
      });
      assert.ok(object !== null && typeof object === 'object');
    });
  });

  test('an object that does not fit the limit is an error that tells', async () => {
    const error = await rejection(generateObject({ model: vllm(MODEL), ...ASK_CITY, maxTokens: 6 }));
    assert.ok(NoObjectGeneratedError.isInstance(error), `${error}`);
    assert.equal(error.finishReason, 'length');
    assert.equal(error.usage.completionTokens, 6);
  });
});
