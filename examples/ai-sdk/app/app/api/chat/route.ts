// A conversation with tools. `tool` in the body says whether the model may call one ("auto"), must call a certain one
// first (its name), or has none ("off").
import { convertToModelMessages, createUIMessageStreamResponse, isStepCount, streamText, toUIMessageStream } from 'ai';
import { common, explain, route } from '@/lib/answer';
import { tools, type ChatMessage, type ToolName } from '@/lib/tools';
import { chatModel } from '@/lib/vllm';

type Body = { messages: ChatMessage[]; tool: ToolName | 'auto' | 'off' };

export const POST = route(async (request) => {
  const { messages, tool }: Body = await request.json();
  const started = Date.now();
  const result = streamText({
    ...common(request),
    model: await chatModel(),
    messages: await convertToModelMessages(messages, { ignoreIncompleteToolCalls: true }),
    temperature: 0.7,
    maxOutputTokens: 512,
    ...(tool !== 'off' && {
      tools,
      stopWhen: isStepCount(4), // a call, its result, and so on
      prepareStep: ({ stepNumber }: { stepNumber: number }) => ({
        toolChoice: tool === 'auto' ? 'auto' : stepNumber === 0 ? { type: 'tool', toolName: tool } : 'none',
      }),
    }),
  });
  return createUIMessageStreamResponse({
    stream: toUIMessageStream<typeof tools, ChatMessage>({
      stream: result.stream,
      onError: explain,
      messageMetadata({ part }) {
        if (part.type !== 'finish') return undefined;
        const { inputTokens = 0, outputTokens = 0 } = part.totalUsage;
        return { inputTokens, outputTokens, seconds: (Date.now() - started) / 1000, finishReason: part.finishReason };
      },
    }),
  });
});
