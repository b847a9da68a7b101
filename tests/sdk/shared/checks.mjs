// What several sections assert, and what several need to look at a stream. Knows no generation of the SDK.
import assert from 'node:assert/strict';

export { until } from '../../../examples/ai-sdk/shared/until.mjs';

export function isText(value) {
  assert.equal(typeof value, 'string');
  assert.ok(value.trim().length > 0, 'the text is empty');
}

export function isCount(value) {
  assert.ok(Number.isInteger(value) && value > 0, `expected a positive count, got ${value}`);
}

export async function collect(stream) {
  const items = [];
  for await (const item of stream) items.push(item);
  return items;
}

// The kinds of the parts of a stream, each run of one kind once.
export function kindsOf(parts) {
  return parts.map((part) => part.type).filter((type, index, types) => type !== types[index - 1]);
}

export function appearInOrder(kinds, wanted) {
  let from = 0;
  for (const kind of wanted) {
    const found = kinds.indexOf(kind, from);
    assert.ok(found >= 0, `expected ${wanted.join(' < ')}, got ${kinds.join(' ')}`);
    from = found + 1;
  }
}

export async function rejection(promise) {
  try {
    await promise;
  } catch (error) {
    return error;
  }
  throw new assert.AssertionError({ message: 'expected a rejection' });
}
