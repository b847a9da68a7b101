// Where the servers are. test_sdk.py starts them and says so in the environment, under the names of the guide's
// .env.local where it has one.

function required(name) {
  const value = process.env[name];
  if (!value) throw new Error(`${name} is not set: start these tests with pytest tests/sdk`);
  return value;
}

export const baseURL = required('VLLM_BASE_URL'); // with a key, ends in /v1
export const apiKey = required('VLLM_API_KEY');
export const MODEL = required('VLLM_MODEL');
export const EMBEDDING_MODEL = required('VLLM_EMBEDDING_MODEL'); // of the same server

// A second server without a key, which runs one request and keeps none waiting.
export const smallURL = required('VLLM_SMALL_URL');
export const smallPid = Number(required('VLLM_SMALL_PID'));

export const deadURL = 'http://127.0.0.1:2/v1'; // nobody listens there

export const root = (url) => url.replace(/\/v1$/, '');
