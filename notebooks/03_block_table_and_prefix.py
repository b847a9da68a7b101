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
# # The block table, and how a prefix is copied without copying
#
# Keys and values live in *blocks* of a fixed number of tokens, handed out one by one. A request owns no memory, only
# a list of block ids: its *block table*. So two requests that begin with the same words can point at the same blocks.
# This notebook watches that happen and checks it by hand.

# %%
from minivllm import LLM, SamplingParams
from minivllm.core.block_hash import ROOT_HASH, hash_block
from minivllm.trace import record, show_blocks

BLOCK_SIZE = 4
llm = LLM(dtype="float32", max_model_len=256, block_size=BLOCK_SIZE, num_gpu_blocks_override=40)
engine = llm.llm_engine
params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)

# %% [markdown]
# ## A table grows
#
# One request. A block is added when the last one is full, never earlier. The frame marks a block that is new in the
# step; a dot marks a block that has a *name*, because it is full.

# %%
COLOURS = "The three primary colours are red, yellow and blue. Mixing red and"
first = llm.trace(f"{COLOURS} blue gives", params)
for moment in first.moments():
    (row,) = moment.step.rows
    slots = f"slots {row.slot_mapping[0]} to {row.slot_mapping[-1]}"
    print(f"step {moment.step.number:2d}  {row.action:8}{row.num_scheduled_tokens:3d} tokens  {slots:15}", end="  ")
    print("table", moment.tables[row.request_id])

# %%
show_blocks(first)

# %% [markdown]
# Where does token 20 keep its key? In block `table[20 // 4]`, at offset `20 % 4`. That is all there is to it:

# %%
first_id = first.request_ids[0]
table = list(first.moments())[-1].tables[first_id]
slots = [slot for step in first.steps for slot in step.row(first_id).slot_mapping]
assert slots == [table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE for position in range(len(slots))]
print("token 20 is in slot", slots[20], "= block", slots[20] // BLOCK_SIZE, "offset", slots[20] % BLOCK_SIZE)

# %% [markdown]
# ## A prefix is found
#
# The first request has ended and its blocks are free. But nobody has overwritten them, and each full one still has
# its name: a hash of its tokens *and of everything before them*. A second request with the same beginning takes them
# back.

# %%
second = llm.trace(f"{COLOURS} yellow gives", params)
(row,) = second.steps[0].rows
print(row.reason)
print("found:", row.prefix_hits)
show_blocks(second, second.steps[0].number)

# %% [markdown]
# No key and no value was computed or copied for these tokens; only two lists of numbers agree. Let us check the names
# by hand. A hash goes into the next one, so equal hashes mean equal tokens at equal positions:

# %%
parent, names = ROOT_HASH, []
token_ids = second.requests[0].prompt_token_ids
for start in range(0, len(token_ids) - BLOCK_SIZE + 1, BLOCK_SIZE):
    parent = hash_block(parent, token_ids[start : start + BLOCK_SIZE])
    names.append(parent.hex()[:16])
assert list(row.prefix_hits.values()) == names[: len(row.prefix_hits)]
print("hash of each full block:", names)

# %% [markdown]
# Two things to see. Only *full* blocks are found: the tokens behind the last full block are computed again, although
# the other request has them too. And the last token is always computed, even where everything is cached, because its
# logits are needed:

# %%
again = llm.trace(f"{COLOURS} yellow gives", params)
(row,) = again.steps[0].rows
print(
    len(token_ids), "prompt tokens,", row.num_computed_tokens, "from the cache,", row.num_scheduled_tokens, "computed"
)
assert row.num_scheduled_tokens >= 1

# %% [markdown]
# ## Sharing while both run
#
# Two at once, and a third whose first word differs. The stripes are blocks with two owners. The third shares nothing,
# though most of its words are the same: one other token at the beginning changes every hash behind it.

# %%
llm.reset_prefix_cache()
three = llm.trace(
    [f"{COLOURS} blue gives", f"{COLOURS} yellow gives", COLOURS.replace("The", "These")],
    params,
)
show_blocks(three, three.steps[2].number)

# %%
moment = list(three.moments())[2]
shared = [block_id for block_id, owners in moment.owners().items() if len(owners) == 2]
a, b, c = three.request_ids
assert moment.tables[a][: len(shared)] == moment.tables[b][: len(shared)] == shared
assert not set(moment.tables[c]) & set(shared)
print("shared blocks:", shared)

# %% [markdown]
# A `cache_salt` goes into the first hash. Two users with different salts never meet, whatever they send:

# %%
with record(engine) as salted:
    for salt in ("anna", "ben", "anna"):
        llm.generate({"prompt": f"{COLOURS} blue gives", "cache_salt": salt}, params, use_tqdm=False)
print([len(salted.steps[10 * index].rows[0].prefix_hits) for index in range(3)], "blocks found by anna, ben, anna")
assert not salted.steps[10].rows[0].prefix_hits and salted.steps[20].rows[0].prefix_hits

# %% [markdown]
# ## Forgetting
#
# The pool has 39 blocks. When no unnamed one is free, the named block that was unused longest is given away and loses
# its name. A stranger who needs the whole pool comes by, and then nobody finds the prefix any more:

# %%
llm.generate({"prompt_token_ids": list(range(100, 246))}, params, use_tqdm=False)
late = llm.trace({"prompt": f"{COLOURS} blue gives", "cache_salt": "ben"}, params)
print("found after the stranger:", late.steps[0].rows[0].prefix_hits)
assert not late.steps[0].rows[0].prefix_hits

# %% [markdown]
# And the answers? Found or computed, the tokens are the same:

# %%
assert late.output_token_ids(late.request_ids[0]) == first.output_token_ids(first_id)
assert again.output_token_ids(again.request_ids[0]) == second.output_token_ids(second.request_ids[0])
print(repr(first.text_of(first_id)))
