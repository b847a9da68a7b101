// The model server's own figures, from its Prometheus page: name -> sum over the labels.
import { route } from '@/lib/answer';
import { baseURL, headers } from '@/lib/vllm';

export const dynamic = 'force-dynamic';

export const GET = route(async (request) => {
  const page = `${baseURL.replace(/\/v1$/, '')}/metrics`;
  const response = await fetch(page, { headers, signal: AbortSignal.any([request.signal, AbortSignal.timeout(10_000)]) });
  if (!response.ok) throw new Error(`${page} answers ${response.status}`);
  const figures: Record<string, number> = {};
  let model = '';
  for (const line of (await response.text()).split('\n')) {
    const [, name, labels, value] = /^vllm:(\w+)(?:\{(.*)\})? (\S+)/.exec(line) ?? [];
    if (!name) continue;
    figures[name] = (figures[name] ?? 0) + Number(value);
    model ||= /model_name="([^"]*)"/.exec(labels ?? '')?.[1] ?? '';
  }
  return Response.json({ model, figures });
});
