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
# # One scheduler loop
#
# There is one loop. Every turn of it hands out a budget of tokens: first to those that run, in order, then to those
# that wait, from the head of the line. When the cache is full, the one that matters least gives its blocks back and
# starts again later. This notebook draws a real run and lets you find each of these sentences in the picture.

# %%
from minivllm import LLM, SamplingParams
from minivllm.trace import compare, record, replay, show_blocks, show_schedule
from minivllm.trace.replay import outcomes

SETTINGS = {
    "max_model_len": 256,
    "block_size": 8,
    "num_gpu_blocks_override": 18,  # 17 blocks of 8 tokens: tight on purpose
    "max_num_batched_tokens": 32,  # the budget of a step
    "max_num_seqs": 4,  # requests that run at once
    "batch_invariant": True,  # a request's bits do not depend on who runs beside it, nor on how its prompt was cut
}
llm = LLM(**SETTINGS)
engine = llm.llm_engine

# %% [markdown]
# Six requests; two of them come while the others run already.

# %%
EARLY = {
    "story": ("Once upon a time, in a small village between two rivers, there lived a clockmaker who", 26),
    "list": ("The planets of the solar system, in order from the sun, are Mercury, Venus,", 22),
    "code": ("def fibonacci(n):\n    if n < 2:\n        return n\n    return", 18),
    "short": ("The capital of France is", 6),
}
LATE = {
    "long": ("The following is a long list of words: " + "apple banana cherry " * 14, 8),
    "last": ("Two plus two is", 5),
}


def add(requests: dict) -> None:
    for request_id, (prompt, max_tokens) in requests.items():
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        engine.add_request(prompt, params, request_id=request_id)


with record(engine, num_top=0) as trace:  # 0: no stages of the sampler, they are not today's subject
    add(EARLY)
    for _ in range(5):
        engine.step()
    add(LATE)
    while engine.has_unfinished_requests():
        engine.step()
print(len(trace.steps), "steps,", sum(step.num_tokens for step in trace.steps), "tokens computed")

# %% [markdown]
# One line per request, one column per step. A number says how many tokens the request computed. Blue is the prompt,
# light blue a piece of it that the budget allowed, green one token at a time, grey waiting, red giving way. Hold the
# mouse over a cell: the scheduler says why.

# %%
show_schedule(trace)

# %% [markdown]
# ## The budget
#
# No step computes more than 32 tokens, and running requests come first. So a long prompt is cut into whatever is left
# over, and nobody who is already speaking has to stop for it:

# %%
for step in trace.steps:
    for row in step.rows:
        if row.action == "chunk":
            print(f"step {step.number:2d}  {row.request_id:6} {row.reason}")
assert max(step.num_tokens for step in trace.steps) <= 32

# %% [markdown]
# ## Waiting
#
# For a place (only four may run), for the budget, or for blocks. Who stands behind somebody in the line waits for
# him, even if his own needs are small: nobody is overtaken.

# %%
told = set()
for step in trace.steps:
    for row in step.rows:
        if row.action.startswith("wait") and (row.request_id, row.action) not in told:
            told.add((row.request_id, row.action))
            print(f"step {step.number:2d}  {row.request_id:6} {row.reason}")

# %% [markdown]
# ## Giving way
#
# All requests grow, and at some step somebody needs a block and none is free. The one that was admitted last gives
# its blocks back. It keeps the tokens it has drawn, and computes their keys and values again when it returns;
# whatever the prefix cache still holds of them it does not even need to compute.

# %%
victims = [(step.number, row) for step in trace.steps for row in step.rows if row.action == "preempt"]
for number, row in victims:
    print(f"step {number}: {row.request_id} {row.reason}")
    later = ((step.number, step.row(row.request_id)) for step in trace.steps[number:])
    back_in, back = next((number, found) for number, found in later if found and found.num_scheduled_tokens)
    print(f"   back in step {back_in}: {back.num_computed_tokens} tokens from the cache", end=", ")
    print(f"{back.num_scheduled_tokens} computed")
assert victims

# %% [markdown]
# The pool in the step before the first of them, and in that step:

# %%
show_blocks(trace, victims[0][0] - 1)

# %%
show_blocks(trace, victims[0][0])

# %% [markdown]
# ## What if?
#
# The run is a recording, so it can be run again. Without a change it is the same to the last bit of every logit:

# %%
assert list(compare(trace, replay(trace))) == []
print("identical")

# %% [markdown]
# With a larger cache nobody gives way; with a smaller budget everything takes longer; and the answers are the same.

# %%
larger = replay(trace, {"num_gpu_blocks_override": 64})
smaller = replay(trace, {"max_num_batched_tokens": 8})
print(f"{'':8}{'as it was':>24}{'larger cache':>24}{'smaller budget':>24}")
for request_id, then in outcomes(trace).items():
    changed = [outcomes(run)[request_id] for run in (larger, smaller)]
    cells = [f"{one.num_steps} steps, gave way {one.num_preemptions}" for one in (then, *changed)]
    print(f"{request_id:8}" + "".join(f"{cell:>24}" for cell in cells))
    assert all(one.token_ids == then.token_ids for one in changed)

# %%
show_schedule(smaller)

# %% [markdown]
# With the small budget prompts are cut into many pieces, light blue, and those who come late wait longer for them.
#
# To see seconds instead of steps, write the trace for a profiler's viewer and open the file there:
# `json.dump(chrome_trace(trace), file)`, then ui.perfetto.dev or chrome://tracing.
