// GET /metrics: name -> sum over its labels.
import { until } from './checks.mjs';

export async function metricsOf(url, apiKey) {
  const response = await fetch(`${url}/metrics`, { headers: { Authorization: `Bearer ${apiKey}` } });
  if (!response.ok) throw new Error(`/metrics answers ${response.status}`);
  const sums = new Map();
  for (const line of (await response.text()).split('\n')) {
    const sample = /^([a-z_:]+)(?:\{.*\})? (\S+)$/i.exec(line);
    if (sample) sums.set(sample[1], (sums.get(sample[1]) ?? 0) + Number(sample[2]));
  }
  return sums;
}

// When nothing runs there.
export async function idleMetricsOf(url, apiKey) {
  let metrics;
  const isIdle = async () => (metrics = await metricsOf(url, apiKey)).get('vllm:num_requests_running') === 0;
  await until(isIdle, 'the server to be idle');
  return metrics;
}
