// A recipe that follows its schema, shown while it is written.
'use client';

import { useObject } from '@ai-sdk/react';
import { useState } from 'react';
import { Composer } from '@/components/composer';
import { Trouble } from '@/components/trouble';
import { Recipe } from '@/lib/recipe';

const EXAMPLE = 'vegetarian lasagna';

export default function ObjectPage() {
  const [dish, setDish] = useState('');
  const [outcome, setOutcome] = useState('');
  const { object, submit, isLoading, stop, error } = useObject({
    api: '/api/object',
    schema: Recipe,
    onFinish: ({ object }) => setOutcome(object ? 'Complete: it follows the schema.' : 'It was cut short.'),
  });

  function start(text: string) {
    setDish(text);
    setOutcome('');
    submit(text);
  }

  return (
    <section className="chat">
      <div className="log">
        <div>
          {object ? (
            <article className="recipe" aria-busy={isLoading}>
              <h1>{object.name || '…'}</h1>
              <p className="facts">
                {object.servings !== undefined && <span>serves {object.servings}</span>}
                {object.prepTime !== undefined && <span>{object.prepTime} min to prepare</span>}
                {object.cookTime !== undefined && <span>{object.cookTime} min to cook</span>}
                {object.difficulty && <span>{object.difficulty}</span>}
              </p>
              <ul>
                {object.ingredients?.map((part, index) => (
                  <li key={index}>
                    {part?.amount} {part?.unit} {part?.item}
                  </li>
                ))}
              </ul>
              <ol>
                {object.instructions?.map((step, index) => (
                  <li key={index}>{step}</li>
                ))}
              </ol>
              <details>
                <summary>As JSON</summary>
                <pre>{JSON.stringify(object, null, 2)}</pre>
              </details>
              <p className="outcome">{isLoading ? 'The model writes …' : outcome || (!error && 'Stopped.')}</p>
            </article>
          ) : (
            <div className="welcome">
              <h1>{isLoading ? 'The model reads …' : 'Name a dish, and get a recipe'}</h1>
              <p>The answer is an object. Whatever the model, it follows the schema in lib/recipe.ts.</p>
              {!isLoading && (
                <button type="button" onClick={() => start(EXAMPLE)}>
                  {EXAMPLE}
                </button>
              )}
            </div>
          )}
          <Trouble error={error} onRetry={() => start(dish)} />
        </div>
      </div>
      <Composer label="A dish" action="Write" isBusy={isLoading} onSend={start} onStop={stop} keepsText />
    </section>
  );
}
