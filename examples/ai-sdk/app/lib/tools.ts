// The guide's two tools. They run here, on the server of the app; the chat shows each call while it runs.
import { tool, type InferUITools, type UIMessage } from 'ai';
import { z } from 'zod';
import { calculate } from './calculate';

export const tools = {
  weather: tool({
    description: 'Get current weather for a location',
    inputSchema: z.object({
      location: z.string().min(1).max(40).describe('City and country'),
      unit: z.enum(['celsius', 'fahrenheit']),
    }),
    // Made up, but the same for a place every time.
    async execute({ location, unit }) {
      await new Promise((resolve) => setTimeout(resolve, 800)); // as far away as a weather service
      const sum = [...location].reduce((total, letter) => total + letter.codePointAt(0)!, 0);
      const celsius = sum % 30;
      return {
        location,
        temperature: unit === 'celsius' ? celsius : Math.round(celsius * 1.8 + 32),
        unit,
        condition: ['sunny', 'cloudy', 'rainy'][sum % 3],
      };
    },
  }),
  calculator: tool({
    description: 'Perform mathematical calculations',
    inputSchema: z.object({
      expression: z.string().min(1).max(60).describe('Numbers with + - * / and parentheses, such as 25 * 4 + 10'),
    }),
    execute: async ({ expression }) => ({ expression, result: calculate(expression) }),
  }),
};

export type ToolName = keyof typeof tools;

// How an answer came about; shown under it.
export type Facts = { inputTokens: number; outputTokens: number; seconds: number; finishReason: string };
export type ChatMessage = UIMessage<Facts, never, InferUITools<typeof tools>>;
