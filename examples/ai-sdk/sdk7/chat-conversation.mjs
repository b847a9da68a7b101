// Guide: Text Generation Examples / Chat Conversation
// Expect: an answer to the last question.
import { generateText } from 'ai';
import { MODEL, vllm } from './lib/ai-provider.mjs';

async function chatConversation() {
  const messages = [
    { role: 'user', content: 'How do I sort an array in Python?' },
    { role: 'assistant', content: 'You can sort an array in Python using...' },
    { role: 'user', content: 'What about sorting in reverse order?' },
  ];

  const { text } = await generateText({
    model: vllm(MODEL),
    instructions: 'You are a helpful coding assistant.',
    messages,
    temperature: 0.3,
  });

  console.log('Response:', text);
}

await chatConversation();
