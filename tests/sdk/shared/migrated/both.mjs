// A case on both APIs that a model can be asked through: run(model, api), model being a function of its id.
import { test } from 'node:test';

export function bothOf(provider) {
  return (name, run) => {
    test(name, () => run((id) => provider(id), 'responses'));
    test(`${name} over chat`, () => run((id) => provider.chat(id), 'chat'));
  };
}
