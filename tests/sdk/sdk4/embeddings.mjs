// The guide's vllmEmbedding.textEmbedding(...): vectors of texts, one and many.
import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { APICallError, cosineSimilarity, embed, embedMany } from 'ai';
import { isCount, rejection } from '../shared/checks.mjs';
import { EMBEDDING_MODEL } from '../shared/environment.mjs';
import { vllm } from './lib/ai-provider.mjs';

const model = vllm.textEmbedding(EMBEDDING_MODEL);

describe('embeddings', () => {
  test('one text', async () => {
    const { embedding, usage } = await embed({ model, value: 'sunny day at the beach' });
    assert.ok(embedding.length > 8 && embedding.every(Number.isFinite));
    assert.ok(Math.abs(Math.hypot(...embedding) - 1) < 1e-3, 'the length is not 1');
    isCount(usage.tokens);
  });

  test('many texts in their order', async () => {
    const values = ['a cat', 'the weather of tomorrow', 'a cat'];
    const { embeddings } = await embedMany({ model, values });
    assert.equal(embeddings.length, 3);
    const single = await embed({ model, value: values[1] });
    assert.ok(cosineSimilarity(embeddings[1], single.embedding) > 0.999);
    assert.ok(cosineSimilarity(embeddings[0], embeddings[2]) > 0.999);
    assert.ok(cosineSimilarity(embeddings[0], embeddings[1]) < 0.999);
  });

  test('more texts than one call may hold', async () => {
    const values = Array.from({ length: 10 }, (_, index) => `text ${index}`);
    const small = vllm.textEmbedding(EMBEDDING_MODEL, { maxEmbeddingsPerCall: 4 });
    const { embeddings, usage } = await embedMany({ model: small, values });
    assert.equal(embeddings.length, 10);
    isCount(usage.tokens);
    const whole = await embedMany({ model, values });
    embeddings.forEach((vector, index) => assert.ok(cosineSimilarity(vector, whole.embeddings[index]) > 0.999));
  });

  test('an unknown model is a 404', async () => {
    const error = await rejection(embed({ model: vllm.textEmbedding('no-such-model'), value: 'x' }));
    assert.ok(APICallError.isInstance(error), `${error}`);
    assert.equal(error.statusCode, 404);
  });
});
