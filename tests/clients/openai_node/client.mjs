// OpenAI's client for JavaScript. test_openai_node.py runs this file, says where the server is, and names every case.
import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import OpenAI, { AuthenticationError, BadRequestError, NotFoundError } from 'openai';

const { BASE_URL: baseURL, API_KEY: apiKey, MODEL: model, EMBEDDING_MODEL: embedder } = process.env;
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const messages = [{ role: 'user', content: 'Name a colour.' }];
const short = { model, messages, temperature: 0, max_tokens: 8 };

const parameters = {
  type: 'object',
  properties: { unit: { type: 'string', enum: ['celsius', 'fahrenheit'] }, day: { type: 'integer', minimum: 1, maximum: 31 } },
  required: ['unit', 'day'],
  additionalProperties: false,
};
const asked = [{ role: 'user', content: 'How warm is it on the fifth?' }];
const named = {
  model,
  messages: asked,
  temperature: 0,
  max_tokens: 64,
  tools: [{ type: 'function', function: { name: 'temperature', description: 'How warm it is', parameters } }],
  tool_choice: { type: 'function', function: { name: 'temperature' } },
};

function checkArguments(text) {
  const { unit, day, ...rest } = JSON.parse(text);
  assert.ok(['celsius', 'fahrenheit'].includes(unit) && Number.isInteger(day) && day >= 1 && day <= 31, text);
  assert.deepEqual(rest, {});
}

describe('client', () => {
  test('models', async () => {
    const ids = [];
    for await (const entry of client.models.list()) ids.push(entry.id);
    assert.deepEqual(ids.sort(), [model, embedder].sort());
    assert.equal((await client.models.retrieve(model)).id, model);
  });

  test('chat', async () => {
    const answer = await client.chat.completions.create(short);
    assert.equal(answer.object, 'chat.completion');
    assert.ok(answer.choices[0].message.content.length > 0);
    assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
    assert.ok(answer._request_id);
  });

  test('stream', async () => {
    const whole = await client.chat.completions.create(short);
    const stream = await client.chat.completions.create({ ...short, stream: true, stream_options: { include_usage: true } });
    let text = '';
    let usage;
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta.content ?? '';
      usage = chunk.usage ?? usage;
    }
    assert.equal(text, whole.choices[0].message.content);
    assert.equal(usage.completion_tokens, whole.usage.completion_tokens);
  });

  test('a stream that is left', async () => {
    const stream = await client.chat.completions.create({ ...short, max_tokens: 500, ignore_eos: true, stream: true });
    for await (const chunk of stream) if (chunk.choices[0].delta.content) break; // aborts the request
    assert.ok(stream.controller.signal.aborted);
    assert.ok((await client.chat.completions.create(short)).choices[0].message.content);
  });

  test('completion', async () => {
    const answer = await client.completions.create({ model, prompt: ['One, two,', 'Red,'], max_tokens: 4, temperature: 0 });
    assert.deepEqual(answer.choices.map((choice) => choice.index), [0, 1]);
  });

  test('named tool', async () => {
    const [call, ...more] = (await client.chat.completions.create(named)).choices[0].message.tool_calls;
    assert.deepEqual([call.type, call.function.name, more.length], ['function', 'temperature', 0]);
    checkArguments(call.function.arguments);
  });

  test('named tool, gathered by the client', async () => {
    const kinds = new Set();
    const stream = client.chat.completions.stream(named);
    stream.on('tool_calls.function.arguments.delta', () => kinds.add('delta'));
    stream.on('tool_calls.function.arguments.done', ({ name }) => kinds.add(name));
    const answer = await stream.finalChatCompletion();
    const [call] = answer.choices[0].message.tool_calls;
    assert.deepEqual([...kinds], ['delta', 'temperature']);
    checkArguments(call.function.arguments);
  });

  test('tool loop', async () => {
    const days = [];
    const run = ({ unit, day }) => `${days.push(day)} degrees ${unit}`;
    const tool = { name: 'temperature', description: 'How warm it is', parameters, function: run, parse: JSON.parse };
    const runner = client.chat.completions.runTools({ ...named, tools: [{ type: 'function', function: tool }] });
    await runner.done();
    assert.equal(days.length, 1);
    assert.match(runner.messages.at(-1).content, /^1 degrees (celsius|fahrenheit)$/);
  });

  test('json schema', async () => {
    const response_format = { type: 'json_schema', json_schema: { name: 'day', schema: parameters, strict: true } };
    const { choices } = await client.chat.completions.parse({ ...short, messages: asked, max_tokens: 64, response_format });
    checkArguments(choices[0].message.content);
  });

  test('responses', async () => {
    const answer = await client.responses.create({ model, input: 'Name a colour.', temperature: 0, max_output_tokens: 8 });
    assert.ok(answer.output_text.length > 0);
    assert.ok(answer.usage.output_tokens > 0);
  });

  test('responses stream', async () => {
    const request = { model, input: 'Name a colour.', temperature: 0, max_output_tokens: 8 };
    const whole = await client.responses.create(request);
    let text = '';
    const numbers = [];
    const stream = client.responses.stream(request);
    for await (const event of stream) {
      numbers.push(event.sequence_number);
      if (event.type === 'response.output_text.delta') text += event.delta;
    }
    assert.equal(text, whole.output_text);
    assert.deepEqual(numbers, [...numbers.keys()]);
    assert.equal((await stream.finalResponse()).output_text, text);
  });

  test('responses with a named tool', async () => {
    const answer = await client.responses.create({
      model,
      input: 'How warm is it on the fifth?',
      temperature: 0,
      max_output_tokens: 64,
      tools: [{ type: 'function', name: 'temperature', description: 'How warm it is', parameters, strict: true }],
      tool_choice: { type: 'function', name: 'temperature' },
    });
    const [call] = answer.output.filter((item) => item.type === 'function_call');
    assert.equal(call.name, 'temperature');
    checkArguments(call.arguments);
  });

  test('embeddings', async () => {
    const [packed, plain] = await Promise.all([
      client.embeddings.create({ model: embedder, input: ['the', 'and'] }), // base64, which the client unpacks
      client.embeddings.create({ model: embedder, input: ['the', 'and'], encoding_format: 'float' }),
    ]);
    assert.deepEqual(packed.data.map((item) => item.index), [0, 1]);
    for (const at of [0, 1]) {
      assert.equal(packed.data[at].embedding.length, Number(process.env.EMBEDDING_SIZE));
      packed.data[at].embedding.forEach((value, i) => assert.ok(Math.abs(value - plain.data[at].embedding[i]) < 1e-6));
    }
  });

  test('errors', async () => {
    await assert.rejects(client.chat.completions.create({ ...short, model: 'other' }), (error) => {
      assert.ok(error instanceof NotFoundError, error);
      assert.deepEqual([error.status, error.param, error.code], [404, 'model', 'model_not_found']);
      return error.requestID !== undefined;
    });
    await assert.rejects(client.chat.completions.create({ ...short, top_p: 7 }), (error) => {
      assert.ok(error instanceof BadRequestError, error);
      return error.param === 'top_p';
    });
    const stranger = new OpenAI({ baseURL, apiKey: 'wrong', maxRetries: 0 });
    await assert.rejects(stranger.chat.completions.create(short), (error) => {
      assert.ok(error instanceof AuthenticationError, error);
      return error.status === 401;
    });
  });
});
