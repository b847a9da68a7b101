// Guide: Troubleshooting / Common Issues and Solutions / 2. Model Not Found
// Expect: the models of the server.
// An address that ends in /v1 asks for /v1/v1/models, which minivllm answers too.
import './lib/ai-provider.mjs';

// Problem: Model not found error
// Solution: List available models

async function listAvailableModels() {
  const response = await fetch(`${process.env.VLLM_BASE_URL}/v1/models`, {
    headers: { Authorization: `Bearer ${process.env.VLLM_API_KEY}` }, // not in the guide: for a server with a key
  });
  const data = await response.json();
  console.log('Available models:', data.data);
  return data.data.map((m) => m.id);
}

await listAvailableModels();
