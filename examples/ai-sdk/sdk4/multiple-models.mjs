// Guide: Advanced Configuration / Multiple Model Configurations
// Expect: two texts, and the length of an embedding.
// Needs an embedding model, too: minivllm serve --embedding-model BAAI/bge-large-en-v1.5.
import { createOpenAI } from '@ai-sdk/openai';
import { embed, generateText } from 'ai';
import { MODEL } from './lib/ai-provider.mjs';

process.env.VLLM_CHAT_URL ||= process.env.VLLM_BASE_URL;
process.env.VLLM_CODE_URL ||= process.env.VLLM_BASE_URL;
process.env.VLLM_EMBEDDING_URL ||= process.env.VLLM_BASE_URL;
const EMBEDDING_MODEL = process.env.VLLM_EMBEDDING_MODEL || 'BAAI/bge-large-en-v1.5';

// Different vLLM instances for different models/purposes
const vllmChat = createOpenAI({
  baseURL: process.env.VLLM_CHAT_URL,
  apiKey: process.env.VLLM_API_KEY,
  compatibility: 'strict',
  name: 'vllm-chat',
});

const vllmCode = createOpenAI({
  baseURL: process.env.VLLM_CODE_URL,
  apiKey: process.env.VLLM_API_KEY,
  compatibility: 'strict',
  name: 'vllm-code',
});

const vllmEmbedding = createOpenAI({
  baseURL: process.env.VLLM_EMBEDDING_URL,
  apiKey: process.env.VLLM_API_KEY,
  compatibility: 'strict',
  name: 'vllm-embedding',
});

// Model instances
const models = {
  chat: vllmChat(MODEL),
  code: vllmCode(MODEL),
  embedding: vllmEmbedding.textEmbedding(EMBEDDING_MODEL),
};

for (const model of [models.chat, models.code]) {
  const { text } = await generateText({ model, prompt: 'Write a line of code.', maxTokens: 24 });
  console.log(text);
}
const { embedding } = await embed({ model: models.embedding, value: 'one' });
console.log('Embedding:', embedding.length);
