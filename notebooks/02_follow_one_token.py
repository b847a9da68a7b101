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
# # Follow one token through the fourteen steps
#
# A request comes in as JSON and a token goes out as an event. In between are fourteen steps, each the work of one
# file. Here we do all of them by hand, once, with the engine's own functions, and look at what each one hands to the
# next.
#
# | steps | who | from | to |
# |---|---|---|---|
# | 1-3 | `entrypoints` | JSON | prompt and `SamplingParams` |
# | 4-5 | `engine` | prompt | token ids in a `Request` |
# | 6-8 | `core` | `Request` | who computes what, and in which blocks |
# | 9-12 | `worker`, `models`, `kernels` | token ids | logits |
# | 13 | `sample` | logits | a token id |
# | 14 | `engine`, `entrypoints` | token id | text, and one event |

# %%
import json

import torch

from minivllm import LLM, AsyncEngine, SamplingParams
from minivllm.entrypoints.app import create_app
from minivllm.entrypoints.protocol import ChatRequest, parse, parse_json
from minivllm.entrypoints.sse import frame
from minivllm.outputs import ModelRunnerOutput
from minivllm.sample.metadata import SamplingMetadata
from minivllm.sample.sampler import sample, stages
from minivllm.trace import record, show_blocks, show_trace
from minivllm.worker.input_batch import InputBatch, RequestState

llm = LLM(dtype="float32", max_model_len=512, num_gpu_blocks_override=24)
engine = llm.llm_engine

# %% [markdown]
# ## Steps 1 to 3: JSON becomes a prompt
#
# `app.py` has checked the key and the route. `protocol.py` turns the body into a `ChatRequest`: every field has a
# type, and a field that nobody knows is an error or is named in the answer, never silently dropped. `chat.py` puts
# the messages into the model's own template.

# %%
raw = json.dumps(
    {
        "model": "any",
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0.8,
        "top_p": 0.9,
        "seed": 4,
        "max_tokens": 12,
    }
).encode()
body, ignored = parse(ChatRequest, parse_json(raw))
prompt = engine.render_chat(body.messages)
params = SamplingParams(temperature=body.temperature, top_p=body.top_p, seed=body.seed, max_tokens=body.max_tokens)
print(prompt["prompt"])

# %% [markdown]
# ## Steps 4 and 5: the prompt becomes token ids
#
# In a server the request now crosses from the client's thread to the engine's (`async_engine.py`).
# `input_processor.py` has tokenised it and refused what can never fit. From here on a request is a list of integers.

# %%
request = engine.process_input(prompt, params)
tokenizer = llm.get_tokenizer()
texts = [tokenizer.token_text(token_id).replace("\n", "↵") for token_id in request.prompt_token_ids]
print(len(texts), "tokens:", "|".join(texts))
engine.add_processed(request)
print("waiting:", len(engine.scheduler.waiting), " running:", len(engine.scheduler.running))

# %% [markdown]
# ## Steps 6 to 8: the scheduler decides
#
# `scheduler.py` spends a budget of tokens. It asks `kv_cache_manager.py` for blocks; the answer is a *block table*:
# the first 16 tokens keep their keys and values in the first block, the next 16 in the second.

# %%
step = engine.scheduler.schedule()
(new,) = step.scheduled_new_reqs
print(step.decisions[0].reason)
print("block table:", new.block_ids, " block size:", engine.plan.block_size)

# %% [markdown]
# ## Steps 9 and 10: flat tensors
#
# `input_batch.py` lays all requests of the step side by side. There is no padding and no batch dimension.
# `slot_mapping` says for every token where its key and value go: `block_id * block_size + offset`.

# %%
model_config = engine.config.model
state = RequestState(new, model_config.max_model_len, engine.plan.block_size, model_config.vocab_size)
batch = InputBatch.build([state], [step.num_scheduled_tokens[new.request_id]], engine.plan.block_size)
print("input_ids    ", batch.input_ids[:8].tolist(), "...", list(batch.input_ids.shape))
print("positions    ", batch.positions[:8].tolist(), "...", list(batch.positions.shape))
print("slot_mapping ", batch.attention.slot_mapping[:8].tolist(), "...", list(batch.attention.slot_mapping.shape))
print("logits wanted", batch.logits_indices.tolist(), "(the last token only)")

# %% [markdown]
# ## Steps 11 and 12: the model
#
# One forward. Each layer writes this step's keys and values into the slots, then `paged_attention` reads whatever
# blocks the table names. We look at the shapes around one attention, and at what it wrote.

# %%
runner = engine._executor._runner  # a look inside: the model and its cache are the worker's own business
model, seen = runner.model, []
name, attention = next((name, module) for name, module in model.named_modules() if name.endswith("layers.0.self_attn"))
hook = attention.register_forward_hook(lambda module, given, out: seen.append((given[0].shape, out.shape)))
with torch.inference_mode():
    hidden_states = model(batch.input_ids, batch.positions, runner.kv_caches, batch.attention)  # [num_tokens, hidden]
    logits = model.compute_logits(hidden_states[batch.logits_indices])  # [num_logits, vocab_size]
hook.remove()
k_cache = runner.kv_caches[0][0]  # [num_kv_heads, num_blocks, block_size, head_size] of layer 0
written = k_cache[:, new.block_ids[0]].float().norm(dim=-1)  # [num_kv_heads, block_size]
print(name, [list(shape) for shape in seen[0]])
print("hidden states", list(hidden_states.shape), " logits", list(logits.shape))
print("length of the keys in the first block, head 0:", [round(value, 1) for value in written[0].tolist()])
assert (written > 0).all()

# %% [markdown]
# ## Step 13: logits become a token
#
# `sampler.py` is the only place that knows the order of the stages. Chance enters in one place: one number per seed
# and position, so the same request draws the same token whatever else runs.

# %%
metadata = SamplingMetadata.from_requests([state.row])
told, (chance,) = stages(logits, metadata)
for stage, values in told:
    probabilities = torch.from_numpy(values[0]).softmax(-1)
    best = probabilities.topk(3)
    shown = "  ".join(f"{p:5.1%} {tokenizer.token_text(i)!r}" for p, i in zip(*(x.tolist() for x in best), strict=True))
    print(f"{stage:22} {int((probabilities > 0).sum()):6,} left   {shown}")
drawn = sample(logits, metadata)
(token_id,) = drawn.sampled_token_ids
print(f"\nu = {chance.u:.4f} selects {token_id}, {tokenizer.token_text(token_id)!r}")

# %% [markdown]
# ## Step 14: back up
#
# The scheduler appends the token to the request. `output_processor.py` turns it into text (and would hold back half a
# character, or what may become a stop string). `sse.py` frames it.

# %%
result = ModelRunnerOutput({new.request_id: [token_id]}, {}, {}, {})
outputs = engine.scheduler.update_from_output(step, result)
(output,) = engine.output_processor.process_outputs(outputs).request_outputs
delta = {"index": 0, "delta": {"content": output.outputs[0].text}, "finish_reason": None}
print(frame({"object": "chat.completion.chunk", "choices": [delta]}).decode())
given_up = engine.abort_request(new.request_id)  # its next steps are the engine's own, below

# %% [markdown]
# ## The engine does the same
#
# And a trace tells it. The first token must be ours. Press *Play*, or the arrow keys.

# %%
llm.reset_prefix_cache()
trace = llm.trace(prompt, params)
draws = [draw for one in trace.steps for row in one.rows for draw in row.draws]
assert draws[0].token_id == token_id and draws[0].u == chance.u
print("".join(draw.text for draw in draws))
print(draws[0].why)

# %%
show_trace(trace, height=700)

# %% [markdown]
# The blocks after the last step:

# %%
show_blocks(trace, trace.steps[-1].number)

# %% [markdown]
# ## All of it, over HTTP
#
# The same request through the real front door gives the same tokens.

# %%
llm.reset_prefix_cache()
with record(engine) as served, AsyncEngine(engine) as async_engine:
    answer = create_app(async_engine).test_client().post("/v1/chat/completions", json=json.loads(raw) | {"model": None})
text = answer.json["choices"][0]["message"]["content"]
print(repr(text))
assert served.output_token_ids(served.request_ids[0]) == trace.output_token_ids(trace.request_ids[0])
