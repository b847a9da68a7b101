// Guide: Tool Calling / Basic Tool Usage
// Expect: text, or calls of tools with their results: a model of 135M parameters often just talks. A bigger one calls
// both. The calculator evaluates what a model wrote, as the guide has it: not for anybody who means it.
import { generateText } from 'ai';
import { z } from 'zod';
import { MODEL, vllm } from './lib/ai-provider.mjs';

// Define tools
const tools = {
  weather: {
    description: 'Get current weather for a location',
    parameters: z.object({
      location: z.string().describe('City and country'),
      unit: z.enum(['celsius', 'fahrenheit']).optional(),
    }),
    execute: async ({ location, unit = 'celsius' }) => {
      // Simulate weather API call
      return {
        location,
        temperature: Math.round(Math.random() * 30),
        unit,
        condition: ['sunny', 'cloudy', 'rainy'][Math.floor(Math.random() * 3)],
      };
    },
  },
  calculator: {
    description: 'Perform mathematical calculations',
    parameters: z.object({
      expression: z.string().describe('Mathematical expression to evaluate'),
    }),
    execute: async ({ expression }) => {
      try {
        // In production, use a safe math parser
        const result = eval(expression);
        return { expression, result };
      } catch (error) {
        return { error: 'Invalid expression' };
      }
    },
  },
};

async function toolCallingExample() {
  const { text, toolCalls, toolResults } = await generateText({
    model: vllm(MODEL),
    messages: [
      {
        role: 'user',
        content: "What's the weather in Tokyo and calculate 25 * 4 + 10?",
      },
    ],
    tools,
    toolChoice: 'auto',
    maxTokens: 100, // not in the guide: a model of this size may talk without end
  });

  console.log('Response:', text);
  console.log('Tool calls:', toolCalls);
  console.log('Tool results:', toolResults);
}

await toolCallingExample();
