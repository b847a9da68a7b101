// The model server's figures, read every second through /api/metrics. Rates are differences between two readings.
'use client';

import { useEffect, useState } from 'react';

type Figures = Record<string, number>;
type Reading = { model: string; figures: Figures; at: number };

const PERIOD_MS = 1000;
const NUM_READINGS = 61; // a minute

export function Metrics() {
  const [readings, setReadings] = useState<Reading[]>([]);
  const [trouble, setTrouble] = useState('');

  useEffect(() => {
    let timer: ReturnType<typeof setTimeout>;
    const over = new AbortController();
    async function read() {
      try {
        const response = await fetch('/api/metrics', { signal: over.signal });
        if (!response.ok) throw new Error(await response.text());
        const reading = { ...(await response.json()), at: performance.now() };
        setReadings((before) => [...before, reading].slice(-NUM_READINGS));
        setTrouble('');
      } catch (error) {
        if (over.signal.aborted) return;
        setReadings([]); // a server that comes back counts from zero
        setTrouble(error instanceof TypeError ? 'The app is not running.' : String((error as Error).message));
      }
      if (!over.signal.aborted) timer = setTimeout(read, PERIOD_MS);
    }
    read();
    return () => {
      over.abort();
      clearTimeout(timer);
    };
  }, []);

  const last = readings.at(-1);
  const state = trouble ? 'down' : last ? 'up' : 'unknown';
  const speeds = readings.slice(1).map((reading, index) => speedBetween(readings[index], reading));
  return (
    <aside className="metrics" data-state={state}>
      <h2>
        <span className="dot" /> {last?.model || (trouble ? 'no server' : '…')}
      </h2>
      {trouble && <p className="down">{trouble}</p>}
      {last && (
        <>
          <div className="speed">
            <b data-figure="speed">{(speeds.at(-1) ?? 0).toFixed(0)}</b> tokens per second
            <Curve values={speeds} />
          </div>
          <dl>
            {Object.entries(shown(last.figures)).map(([name, value]) => (
              <div key={name}>
                <dt>{name}</dt>
                <dd data-figure={name}>{value}</dd>
              </div>
            ))}
          </dl>
        </>
      )}
    </aside>
  );
}

const speedBetween = (before: Reading, after: Reading) =>
  (after.figures.generation_tokens_total - before.figures.generation_tokens_total) / ((after.at - before.at) / 1000);

function shown(figures: Figures): Record<string, string> {
  const share = (part = 0, whole = 0) => `${(whole > 0 ? (100 * part) / whole : 0).toFixed(0)} %`;
  const count = (name: string) => (figures[name] ?? 0).toLocaleString('en');
  const firstToken = figures.time_to_first_token_seconds_sum / figures.time_to_first_token_seconds_count;
  return {
    running: count('num_requests_running'),
    waiting: count('num_requests_waiting'),
    'cache in use': share(figures.kv_cache_usage_perc, 1),
    'prefix cache hits': share(figures.prefix_cache_hits_total, figures.prefix_cache_queries_total),
    'tokens read': count('prompt_tokens_total'),
    'tokens written': count('generation_tokens_total'),
    'to the first token': Number.isFinite(firstToken) ? `${firstToken.toFixed(2)} s` : '–',
  };
}

// The last minute, newest on the right.
function Curve({ values }: { values: number[] }) {
  const top = Math.max(10, ...values);
  const width = NUM_READINGS - 2;
  const points = values.map((value, index) => `${width - values.length + 1 + index},${30 - (28 * value) / top}`);
  return (
    <svg viewBox={`0 0 ${width} 31`} preserveAspectRatio="none" aria-hidden>
      <polyline points={points.join(' ')} />
    </svg>
  );
}
