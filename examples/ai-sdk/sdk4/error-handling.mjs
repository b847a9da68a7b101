// Guide: Error Handling and Retries / Comprehensive Error Handling
// Expect: a text. With maxRetries 3 a 429 arrives as a RetryError, whose lastError says more than its cause:
// ../client/error-handling.mjs.
import { generateText } from 'ai';
import { APICallError, RetryError, InvalidResponseDataError } from 'ai';
import { MODEL, vllm } from './lib/ai-provider.mjs';

async function robustGeneration(prompt) {
  try {
    const result = await generateText({
      model: vllm(MODEL),
      prompt,
      maxRetries: 3,
      abortSignal: AbortSignal.timeout(30000), // 30s timeout
    });

    return result.text;
  } catch (error) {
    if (error instanceof APICallError) {
      console.error('API call failed:', {
        url: error.url,
        status: error.statusCode,
        message: error.message,
        responseBody: error.responseBody,
      });

      // Handle specific status codes
      switch (error.statusCode) {
        case 429:
          console.log('Rate limited, waiting before retry...');
          await new Promise((resolve) => setTimeout(resolve, 5000));
          return robustGeneration(prompt); // Retry
        case 503:
          console.log('Service unavailable, vLLM might be loading model');
          break;
        default:
          throw error;
      }
    } else if (error instanceof RetryError) {
      console.error('Max retries exceeded:', error.message);
      console.error('Last error:', error.cause);
    } else if (error instanceof InvalidResponseDataError) {
      console.error('Invalid response format:', error.message);
    } else {
      console.error('Unknown error:', error);
    }

    throw error;
  }
}

console.log('Text:', await robustGeneration('Say hello.'));
