// Continues a text.
import { createUIMessageStreamResponse, streamText, toUIMessageStream } from 'ai';
import { common, explain, route } from '@/lib/answer';
import { textModel } from '@/lib/vllm';

export const POST = route(async (request) => {
  const { prompt, temperature, maxTokens } = await request.json();
  const result = streamText({
    ...common(request),
    model: await textModel(),
    prompt,
    temperature,
    maxOutputTokens: maxTokens,
  });
  return createUIMessageStreamResponse({ stream: toUIMessageStream({ stream: result.stream, onError: explain }) });
});
