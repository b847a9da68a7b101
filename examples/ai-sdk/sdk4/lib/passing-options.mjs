// The provider of ./ai-provider.mjs, and whatever a call has under providerOptions.openai reaches the server.
//
// The SDK itself drops every option that OpenAI's API does not have (guided_json, best_of, ...), without a word. Here
// the options of a call wait beside it until its request is sent, and join the body there.
import { AsyncLocalStorage } from 'node:async_hooks';
import { createOpenAI } from '@ai-sdk/openai';
import { wrapLanguageModel } from 'ai';
import './ai-provider.mjs';

const optionsOfCall = new AsyncLocalStorage();

const provider = createOpenAI({
  baseURL: process.env.VLLM_BASE_URL,
  apiKey: process.env.VLLM_API_KEY,
  compatibility: 'strict',
  name: 'vllm',
  fetch: (url, options) => {
    const body = { ...JSON.parse(options.body), ...optionsOfCall.getStore() };
    return fetch(url, { ...options, body: JSON.stringify(body) });
  },
});

const middleware = {
  wrapGenerate: ({ doGenerate, params }) => optionsOfCall.run(params.providerMetadata?.openai, doGenerate),
  wrapStream: ({ doStream, params }) => optionsOfCall.run(params.providerMetadata?.openai, doStream),
};

export const vllm = (modelId) => wrapLanguageModel({ model: provider(modelId), middleware });
