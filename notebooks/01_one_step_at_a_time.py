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
# # One step at a time
#
# An engine serves many requests at once by cutting the work into *steps*. A step has a budget of tokens. There is no
# "prefill phase" and no "decode phase": each request is behind by `num_tokens - num_computed_tokens`, and a step lets
# it catch up. This notebook runs a real model and looks at every step.

# %%
from minivllm import LLM, SamplingParams

llm = LLM(
    max_num_batched_tokens=24,  # a small budget, so that a prompt needs several steps
    num_gpu_blocks_override=12,  # a small cache, so that we see it fill
    max_model_len=512,
    block_size=8,
)
engine = llm.llm_engine

# %% [markdown]
# Three requests. The first two begin with the same words, which will matter.

# %%
PROMPTS = {
    "A": "The three primary colours are red, yellow and blue. Mixing red and blue gives",
    "B": "The three primary colours are red, yellow and blue. Mixing red and yellow gives",
    "C": "Once upon a time",
}
params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
for request_id, prompt in PROMPTS.items():
    engine.add_request(prompt, params, request_id=request_id)

# %% [markdown]
# Now step by step. For every request the scheduler says what it decided and why; the block tables show which blocks of
# the cache each request holds. Look for three things: a prompt that is computed in chunks, a request that finds the
# prefix of another one in the cache, and requests that wait or give way because the twelve blocks are taken.


# %%
def show(step_number: int) -> None:
    scheduler = engine.scheduler
    print(f"step {step_number}")
    for decision in engine.decisions():
        print(f"   {decision.request_id}: {decision.num_scheduled_tokens:2d} tokens  {decision.reason}")
    for request_id, table in scheduler.kv_cache.tables.items():
        request = scheduler.requests[request_id]
        print(f"   {request_id} holds blocks {table.block_ids}: {request.num_computed_tokens} tokens computed")
    print(f"   free: {scheduler.kv_cache.pool.free_block_ids()}")


answers = {}
step_number = 0
while engine.has_unfinished_requests():
    step_number += 1
    for output in engine.step():
        if output.finished:
            answers[output.request_id] = output
    show(step_number)

# %% [markdown]
# The answers, and how many prompt tokens each request found in the cache:

# %%
for request_id, output in sorted(answers.items()):
    print(f"{request_id}: {output.num_cached_tokens:2d} cached  {PROMPTS[request_id]!r} -> {output.outputs[0].text!r}")

# %% [markdown]
# ## Did the neighbours matter?
#
# They must not. Each prompt alone, in an engine that forgot its prefixes, gives the same tokens:

# %%
for request_id, prompt in PROMPTS.items():
    assert llm.reset_prefix_cache()
    alone = llm.generate(prompt, params, use_tqdm=False)[0]
    assert alone.outputs[0].token_ids == answers[request_id].outputs[0].token_ids
print("same tokens alone and together")
