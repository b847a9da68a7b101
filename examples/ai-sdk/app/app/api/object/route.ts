// A recipe that follows its schema, as text that grows: useObject reads it half finished.
import { createTextStreamResponse, Output, streamText } from 'ai';
import { common, route } from '@/lib/answer';
import { Recipe } from '@/lib/recipe';
import { chatModel } from '@/lib/vllm';

export const POST = route(async (request) => {
  const dish: string = await request.json();
  const result = streamText({
    ...common(request),
    model: await chatModel(),
    output: Output.object({ schema: Recipe, name: 'recipe' }),
    prompt: `Write a recipe for ${dish}.`,
    temperature: 0.7,
    maxOutputTokens: 1000,
  });
  return createTextStreamResponse({ stream: await textOf(result.stream) });
});

// The text of an answer. An error before its first word is thrown here, so that it becomes the response; a plain text
// has no place for a later one, which breaks it off.
async function textOf(stream: ReadableStream<{ type: string; text?: string; error?: unknown }>) {
  const parts = stream.getReader();
  const nextText = async () => {
    for (;;) {
      const { done, value } = await parts.read();
      if (done) return undefined;
      if (value.type === 'error') throw value.error;
      if (value.type === 'text-delta') return value.text;
    }
  };
  const put = (controller: ReadableStreamDefaultController<string>, text: string | undefined) =>
    text === undefined ? controller.close() : controller.enqueue(text);
  const first = await nextText();
  return new ReadableStream<string>({
    start: (controller) => put(controller, first),
    pull: async (controller) => put(controller, await nextText()),
    cancel: (reason) => parts.cancel(reason),
  });
}
