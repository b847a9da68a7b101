// Asks several servers in turn, and none that has failed a moment ago.
// Expect: a line for each request with its answer, and one for each failure that another server made good. Kill one
// meanwhile: every request is still answered.
//
//   VLLM_BASE_URLS=http://vllm1:8000/v1,http://vllm2:8000/v1,http://vllm3:8000/v1 SECONDS=40 node load-balancing.mjs
import { generateText } from 'ai';
import { balanced } from './lib/balanced.mjs';
import { baseURLs, MODEL, providerWith } from './lib/provider.mjs';

const print = (line) => console.log(JSON.stringify(line));
const onFailure = ({ url, status, error }) => {
  print({ failed: url, status, error: error?.cause?.code ?? error?.message });
};
const provider = providerWith(balanced(baseURLs, { onFailure }));

async function call(number) {
  try {
    const { text, response } = await generateText({
      model: provider.chat(MODEL),
      prompt: `Say ${number}.`,
      maxOutputTokens: 8,
      maxRetries: 0,
    });
    print({ number, url: response.headers['x-served-by'], text });
  } catch (error) {
    print({ number, error: error.message });
  }
}

// Two requests a second, whether or not the earlier ones have answers.
const calls = [];
for (let number = 1; number <= 2 * Number(process.env.SECONDS || 3); number++) {
  calls.push(call(number));
  await new Promise((resolve) => setTimeout(resolve, 500));
}
await Promise.all(calls);
