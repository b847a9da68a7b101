// Guide: Basic Integration / 2. Configuration
// Expect: an answer to a question, then the rest of a sentence.
// The provider itself is in lib/ai-provider.mjs, which every script here imports.
import { generateText } from 'ai';
import { llama3Chat, llama3Completion } from './lib/ai-provider.mjs';

const chat = await generateText({ model: llama3Chat, prompt: 'Who are you?', maxOutputTokens: 32 });
console.log('Chat:', chat.text);
const completion = await generateText({
  model: llama3Completion,
  prompt: 'The capital of France is',
  maxOutputTokens: 16,
});
console.log('Completion:', completion.text);
