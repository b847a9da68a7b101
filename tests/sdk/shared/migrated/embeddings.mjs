// The guide's vllmEmbedding.textEmbedding(...): vectors of texts, one and many.
import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { isCount, rejection } from '../checks.mjs';
import { EMBEDDING_MODEL } from '../environment.mjs';

export default function embeddings({ APICallError, cosineSimilarity, embed, embedMany, vllm }) {
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

    test('a number of texts at once', async () => {
      const values = Array.from({ length: 10 }, (_, index) => `text ${index}`);
      const { embeddings, usage } = await embedMany({ model, values, maxParallelCalls: 2 });
      assert.equal(new Set(embeddings.map(String)).size, 10);
      isCount(usage.tokens);
    });

    test('an unknown model is a 404', async () => {
      const error = await rejection(embed({ model: vllm.textEmbedding('no-such-model'), value: 'x' }));
      assert.ok(APICallError.isInstance(error), `${error}`);
      assert.equal(error.statusCode, 404);
    });
  });
}
