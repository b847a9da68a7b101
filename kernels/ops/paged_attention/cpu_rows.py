"""Attention of few query rows over a paged context: one compiled loop that reads the blocks where they lie.

The work is cut into items, shared by the threads: up to ROWS_PER_ITEM rows of a request x one KV head x
KEYS_PER_ITEM keys. An item turns a tile of keys into float32 once and multiplies it with the rows of all query heads
that share the KV head; then softmax; then the same with the values. Items that see different keys of the same rows are
merged by their largest score and their sum, as flash decoding does (Dao et al. 2023).

    item   scores[q, j] = scale * query[q] . key[j]     largest[q], total[q] = sum_j exp(score - largest)
           attended[q]  = sum_j exp(score - largest) * value[j]
    merge  out[q]       = sum_items w * attended / sum_items w * total,     w = exp(its largest - largest of all)

Items begin at fixed positions of a request and each row is summed alone: its bits depend on nothing but its own
request, so this is also the batch-invariant path. Gathering the keys and calling torch's flash kernel, as before, takes
one and a half to two times as long (benchmarks/LOG.md).

Knows no plan of a step but its items. Called by cpu.py. Twin in vLLM: csrc/cpu/cpu_attn_impl.hpp.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from minivllm.kernels.jit import array_at, constant, exp, jit, largest_of, like, narrow, prange, tanh, value_of, widen
from minivllm.kernels.paged_attention.cpu_plan import RowPlan
from minivllm.kernels.paged_attention.cpu_rows_amx import attend_with_amx, can_use_amx, leave_out


def attend_rows(
    query: torch.Tensor,  # [num_tokens, num_heads, head_size]
    k_cache: torch.Tensor,  # [num_kv_heads, num_blocks, block_size, head_size]
    v_cache: torch.Tensor,  # [num_kv_heads, num_blocks, block_size, head_size]
    out: torch.Tensor,  # [num_tokens, num_heads, head_size], the rows of the plan are written
    plan: RowPlan,
    scale: float,
    soft_cap: float | None,
    alibi_slopes: torch.Tensor | None,  # [num_heads] fp32
) -> None:
    """Attention of the plan's rows. query, caches and out are contiguous, all float32 or all bfloat16."""
    num_tokens, num_heads, head_size = query.shape
    num_kv_heads, num_blocks, block_size, _ = k_cache.shape
    group = num_heads // num_kv_heads
    kind = like(query)
    kernel = attend_with_amx if can_use_amx(query.dtype, head_size) else attend
    kernel(
        query.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        out.data_ptr(),
        (num_tokens, num_kv_heads, num_blocks, block_size, group, head_size),
        known_head_size(head_size),
        plan.block_table,
        plan.items,
        (scale, soft_cap or 0.0),
        plan.no_slopes if alibi_slopes is None else alibi_slopes.float().numpy(),
        plan.window,
        plan.attended,
        plan.totals,
        kind,
    )
    if plan.has_shared_rows:
        merge(plan.items, plan.chunks, plan.attended, plan.totals, group, out.data_ptr(), num_tokens, kind)


TILE_KEYS = 16  # turned into float32 at a time; fixed, so that the block size changes no bit
# Four of them are multiplied at once below: a query's value is loaded once for four keys, and the row of sums is
# written once for four values (a tenth faster).
COMMON_HEAD_SIZES = (64, 128)  # with loops of known length a fifth faster
UNKNOWN = 1


def known_head_size(head_size: int) -> np.ndarray:  # [0]
    """As `attend` takes it."""
    return constant(head_size if head_size in COMMON_HEAD_SIZES else UNKNOWN)


@jit(inline="always")
def _load_tile(
    cache: Any,  # [num_kv_heads, num_blocks, block_size, head_size]
    head: int,
    blocks: Any,  # [max_blocks_per_req], of one request
    start: int,
    end_key: int,
    head_size: int,
    tile: Any,  # [TILE_KEYS, head_size] written: keys or values from `start` on, zeros from `end_key` on
) -> None:
    block_size = cache.shape[2]
    num_keys = min(TILE_KEYS, end_key - start)
    block, slot = blocks[start // block_size], start % block_size
    for j in range(num_keys):
        if slot == block_size:
            block, slot = blocks[(start + j) // block_size], 0
        for d in range(head_size):
            tile[j, d] = widen(cache[head, block, slot, d])
        slot += 1
    for j in range(num_keys, TILE_KEYS):  # unused slots may hold anything, NaN too
        for d in range(head_size):
            tile[j, d] = 0


@jit(parallel=True)
def attend(
    query: int,
    k_cache: int,
    v_cache: int,
    out: int,  # written
    sizes: tuple[int, ...],  # num_tokens, num_kv_heads, num_blocks, block_size, group, head_size
    known_head_size: Any,  # the head size as a constant, where it is a common one
    block_table: Any,  # [num_reqs, max_blocks_per_req]
    items: Any,  # [num_items, 9]
    score_options: tuple[float, float],  # scale, and soft cap or 0
    slopes: Any,  # [num_heads]
    window: int,
    attended: Any,  # [num_items, num_kv_heads, rows * group, head_size] written
    totals: Any,  # [num_items, num_kv_heads, rows * group, 2] written: largest score, sum of weights
    like: Any,
) -> None:
    """The items' attention: rows that are alone in an item to `out`, the others to `attended` for merge."""
    num_tokens, num_kv_heads, num_blocks, block_size, group, head_size = sizes
    if value_of(known_head_size) > UNKNOWN:
        head_size = value_of(known_head_size)
    scale, cap = np.float32(score_options[0]), np.float32(score_options[1])
    queries = array_at(query, (num_tokens, num_kv_heads, group, head_size), like)
    keys = array_at(k_cache, (num_kv_heads, num_blocks, block_size, head_size), like)
    values = array_at(v_cache, (num_kv_heads, num_blocks, block_size, head_size), like)
    outs = array_at(out, (num_tokens, num_kv_heads, group, head_size), like)
    for work in prange(len(items) * num_kv_heads):
        item, head = work // num_kv_heads, work % num_kv_heads
        request, first_row, num_rows, position, first_key, end_key, is_alone, first_head, end_head = items[item]
        num_queries = num_rows * group
        if not first_head <= head < end_head:
            leave_out(items[item], item, head, group, outs, attended, totals)
            continue
        q = np.empty((num_queries, head_size), np.float32)
        num_tiles = (end_key - first_key + TILE_KEYS - 1) // TILE_KEYS
        weights = np.empty((num_queries, num_tiles * TILE_KEYS), np.float32)
        tile = np.empty((TILE_KEYS, head_size), np.float32)
        for i in range(num_queries):
            for d in range(head_size):
                q[i, d] = widen(queries[first_row + i // group, head, i % group, d]) * scale

        first_tile = max(0, position + 1 - window - first_key) // TILE_KEYS  # that any of the rows sees

        for t in range(first_tile, num_tiles):
            start = first_key + t * TILE_KEYS
            _load_tile(keys, head, block_table[request], start, end_key, head_size, tile)
            for i in range(num_queries):
                for j in range(0, TILE_KEYS, 4):
                    one = two = three = four = np.float32(0)
                    for d in range(head_size):
                        one += q[i, d] * tile[j, d]
                        two += q[i, d] * tile[j + 1, d]
                        three += q[i, d] * tile[j + 2, d]
                        four += q[i, d] * tile[j + 3, d]
                    scores = weights[i, t * TILE_KEYS + j :]
                    scores[0], scores[1], scores[2], scores[3] = one, two, three, four

        for i in range(num_queries):
            row = position + i // group  # its position; it sees keys row - window + 1 .. row
            low = max(0, row + 1 - window - first_key)
            seen = weights[i, low : max(low, min(end_key, row + 1) - first_key)]  # [keys that this row sees]
            slope = slopes[head * group + i % group]
            if cap > 0:
                for j in range(len(seen)):
                    seen[j] = cap * tanh(seen[j] / cap)
            if slope != 0:
                for j in range(len(seen)):
                    seen[j] -= slope * np.float32(row - first_key - low - j)
            largest, total = largest_of(seen), np.float32(0)
            for j in range(len(seen)):
                seen[j] = exp(seen[j] - largest)
                total += seen[j]
            weights[i, :low] = 0
            weights[i, low + len(seen) :] = 0
            totals[item, head, i, 0], totals[item, head, i, 1] = largest, total
            for d in range(head_size):
                q[i, d] = 0  # from here on the sum of weighted values

        for t in range(first_tile, num_tiles):
            start = first_key + t * TILE_KEYS
            _load_tile(values, head, block_table[request], start, end_key, head_size, tile)
            for i in range(num_queries):
                for j in range(0, TILE_KEYS, 4):
                    four_weights = weights[i, t * TILE_KEYS + j :]
                    one, two, three, four = four_weights[0], four_weights[1], four_weights[2], four_weights[3]
                    for d in range(head_size):
                        first = one * tile[j, d] + two * tile[j + 1, d]
                        q[i, d] += first + three * tile[j + 2, d] + four * tile[j + 3, d]
        for i in range(num_queries):
            if is_alone:  # no other item about these rows
                share = np.float32(1) / totals[item, head, i, 1]
                for d in range(head_size):
                    outs[first_row + i // group, head, i % group, d] = narrow(q[i, d] * share, like)
            else:
                for d in range(head_size):
                    attended[item, head, i, d] = q[i, d]


@jit
def merge(
    items: Any,  # [num_items, 9]
    chunks: Any,  # [num_chunks + 1]
    attended: Any,  # [num_items, num_kv_heads, rows * group, head_size] changed
    totals: Any,  # [num_items, num_kv_heads, rows * group, 2]
    group: int,
    out: int,  # [num_tokens, num_kv_heads, group, head_size] written
    num_tokens: int,
    like: Any,
) -> None:
    _, num_kv_heads, _, head_size = attended.shape
    outs = array_at(out, (num_tokens, num_kv_heads, group, head_size), like)
    for chunk in range(len(chunks) - 1):
        first, end = chunks[chunk], chunks[chunk + 1]
        first_row, num_rows = items[first, 1], items[first, 2]
        for head in range(num_kv_heads):
            for i in range(num_rows * group if end - first > 1 else 0):
                largest, total = np.float32(-np.inf), np.float32(0)
                for item in range(first, end):
                    largest = totals[item, head, i, 0] if totals[item, head, i, 0] > largest else largest
                summed = attended[first, head, i]  # [head_size]
                for item in range(first, end):
                    weight = exp(totals[item, head, i, 0] - largest)
                    total += weight * totals[item, head, i, 1]
                    for d in range(head_size):
                        others = np.float32(0) if item == first else summed[d]
                        summed[d] = others + weight * attended[item, head, i, d]
                for d in range(head_size):
                    outs[first_row + i // group, head, i % group, d] = narrow(summed[d] / total, like)
