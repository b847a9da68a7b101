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
# # Paged attention, from the formula to the kernel
#
# Attention is one line of mathematics. Between that line and a kernel that serves many requests lie three ideas: keys
# and values live in blocks (*paged*), they are read tile by tile with a running maximum (*online softmax*), and long
# contexts are cut into parts that run side by side (*split-KV*). This page takes them one at a time, checks each
# against the one before, and then watches the real Triton kernel. It runs in Triton's interpreter, so no GPU is
# needed.

# %%
import os

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

from dataclasses import replace

import torch
from charts import grid, lines

from minivllm.kernels.paged_attention import AttentionMetadata, kernel, paged_attention
from minivllm.kernels.paged_attention.split import choose_launch
from minivllm.kernels.trace import trace

torch.manual_seed(3)
HEAD_SIZE, BLOCK_SIZE, NUM_BLOCKS, SEQ_LEN = 16, 16, 20, 200
SCALE = HEAD_SIZE**-0.5

# %% [markdown]
# ## The formula
#
# One query, the keys and values of all tokens so far, one head. Each key gets a score, softmax makes weights of the
# scores, and the answer is the weighted mean of the values.

# %%
query = torch.randn(HEAD_SIZE)  # [head_size]
keys = 2 * torch.randn(SEQ_LEN, HEAD_SIZE)  # [seq_len, head_size]
values = torch.randn(SEQ_LEN, HEAD_SIZE)  # [seq_len, head_size]


def naive(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    scores = keys @ query * SCALE  # [seq_len]
    return torch.softmax(scores, dim=0) @ values  # [head_size]


wanted = naive(query, keys, values)

# %% [markdown]
# ## Keys in blocks
#
# A server does not know how long an answer will be, so it does not reserve a stretch of memory for it. The cache is
# cut into blocks of 16 tokens; a request takes one when it needs one, wherever it lies, and writes its number into
# its *block table*. Slot = block * 16 + offset.

# %%
num_used = -(-SEQ_LEN // BLOCK_SIZE)
block_table = torch.randperm(NUM_BLOCKS - 1)[:num_used] + 1  # [num_blocks_used]; block 0 is never given away
k_cache = torch.full((1, NUM_BLOCKS, BLOCK_SIZE, HEAD_SIZE), torch.nan)  # [num_kv_heads, num_blocks, block_size, ...]
v_cache = torch.full_like(k_cache, torch.nan)  # not a number: who reads a slot that is not ours will see it
positions = torch.arange(SEQ_LEN)  # [seq_len]
blocks, offsets = block_table[positions // BLOCK_SIZE], positions % BLOCK_SIZE  # [seq_len] each
k_cache[0, blocks, offsets] = keys
v_cache[0, blocks, offsets] = values
print("block table:", block_table.tolist())

KINDS = {"first 64 tokens": "#3969ac", "next 64": "#6f9fd8", "next 64 ": "#a9c8ea", "the last 8": "#e07b39"}
owner = {(int(b), int(o)): list(KINDS)[p // 64] for p, b, o in zip(range(SEQ_LEN), blocks, offsets, strict=True)}
grid(
    [[owner.get((block, offset)) for block in range(NUM_BLOCKS)] for offset in range(BLOCK_SIZE)],
    row_labels=[f"offset {offset}" for offset in range(BLOCK_SIZE)],
    column_labels=[f"block {block}" for block in range(NUM_BLOCKS)],
    legend=KINDS,
)

# %% [markdown]
# Each column is a block; what is white belongs to others. Reading through the table gives the same answer. The engine's
# reference, `kernels/ops/paged_attention/reference.py`, does this for many requests and heads.

# %%
metadata = AttentionMetadata(
    query_start_loc=[0, 1],  # one request, one row: it decodes
    seq_lens=[SEQ_LEN],
    block_table=block_table[None].to(torch.int32),
    slot_mapping=torch.tensor([-1]),
    block_size=BLOCK_SIZE,
)
through_table = naive(query, k_cache[0, blocks, offsets], v_cache[0, blocks, offsets])
reference = paged_attention(query[None, None], k_cache, v_cache, metadata, scale=SCALE, impl="reference")[0, 0]
print("largest difference:", (through_table - wanted).abs().max().item(), (reference - wanted).abs().max().item())
torch.testing.assert_close(reference, wanted)

# %% [markdown]
# ## Tile by tile
#
# A chip has little fast memory: it cannot hold all keys. So it reads a tile, here 32 keys, and keeps three things: the
# largest score so far, the sum of `exp(score - largest)`, and the same sum times the values. When a larger score comes,
# both sums are too large by `exp(new - old)`, and are corrected. Nothing is read twice.

# %%
TILE = 32


def online(tiles: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, list[tuple[float, float]]]:
    """The answer, and (largest, log of the sum) after each tile."""
    largest, total, out, history = -torch.inf, torch.tensor(0.0), torch.zeros(HEAD_SIZE), []
    for tile_keys, tile_values in tiles:
        scores = tile_keys @ query * SCALE  # [TILE]
        new = max(largest, scores.max().item())
        rescale = torch.tensor(largest - new).exp()
        weights = (scores - new).exp()  # [TILE]
        total = total * rescale + weights.sum()
        out = out * rescale + weights @ tile_values
        largest = new
        history.append((largest, largest + total.log().item()))
    return out / total, history


tiles = list(zip(keys.split(TILE), values.split(TILE), strict=True))
answer, history = online(tiles)
torch.testing.assert_close(answer, wanted)
steps = [min(TILE * (number + 1), SEQ_LEN) for number in range(len(tiles))]
lines(
    {
        "largest score so far": [(n, largest) for n, (largest, _) in zip(steps, history, strict=True)],
        "log of the sum of exp(score)": [(n, lse) for n, (_, lse) in zip(steps, history, strict=True)],
    },
    x_label="keys seen",
    y_label="",
)

# %% [markdown]
# The upper line is the *log-sum-exp*, lse. It says how much weight a stretch of keys has against any other, and will be
# all that is needed to put parts together.
#
# ## The kernel
#
# `kernels/ops/paged_attention/kernel.py` does this in Triton. A *program* is one tile of query rows of one request; a
# row of a decode is alone, so one program walks over all 7 tiles. The tracer tells every load and store that it
# makes.

# %%
SHAPE = {"num_tokens": 1, "num_reqs": 1, "max_seq_len": SEQ_LEN, "num_kv_heads": 1, "group": 1}
whole = choose_launch(**SHAPE, head_size=HEAD_SIZE, multiprocessors=1)
whole = replace(whole, tile=TILE, split_len=7 * TILE)  # a GPU would take longer tiles
call = {"query": query[None, None], "k_cache": k_cache, "v_cache": v_cache, "metadata": metadata, "scale": SCALE}
call |= {"sliding_window": None, "soft_cap": None, "alibi_slopes": None}
traced = trace(kernel.paged_attention, {**call, "launch": whole})
(launch,) = traced.launches
program = next(one for one in launch.programs if one.tiles)
for access in program.accesses[-8:]:
    print(f"line {access.line}: {access.kind:5} {access.text}")

# %% [markdown]
# It loads keys and values of two blocks at a time, in the order of the block table, and stores one row. What it knows
# after each tile is what `online` knew, in base 2:

# %%
LOG2_E = 1.4426950408889634
for tile, (largest, _) in zip(program.tiles, history, strict=True):
    theirs = tile.running_max[0] / LOG2_E
    print(f"keys {tile.first_key:3d} - {tile.first_key + TILE - 1:3d}: largest {theirs:.4f}, ours {largest:.4f}")
    assert abs(theirs - largest) < 1e-3
stored = torch.tensor(program.accesses[-1].values)  # [head_size]
torch.testing.assert_close(stored, wanted)

# %% [markdown]
# The tracer's page steps through all of it. Press play, and watch the blocks light up.

# %%
trace(kernel.paged_attention, {**call, "launch": whole})

# %% [markdown]
# ## Split-KV
#
# One program on a GPU with a hundred multiprocessors: all others are idle, and a context of 100,000 keys takes for
# ever. So the keys are cut into splits, each with a program of its own, and a second kernel merges the parts. Here:
# two tiles for each.

# %%
split = replace(whole, split_len=2 * TILE, num_splits=4)
metadata.plan = None
split_trace = trace(kernel.paged_attention, {**call, "launch": split})
attention, merge = split_trace.launches
workers = [one for one in attention.programs if one.tiles]
print(f"{attention.kernel}: grid {attention.grid};  {merge.kernel}: grid {merge.grid}")
READ = {"read by this program": "#3969ac"}
rows = [
    [
        "read by this program" if any(tile.first_key == first for tile in worker.tiles) else None
        for first in range(0, SEQ_LEN, TILE)
    ]
    for worker in [program, *workers]
]
grid(
    rows,
    row_labels=["without splits", *[f"split {worker.index[2]}" for worker in workers]],
    column_labels=[f"keys {first} ..." for first in range(0, SEQ_LEN, TILE)],
    legend=READ,
    cell=26,
)

# %% [markdown]
# ## Putting parts together
#
# Each split gives an answer of its own, as if there were no other keys, and its lse. A part's weight is its share of
# the whole sum: `exp(lse)` of the part over the sum of all. That is exact, not an approximation.

# %%
parts, lses = [], []
for first in range(0, SEQ_LEN, 2 * TILE):
    part = slice(first, first + 2 * TILE)
    scores = keys[part] @ query * SCALE
    parts.append(torch.softmax(scores, dim=0) @ values[part])
    lses.append(torch.logsumexp(scores, dim=0))
shares = torch.softmax(torch.stack(lses), dim=0)  # [num_splits]
merged = shares @ torch.stack(parts)  # [head_size]
print("share of each split:", [round(share, 3) for share in shares.tolist()])
torch.testing.assert_close(merged, wanted)
torch.testing.assert_close(torch.tensor(merge.programs[0].accesses[-1].values), wanted)
print("the formula, the table, the tiles, the kernel and the merged splits agree")

# %% [markdown]
# ## Read on
#
# - `kernels/ops/paged_attention/README.md`: grouped heads, windows, quantised keys, and when contexts are split.
# - `minivllm lab start online_softmax` is the exercise to this page.
# - `minivllm.kernels.trace.trace` watches every other kernel as well.
