// Guide: Tool Calling / Streaming Tool Calls
// Expect: text, or a call of webSearch with its arguments and its result, as they come.
import { streamText } from 'ai';
import { z } from 'zod';
import { MODEL, vllm } from './lib/ai-provider.mjs';

async function streamingToolCalls() {
  const result = streamText({
    model: vllm(MODEL),
    messages: [
      {
        role: 'user',
        content: 'Search for the latest AI news and summarize it.',
      },
    ],
    maxOutputTokens: 100, // not in the guide: a model of this size may talk without end
    tools: {
      webSearch: {
        description: 'Search the web for information',
        inputSchema: z.object({
          query: z.string(),
          maxResults: z.number().optional(),
        }),
        execute: async ({ query, maxResults = 5 }) => {
          // Simulate web search
          return {
            results: [{ title: 'AI breakthrough...', url: 'https://...', snippet: '...' }],
          };
        },
      },
    },
  });

  // Stream tool calls and text
  for await (const chunk of result.fullStream) {
    switch (chunk.type) {
      case 'text-delta':
        process.stdout.write(chunk.text);
        break;
      case 'tool-call':
        console.log('\nTool called:', chunk.toolName);
        console.log('Arguments:', chunk.input);
        break;
      case 'tool-result':
        console.log('Tool result:', chunk.output);
        break;
    }
  }
}

await streamingToolCalls();
