// Waits for what comes by itself.
import assert from 'node:assert/strict';

export async function until(condition, what, seconds = 300) {
  const deadline = Date.now() + seconds * 1000;
  while (!(await condition())) {
    if (Date.now() > deadline) throw new assert.AssertionError({ message: `waited ${seconds} s for: ${what}` });
    await new Promise((resolve) => setTimeout(resolve, 25));
  }
}
