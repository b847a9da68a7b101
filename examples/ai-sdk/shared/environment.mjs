// The guide's .env.local. What is not set means `minivllm serve` on this machine, with its default model and no key.
process.env.VLLM_BASE_URL ||= 'http://localhost:8000/v1';
process.env.VLLM_API_KEY ||= 'your-vllm-api-key';
process.env.VLLM_MODEL ||= 'SmolLM2-135M-Instruct';

export const MODEL = process.env.VLLM_MODEL;
