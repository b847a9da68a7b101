// Guide: Troubleshooting / Common Issues and Solutions / 1. Connection Refused
// Expect: "vLLM server is healthy"; without a server, ECONNREFUSED.
// An address that ends in /v1 asks for /v1/health, which minivllm answers too.
import './lib/ai-provider.mjs';

// Problem: ECONNREFUSED error
// Solution: Check vLLM server is running and accessible

async function checkVLLMConnection() {
  try {
    const response = await fetch(`${process.env.VLLM_BASE_URL}/health`);
    if (response.ok) {
      console.log('vLLM server is healthy');
    } else {
      console.error('vLLM server returned:', response.status);
    }
  } catch (error) {
    console.error('Cannot connect to vLLM:', error);
    // Start vLLM server or check firewall settings
  }
}

await checkVLLMConnection();
