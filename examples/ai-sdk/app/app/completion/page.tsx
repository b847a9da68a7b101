// Continues a text, with /v1/completions behind it: no roles, no template.
'use client';

import { useCompletion } from '@ai-sdk/react';
import { useState } from 'react';
import { Composer } from '@/components/composer';
import { Trouble } from '@/components/trouble';

const EXAMPLE = 'Once upon a time, in a library by the sea,';

export default function CompletionPage() {
  const [prompt, setPrompt] = useState('');
  const [temperature, setTemperature] = useState(0.8);
  const [maxTokens, setMaxTokens] = useState(120);
  const { completion, complete, isLoading, stop, error } = useCompletion({ api: '/api/completion', throttle: 30 });

  function start(text: string) {
    setPrompt(text);
    complete(text, { body: { temperature, maxTokens } });
  }

  return (
    <section className="chat">
      <div className="log">
        <div aria-live="polite">
          {prompt ? (
            <p className="text continued">
              <span className="typed">{prompt}</span>
              <span className="completion">{completion}</span>
              {isLoading && <span className="caret" />}
            </p>
          ) : (
            <div className="welcome">
              <h1>Begin a text, and the model goes on</h1>
              <button type="button" onClick={() => start(EXAMPLE)}>
                {EXAMPLE}
              </button>
            </div>
          )}
          <Trouble error={error} onRetry={() => start(prompt)} />
        </div>
      </div>
      <Composer label="The beginning of a text" action="Complete" isBusy={isLoading} onSend={start} onStop={stop} keepsText>
        <label>
          temperature
          <input
            type="number"
            min={0}
            max={2}
            step={0.1}
            value={temperature}
            onChange={(event) => setTemperature(event.target.valueAsNumber)}
          />
        </label>
        <label>
          tokens
          <input
            type="number"
            min={1}
            max={2000}
            value={maxTokens}
            onChange={(event) => setMaxTokens(event.target.valueAsNumber)}
          />
        </label>
      </Composer>
    </section>
  );
}
