# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Serving the Vercel AI SDK
#
# The AI SDK is how many web pages talk to a language model. It speaks OpenAI's API, so it can talk to `minivllm serve`.
# This page starts the real server, sends what the SDK sends, byte by byte, and looks at what comes back. No node is
# needed; `tox -e sdk` runs the SDK itself against the same server.

# %%
import http.client
import json
import threading
import time
import urllib.request

from charts import lines

from minivllm import LLM, AsyncEngine
from minivllm.entrypoints.server import make_server
from minivllm.entrypoints.service import ServerConfig

llm = LLM(max_model_len=512, kv_cache_memory_bytes=100_000_000)
engine = AsyncEngine(llm.llm_engine)  # one thread that runs the steps
server = make_server(engine, ServerConfig(port=0))  # port 0: any that is free
server.start()
print(f"{server.url} answers")

# %% [markdown]
# ## What a page writes, and what goes over the wire
#
# ```ts
# import { createOpenAI } from '@ai-sdk/openai';
# import { streamText } from 'ai';
#
# const vllm = createOpenAI({ baseURL: 'http://localhost:8000/v1', apiKey: 'none' }); const { textStream } =
# streamText({ model: vllm.chat('minivllm'), prompt: 'Why is the sky blue?', maxOutputTokens: 40 }); for await (const
# text of textStream) process.stdout.write(text);
# ```
#
# The SDK makes one POST of it, and reads the answer as *server-sent events*: lines that begin with `data:`, one JSON
# object each, with an empty line behind, and `[DONE]` at the end.

# %%
with urllib.request.urlopen(f"{server.url}/v1/models") as found:
    MODEL = json.load(found)["data"][0]["id"]


def post(path: str, body: dict) -> http.client.HTTPResponse:
    """One request as the SDK makes it; the answer is not read yet."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    headers = {"Content-Type": "application/json", "Authorization": "Bearer none"}
    connection.request("POST", path, json.dumps(body), headers)
    return connection.getresponse()


def chat(question: str, **fields) -> dict:
    return {"model": MODEL, "messages": [{"role": "user", "content": question}], "temperature": 0, **fields}


streamed = {"stream": True, "stream_options": {"include_usage": True}}  # streamText always sends both
answer = post("/v1/chat/completions", chat("Why is the sky blue? One sentence.", max_tokens=40, **streamed))
print(answer.status, answer.getheader("Content-Type"))
events = [line.decode().rstrip() for line in answer if line.strip()]
for line in [*events[:3], "...", *events[-3:]]:
    print(line[:230])

# %% [markdown]
# The first event says whose turn it is, the next ones carry text, the last but one has `usage`. What the SDK does with
# them is this:

# %%
chunks = [json.loads(line.removeprefix("data: ")) for line in events if not line.endswith("[DONE]")]
print("".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]))
print(chunks[-1]["usage"])

# %% [markdown]
# ## Several readers at once
#
# Three pages ask, one a moment after the other. Nobody waits for an earlier answer to end: each step of the engine
# computes the next token of all who are there. Each point is an event that has arrived.

# %%
arrived: dict[str, list[tuple[float, float]]] = {}


def read(name: str, question: str) -> None:
    arrived[name] = []
    for line in post("/v1/chat/completions", chat(question, max_tokens=32, **streamed)):
        if b'"content"' in line:
            arrived[name].append((time.perf_counter() - started, len(arrived[name]) + 1))


QUESTIONS = {"A": "Tell me about rain.", "B": "Tell me about the sea.", "C": "Tell me about mountains."}
started = time.perf_counter()
readers = [threading.Thread(target=read, args=item) for item in QUESTIONS.items()]
for reader in readers:
    reader.start()
    time.sleep(0.4)
for reader in readers:
    reader.join()
lines(arrived, x_label="seconds", y_label="events")

# %% [markdown]
# ## generateObject
#
# A schema goes along as `response_format`. The server makes a grammar of it ([07](07_structured_output.ipynb)), so the
# object that comes back can be parsed.

# %%
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "calories": {"type": "integer", "maximum": 999}},
    "required": ["name", "calories"],
    "additionalProperties": False,
}
form = {"type": "json_schema", "json_schema": {"name": "response", "strict": True, "schema": SCHEMA}}
answer = json.load(post("/v1/chat/completions", chat("A fruit, as JSON.", max_tokens=60, response_format=form)))
print(json.loads(answer["choices"][0]["message"]["content"]))

# %% [markdown]
# ## Tools
#
# `tools` and `toolChoice: 'required'`: the answer is a call with arguments, in the form that the tool declares. The
# page runs the tool and sends the result in a second request.

# %%
PARAMETERS = {"type": "object", "properties": {"city": {"enum": ["Rome", "Paris", "Oslo"]}}, "required": ["city"]}
tool = {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": PARAMETERS}}
fields = {"max_tokens": 60, "tools": [tool], "tool_choice": "required"}
answer = json.load(post("/v1/chat/completions", chat("How is the weather in Rome?", **fields)))
print(json.dumps(answer["choices"][0]["message"]["tool_calls"], indent=1))

# %% [markdown]
# ## When something is wrong
#
# Errors have OpenAI's form, and name the parameter; the SDK shows the message.

# %%
answer = post("/v1/chat/completions", chat("Hello", temperature=0.5, top_p=7))
print(answer.status, answer.read().decode())

# %% [markdown]
# A reader who closes the page is noticed: the request is given up and its blocks are free for others.

# %%
answer = post("/v1/chat/completions", chat("Count to one thousand.", max_tokens=400, **streamed))
first = next(line for line in answer if b'"content":"' in line and b'"content":""' not in line)
print(json.loads(first.removeprefix(b"data: "))["choices"][0]["delta"], "...")
assert llm.llm_engine.scheduler.running
answer.close()  # the page is closed
while llm.llm_engine.scheduler.running:
    time.sleep(0.05)
print("no request runs any more;", end=" ")
pool = llm.llm_engine.scheduler.kv_cache.pool
print(f"{pool.num_free_blocks} of {pool.num_blocks - 1} blocks are free")

# %%
server.stop()
engine.shutdown()

# %% [markdown]
# From a terminal all of this is `minivllm serve`. The guide's examples for the SDK are in `tests/sdk/`, which runs
# them on four generations of it.
