"""Attention of many query rows, for bfloat16 on a CPU with AMX: flash attention (Dao et al. 2022) over paged keys.

First every key and value that a prompt may see is laid out once, as the tiles by which rows are multiplied:

    keys     [num_kv_heads, tiles of 16 keys,  head_size / 32, 16 pairs of dims, 16 keys, 2]
    values   [num_kv_heads, tiles of 32 keys,  head_size / 16, 16 pairs of keys, 16 dims, 2]

Then a thread takes 32 rows of a prompt and one KV head. For each query head of the group, KEYS_AT_ONCE keys at a time:

    scores   [32 rows, keys]  = query . keys, two by two tiles       a row of scores lies as its softmax reads it
    weights  [32 rows, keys]  = exp(scores * scale - largest so far), bfloat16; zero where a row does not see a key
    sums     [32 rows, head_size] = sums * exp(largest before - largest) + weights . values

The query rows need no copy: a tile takes 16 rows of one head as they lie. Rounding the weights to bfloat16 is what
torch's flash attention does too; cpu_rows_amx.py keeps both halves of them.

Called by cpu.py and by decoder_step. Twin in vLLM: csrc/cpu/cpu_attn_amx.hpp.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from minivllm.kernels.amx import (
    TILE_SHAPE,
    load_tiles_shape,
    narrow_row,
    on_stack,
    release_tiles,
    tile_dot_bf16,
    tile_load,
    tile_store,
    tile_zero,
)
from minivllm.kernels.jit import (
    BFLOAT16,
    FLOAT32,
    WORD,
    array_at,
    exp2,
    jit,
    largest_of,
    prange,
    use_torch_threads,
    value_of,
)
from minivllm.kernels.paged_attention.cpu_plan import PROMPT_ROWS, TILE_PAIR, PromptPlan
from minivllm.kernels.paged_attention.cpu_rows import known_head_size

TILE = 16  # rows, keys, or words
ROWS = PROMPT_ROWS  # of one thread's work
PAIR = TILE_PAIR  # keys
KEYS_AT_ONCE = 256  # scores and weights of 32 rows then are 48 KiB
BYTES = 2  # of a bfloat16
TILE_BYTES = 1024
SCORES_BYTES, WEIGHTS_BYTES, SUMS_BYTES, TOTALS_BYTES = (
    ROWS * KEYS_AT_ONCE * 4,
    ROWS * KEYS_AT_ONCE * BYTES,
    ROWS * 128 * 4,  # of the largest head
    2 * ROWS * 4,
)
LOG2_E = 1.4426950408889634


def attend_prompts(
    query: torch.Tensor,  # [num_tokens, num_heads, head_size] bfloat16
    k_cache: torch.Tensor,  # [num_kv_heads, num_blocks, block_size, head_size]
    v_cache: torch.Tensor,  # [num_kv_heads, num_blocks, block_size, head_size]
    out: torch.Tensor,  # [num_tokens, num_heads, head_size], the prompts' rows are written
    plan: PromptPlan,
    scale: float,
) -> None:
    """Attention of the plan's prompts. Caches and out are contiguous; scale is positive."""
    num_tokens, num_heads, head_size = query.shape
    num_kv_heads, num_blocks, block_size, _ = k_cache.shape
    source = query.new_empty(num_tokens + ROWS, num_heads, head_size)  # a tile is read whole
    source[:num_tokens] = query
    use_torch_threads()
    sizes = (num_tokens, num_kv_heads, num_blocks, block_size, num_heads // num_kv_heads, head_size)
    about = (sizes, known_head_size(head_size), plan.prompts)
    lay_out((k_cache.data_ptr(), v_cache.data_ptr()), *about, plan.block_table, plan.tiles, plan.laid_out)
    attend(source.data_ptr(), out.data_ptr(), *about, plan.works, plan.laid_out, scale, plan.window)


@jit(parallel=True)
def lay_out(
    caches: tuple[int, ...],  # k and v: [num_kv_heads, num_blocks, block_size, head_size]
    sizes: tuple[int, ...],  # num_tokens, num_kv_heads, num_blocks, block_size, group, head_size
    known_head_size: Any,  # the head size as a constant
    prompts: Any,  # [num_prompts, 9]
    block_table: Any,  # [num_reqs, max_blocks_per_req]
    tiles: Any,  # [num_prompt_tiles, 2]
    laid_out: tuple[int, ...],  # keys and values, written; how many keys
) -> None:
    """Keys and values as the module's docstring shows them, zeros behind the last (unused slots may hold anything)."""
    _, num_kv_heads, num_blocks, block_size, _, _ = sizes
    head_size = value_of(known_head_size)
    words, num_keys = head_size // 2, laid_out[2]
    for number in prange(len(tiles) * num_kv_heads):
        tile, head = number // num_kv_heads, number % num_kv_heads
        prompt, first = tiles[tile]
        request, _, _, _, first_key, end_key, offset, first_head, end_head = prompts[prompt]
        if not first_head <= head < end_head:
            continue
        slots = head * num_blocks * block_size
        keys = array_at(caches[0], (num_kv_heads * num_blocks * block_size, words), WORD)
        values = array_at(caches[1], (num_kv_heads * num_blocks * block_size, head_size), BFLOAT16)
        target = (head * num_keys + offset + first - first_key) * words  # in words
        turned = array_at(laid_out[0] + target * 4, (2, words // TILE, TILE, TILE), WORD)
        pairs = array_at(laid_out[1] + target * 4, (head_size // TILE, TILE, TILE), WORD)
        for k in range(PAIR):
            key = first + k
            if key < end_key:
                slot = slots + block_table[request, key // block_size] * block_size + key % block_size
                for c in range(words // TILE):
                    for p in range(TILE):
                        turned[k // TILE, c, p, k % TILE] = keys[slot, c * TILE + p]
            else:
                for c in range(words // TILE):
                    for p in range(TILE):
                        turned[k // TILE, c, p, k % TILE] = 0
        for p in range(PAIR // 2):
            one = first + 2 * p
            two = min(one + 1, end_key - 1)
            if one < end_key:
                a = slots + block_table[request, one // block_size] * block_size + one % block_size
                b = slots + block_table[request, two // block_size] * block_size + two % block_size
                mask = np.uint32(0xFFFF0000) if one + 1 < end_key else np.uint32(0)
                for c in range(head_size // TILE):
                    for d in range(TILE):
                        upper = np.uint32(values[b, c * TILE + d]) << np.uint32(16)
                        pairs[c, p, d] = np.uint32(values[a, c * TILE + d]) | upper & mask
            else:
                for c in range(head_size // TILE):
                    for d in range(TILE):
                        pairs[c, p, d] = 0


@jit(parallel=True)
def attend(
    query: int,  # [num_tokens rounded up to 32 and more, num_heads, head_size]
    out: int,  # [num_tokens, num_heads, head_size] written: the prompts' rows
    sizes: tuple[int, ...],
    known_head_size: Any,
    prompts: Any,
    works: Any,  # [num_works, 2]
    laid_out: tuple[int, ...],
    scale: float,
    window: int,
) -> None:
    """Arguments as lay_out's; scale must be positive."""
    num_tokens, num_kv_heads, _, _, group, _ = sizes
    head_size, num_keys = value_of(known_head_size), laid_out[2]
    row_bytes = num_kv_heads * group * head_size * BYTES
    for number in prange(len(works) * num_kv_heads):
        work, head = number // num_kv_heads, number % num_kv_heads
        prompt, first = works[work]
        _, first_row, num_rows, position, first_key, end_key, offset, first_head, end_head = prompts[prompt]
        count = min(ROWS, num_rows - first)
        if not first_head <= head < end_head:  # another rank's
            others = array_at(out, (num_tokens, num_kv_heads, group * head_size), BFLOAT16)
            for row in range(first_row + first, first_row + first + count):
                for d in range(group * head_size):
                    others[row, head, d] = 0
            continue
        load_tiles_shape(TILE_SHAPE.ctypes.data)
        about = (position + first, count, first_key, min(end_key, position + first + count), window)
        place = (head * num_keys + offset) * head_size * BYTES
        for member in range(group):
            at = (first_row + first) * row_bytes + (head * group + member) * head_size * BYTES
            addresses = (query + at, laid_out[0] + place, laid_out[1] + place, out + at)
            attend_block(addresses, row_bytes, about, known_head_size, np.float32(scale * LOG2_E))
        release_tiles()


@jit
def attend_block(
    addresses: tuple[int, ...],  # of the first row's query, the head's keys and values, the first row's result
    row_bytes: int,  # from row to row of query and result
    about: tuple[int, ...],  # position of the first row, rows, first key, end of the keys, window
    known_head_size: Any,
    scale: float,
) -> None:
    """At most 32 rows of one query head."""
    position, count, first_key, end_key, window = about
    query, keys, values, out = addresses
    head_size = value_of(known_head_size)
    scores, weights, sums = on_stack(SCORES_BYTES), on_stack(WEIGHTS_BYTES), on_stack(SUMS_BYTES)
    totals = array_at(on_stack(TOTALS_BYTES), (2, ROWS), FLOAT32)  # largest score and sum of weights so far
    for i in range(ROWS):
        totals[0, i], totals[1, i] = np.float32(-np.inf), np.float32(0)
    summed = array_at(sums, (ROWS, head_size), FLOAT32)
    for i in range(ROWS):
        for d in range(head_size):
            summed[i, d] = 0
    start = max(first_key, (position + 1 - window) // PAIR * PAIR)  # what the first row sees
    for first in range(start, end_key, KEYS_AT_ONCE):
        num_pairs = -(-(min(end_key, first + KEYS_AT_ONCE) - first) // PAIR)
        place = (first - first_key) * head_size * BYTES
        score(query, row_bytes, keys + place, num_pairs, known_head_size, scores)
        for i in range(count):
            row = position + i
            low = min(max(0, row + 1 - window - first), num_pairs * PAIR)
            high = min(max(low, row + 1 - first), num_pairs * PAIR)
            places = (
                scores + i * KEYS_AT_ONCE * 4,
                weights + i * KEYS_AT_ONCE * BYTES,
                sums + i * head_size * 4,
            )
            totals[0, i], factor, total = weigh(
                *places, low, high, num_pairs * PAIR, scale, totals[0, i], known_head_size
            )
            totals[1, i] = totals[1, i] * factor + total
        add(weights, values + place, num_pairs, known_head_size, sums)
    for i in range(count):
        share = np.float32(1) / totals[1, i]
        for d in range(head_size):
            summed[i, d] *= share
        for d in range(0, head_size, TILE):
            narrow_row(sums + (i * head_size + d) * 4, out + i * row_bytes + d * BYTES)


@jit(inline="always")
def score(query: int, row_bytes: int, keys: int, num_pairs: int, known_head_size: Any, scores: int) -> None:
    """scores[32 rows, 32 * num_pairs] = query . keys"""
    head_size, stride = value_of(known_head_size), KEYS_AT_ONCE * 4
    chunks = head_size // 32
    for pair in range(num_pairs):
        tile_zero(0)
        tile_zero(1)
        tile_zero(2)
        tile_zero(3)
        one = keys + pair * 2 * chunks * TILE_BYTES
        for c in range(chunks):
            tile_load(4, query + c * 64, row_bytes)
            tile_load(6, one + c * TILE_BYTES, 64)
            tile_dot_bf16(0, 4, 6)
            tile_load(7, one + (chunks + c) * TILE_BYTES, 64)
            tile_dot_bf16(1, 4, 7)
            tile_load(5, query + TILE * row_bytes + c * 64, row_bytes)
            tile_dot_bf16(2, 5, 6)
            tile_dot_bf16(3, 5, 7)
        at = scores + pair * PAIR * 4
        tile_store(0, at, stride)
        tile_store(1, at + 64, stride)
        tile_store(2, at + TILE * stride, stride)
        tile_store(3, at + TILE * stride + 64, stride)


@jit
def weigh(
    scores: int,  # [KEYS_AT_ONCE] float32, changed
    weights: int,  # [KEYS_AT_ONCE] bfloat16, written
    sums: int,  # [head_size] float32, changed: brought to the new largest score
    low: int,  # the keys that the row sees: low .. high
    high: int,
    end: int,  # of the keys
    scale: float,  # in powers of two
    largest: float,  # scaled score so far
    known_head_size: Any,
) -> tuple[Any, Any, Any]:
    """Softmax of one row's scores, as far as it is known. Returns the new largest score, the factor for sums of weights
    so far, and the sum of these weights."""
    seen = array_at(scores + low * 4, (high - low,), FLOAT32)
    now = max(largest, largest_of(seen) * scale)
    total = np.float32(0)
    for j in range(len(seen)):
        seen[j] = exp2(seen[j] * scale - now)
        total += seen[j]
    factor = exp2(largest - now) if now != largest else np.float32(1)
    if factor != 1:
        so_far = array_at(sums, (value_of(known_head_size),), FLOAT32)
        for d in range(len(so_far)):
            so_far[d] *= factor
    if low > 0:
        before = array_at(scores, (low,), FLOAT32)
        for j in range(len(before)):
            before[j] = 0
    if high < end:
        behind = array_at(scores + high * 4, (end - high,), FLOAT32)
        for j in range(len(behind)):
            behind[j] = 0
    for j in range(0, end, TILE):
        narrow_row(scores + j * 4, weights + j * BYTES)
    return now, factor, total


@jit(inline="always")
def add(weights: int, values: int, num_pairs: int, known_head_size: Any, sums: int) -> None:
    """sums[32 rows, head_size] += weights . values"""
    head_size, stride = value_of(known_head_size), KEYS_AT_ONCE * BYTES
    for d in range(0, head_size, 2 * TILE):
        at = sums + d * 4
        tile_load(0, at, head_size * 4)
        tile_load(1, at + 64, head_size * 4)
        tile_load(2, at + TILE * head_size * 4, head_size * 4)
        tile_load(3, at + TILE * head_size * 4 + 64, head_size * 4)
        for pair in range(num_pairs):
            tile = values + (pair * (head_size // TILE) + d // TILE) * TILE_BYTES
            tile_load(4, weights + pair * 64, stride)
            tile_load(6, tile, 64)
            tile_dot_bf16(0, 4, 6)
            tile_load(7, tile + TILE_BYTES, 64)
            tile_dot_bf16(1, 4, 7)
            tile_load(5, weights + TILE * stride + pair * 64, stride)
            tile_dot_bf16(2, 5, 6)
            tile_dot_bf16(3, 5, 7)
        tile_store(0, at, head_size * 4)
        tile_store(1, at + 64, head_size * 4)
        tile_store(2, at + TILE * head_size * 4, head_size * 4)
        tile_store(3, at + TILE * head_size * 4 + 64, head_size * 4)
