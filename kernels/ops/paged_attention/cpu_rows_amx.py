"""attend of cpu_rows.py for bfloat16 on a CPU with AMX: the same items, softmax and sums, other products.

Scores. A tile of 16 keys is a left-hand side just as it lies in its block. The queries are turned once per item into
right-hand sides, 16 of them at a time; so a tile of scores is [16 keys, 16 queries], two or four instructions for 16
keys whatever the number of query heads that share them.

Values. Weights are split into two bfloat16, upper + lower, which together have 16 bits: eight queries fill a left-hand
side of 16 rows, and nothing is lost that float32 would have kept. Values are right-hand sides once each two
rows of them are interleaved.

Blocks of 2 KiB from all over the memory come at half the speed of one long run. So while keys are multiplied the values
of the same item are asked for, and while values are interleaved the keys of the thread's next item.

Called by cpu_rows.py and by decoder_step. Twin in vLLM: csrc/cpu/cpu_attn_amx.hpp.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from minivllm.kernels.amx import (
    HAS_AMX,
    TILE_SHAPE,
    load_tiles_shape,
    prefetch,
    release_tiles,
    tile_dot_bf16,
    tile_load,
    tile_store,
    tile_zero,
)
from minivllm.kernels.jit import array_at, exp, jit, largest_of, narrow, prange, tanh, value_of, widen

TILE = 16  # keys, or queries
EIGHT = 8  # queries whose upper and lower weights fill a tile
BYTES = 2  # of a bfloat16
CACHE_LINE = 64


def can_use_amx(dtype: torch.dtype, head_size: int) -> bool:
    """The head's size must be whole tiles, and four at most."""
    return HAS_AMX and dtype == torch.bfloat16 and head_size in (64, 128)


@jit(parallel=True)
def attend_with_amx(
    query: int,
    k_cache: int,
    v_cache: int,
    out: int,  # written
    sizes: tuple[int, ...],  # num_tokens, num_kv_heads, num_blocks, block_size, group, head_size
    known_head_size: Any,  # the head size as a constant
    block_table: Any,  # [num_reqs, max_blocks_per_req]
    items: Any,  # [num_items, 9]
    score_options: tuple[float, float],  # scale, and soft cap or 0
    slopes: Any,  # [num_heads]
    window: int,
    attended: Any,  # [num_items, num_kv_heads, rows * group, head_size] written
    totals: Any,  # [num_items, num_kv_heads, rows * group, 2] written: largest score, sum of weights
    like: Any,
) -> None:
    """Arguments as attend's."""
    num_works = len(items) * sizes[1]
    for work in prange(num_works):
        load_tiles_shape(TILE_SHAPE.ctypes.data)
        attend_item(
            np.int64(work),
            min(work + 1, num_works - 1),
            (query, k_cache, v_cache, out),
            sizes,
            known_head_size,
            block_table,
            items,
            score_options,
            slopes,
            window,
            attended,
            totals,
            like,
        )
        release_tiles()


@jit
def attend_item(
    work: int,  # item * num_kv_heads + KV head
    following: int,  # the thread's next work
    addresses: tuple[int, ...],  # query, k_cache, v_cache, out
    sizes: tuple[int, ...],
    known_head_size: Any,
    block_table: Any,
    items: Any,
    score_options: tuple[float, float],
    slopes: Any,
    window: int,
    attended: Any,
    totals: Any,
    like: Any,
) -> None:
    """One item and one KV head of it."""
    num_tokens, num_kv_heads, num_blocks, block_size, group, _ = sizes
    query, k_cache, v_cache, out = addresses
    head_size, num_slots = value_of(known_head_size), num_blocks * block_size
    head_bytes = num_slots * head_size * BYTES
    queries = array_at(query, (num_tokens, num_kv_heads, group, head_size), like)
    outs = array_at(out, (num_tokens, num_kv_heads, group, head_size), like)
    item, head = work // num_kv_heads, work % num_kv_heads
    request, first_row, num_rows, position, first_key, end_key, is_alone, first_head, end_head = items[item]
    if not first_head <= head < end_head:
        leave_out(items[item], item, head, group, outs, attended, totals)
        return
    num_queries = num_rows * group
    first_pair = max(0, position + 1 - window - first_key) // (2 * TILE)  # of tiles, that any of the rows sees
    num_pairs = -(-(end_key - first_key) // (2 * TILE))

    keys = array_at(k_cache + head * head_bytes, (num_slots, head_size), like)
    values = array_at(v_cache + head * head_bytes, (num_slots, head_size), like)
    if block_size % TILE == 0:
        starts = slots_of_tiles(block_table[request], block_size, first_key, end_key)
    else:  # a tile would lie in several blocks
        keys = gather(keys, block_table[request], block_size, first_key, end_key)
        values = gather(values, block_table[request], block_size, first_key, end_key)
        starts = np.arange(0, len(keys), TILE)
    scores = np.empty((num_pairs * 2 * TILE, TILE), np.float32)
    weights = np.empty(num_pairs * 2 * TILE, np.float32)  # of one query
    # [eights, upper and lower, 8 queries, keys]; zero for keys that a query does not see
    shares = np.zeros((-(-num_queries // EIGHT), 2, EIGHT, num_pairs * 2 * TILE), like.dtype)
    for first in range(0, num_queries, TILE):
        count = min(TILE, num_queries - first)
        turned = np.zeros((head_size // 2, TILE, 2), like.dtype)
        for i in range(count):
            row, member = first_row + (first + i) // group, (first + i) % group
            for p in range(head_size // 2):
                turned[p, i, 0] = queries[row, head, member, 2 * p]
                turned[p, i, 1] = queries[row, head, member, 2 * p + 1]
        score(turned, keys, values, starts, 2 * first_pair, known_head_size, scores)
        for i in range(count):
            q = first + i
            row, slope = position + q // group, slopes[head * group + q % group]
            low = max(0, row + 1 - window - first_key)  # it sees positions row - window + 1 .. row
            high = max(low, min(end_key, row + 1) - first_key)
            seen = weights[low:high]
            softmax(scores[low:high, i], score_options, slope, row - first_key - low, totals[item, head, q], seen)
            split(seen, shares[q // EIGHT, 0, q % EIGHT, low:high], shares[q // EIGHT, 1, q % EIGHT, low:high], like)

    about = items[following // num_kv_heads]
    next_starts = slots_of_tiles(block_table[about[0]], block_size, about[4], about[5])
    next_keys = k_cache + following % num_kv_heads * head_bytes
    pairs = interleave(values, starts, first_pair, end_key - first_key, known_head_size, next_keys, next_starts)
    sums = np.empty((2, EIGHT, head_size), np.float32)
    for eight in range(len(shares)):
        add_values(shares[eight], pairs, first_pair, sums)
        for i in range(min(EIGHT, num_queries - eight * EIGHT)):
            q = eight * EIGHT + i
            if is_alone:  # no other item about these rows
                share = np.float32(1) / totals[item, head, q, 1]
                for d in range(head_size):
                    value = (sums[0, i, d] + sums[1, i, d]) * share
                    outs[first_row + q // group, head, q % group, d] = narrow(value, like)
            else:
                for d in range(head_size):
                    attended[item, head, q, d] = sums[0, i, d] + sums[1, i, d]


@jit
def leave_out(
    item: Any,  # [9]
    number: int,
    head: int,
    group: int,
    outs: Any,  # [num_tokens, num_kv_heads, group, head_size] written, where the item is alone
    attended: Any,  # [num_items, num_kv_heads, rows * group, head_size] written
    totals: Any,  # [num_items, num_kv_heads, rows * group, 2] written
) -> None:
    """Zeros for a KV head that another rank computes."""
    first_row, num_rows, is_alone = item[1], item[2], item[6]
    for i in range(num_rows * group):
        totals[number, head, i, 0], totals[number, head, i, 1] = 0, 1
        for d in range(outs.shape[3]):
            attended[number, head, i, d] = 0
            if is_alone:
                outs[first_row + i // group, head, i % group, d] = 0


@jit
def slots_of_tiles(blocks: Any, block_size: int, first_key: int, end_key: int) -> Any:
    """[num_tiles]: the slot of each tile's first key. blocks: [max_blocks_per_req]"""
    starts = np.empty(-(-(end_key - first_key) // TILE), np.int64)
    for t in range(len(starts)):
        key = first_key + t * TILE
        starts[t] = blocks[key // block_size] * block_size + key % block_size
    return starts


@jit
def gather(cache: Any, blocks: Any, block_size: int, first_key: int, end_key: int) -> Any:
    """A request's rows of cache [num_slots, head_size] one behind the other, whole tiles."""
    rows = np.zeros((-(-(end_key - first_key) // TILE) * TILE, cache.shape[1]), cache.dtype)
    for key in range(first_key, end_key):
        slot = blocks[key // block_size] * block_size + key % block_size
        for d in range(cache.shape[1]):
            rows[key - first_key, d] = cache[slot, d]
    return rows


@jit(inline="always")
def ask_for_tile(address: int, num_bytes: int) -> None:
    for line in range(0, num_bytes, CACHE_LINE):
        prefetch(address + line)


@jit
def score(
    turned: Any,  # [head_size / 2, 16 queries, 2]
    keys: Any,  # [num_slots, head_size], of one head
    values: Any,  # [num_slots, head_size], only asked for
    starts: Any,  # [num_tiles]
    first_tile: int,
    known_head_size: Any,
    scores: Any,  # [num_tiles * 16, 16 queries] written
) -> None:
    """scores[key, query] = key . query for whole tiles."""
    head_size = value_of(known_head_size)
    row_bytes, tile_bytes, turned_at = head_size * BYTES, TILE * TILE * 2 * BYTES, turned.ctypes.data
    keys_at, values_at = keys.ctypes.data, values.ctypes.data
    tile_load(4, turned_at, 64)
    tile_load(5, turned_at + tile_bytes, 64)
    if head_size > 64:
        tile_load(6, turned_at + 2 * tile_bytes, 64)
        tile_load(7, turned_at + 3 * tile_bytes, 64)
    for t in range(first_tile, len(starts)):
        at = keys_at + starts[t] * row_bytes
        ask_for_tile(values_at + starts[t] * row_bytes, TILE * row_bytes)
        tile_zero(0)
        tile_load(1, at, row_bytes)
        tile_dot_bf16(0, 1, 4)
        tile_load(2, at + 64, row_bytes)
        tile_dot_bf16(0, 2, 5)
        if head_size > 64:
            tile_load(1, at + 128, row_bytes)
            tile_dot_bf16(0, 1, 6)
            tile_load(2, at + 192, row_bytes)
            tile_dot_bf16(0, 2, 7)
        tile_store(0, scores.ctypes.data + t * TILE * TILE * 4, TILE * 4)


@jit
def softmax(
    scores: Any,  # [num_keys] strided: a column
    score_options: tuple[float, float],  # scale, and soft cap or 0
    slope: float,
    distance: int,  # from the first of the keys to the query
    totals: Any,  # [2] written: largest score, sum of weights
    weights: Any,  # [num_keys] written: exp(score - largest)
) -> None:
    scale, cap = np.float32(score_options[0]), np.float32(score_options[1])
    for j in range(len(weights)):
        weights[j] = scores[j] * scale
    if cap > 0:
        for j in range(len(weights)):
            weights[j] = cap * tanh(weights[j] / cap)
    if slope != 0:
        for j in range(len(weights)):
            weights[j] -= slope * np.float32(distance - j)
    largest, total = largest_of(weights), np.float32(0)
    for j in range(len(weights)):
        weights[j] = exp(weights[j] - largest)
        total += weights[j]
    totals[0], totals[1] = largest, total


@jit
def split(weights: Any, upper: Any, lower: Any, like: Any) -> None:  # [num_keys] each; the last two written
    """weights = upper + lower, to 16 bits."""
    for j in range(len(weights)):
        upper[j] = narrow(weights[j], like)
    for j in range(len(weights)):
        lower[j] = narrow(weights[j] - widen(upper[j]), like)


@jit
def interleave(
    values: Any,  # [num_slots, head_size], of one head
    starts: Any,  # [num_tiles]
    first_pair: int,  # of tiles
    num_keys: int,
    known_head_size: Any,
    next_keys: int,  # [num_slots, head_size], of the thread's next item: only asked for
    next_starts: Any,  # [its tiles]
) -> Any:
    """[pairs of keys, head_size] words: the values of two keys side by side, zeros behind the last key (unused slots
    may hold anything, NaN too)."""
    head_size = value_of(known_head_size)
    row_bytes = head_size * BYTES
    words = np.empty((-(-num_keys // (2 * TILE)) * TILE, head_size), np.uint32)
    for t in range(2 * first_pair, len(words) // (TILE // 2)):
        if t < len(next_starts):
            ask_for_tile(next_keys + next_starts[t] * row_bytes, TILE * row_bytes)
        there = min(TILE, max(0, num_keys - t * TILE))
        start = starts[t] if there > 0 else 0
        for p in range(TILE // 2):
            one, two = start + 2 * p, start + 2 * p + 1
            if 2 * p + 1 < there:
                for d in range(head_size):
                    pair = np.uint32(values[one, d]) | np.uint32(values[two, d]) << np.uint32(16)
                    words[t * (TILE // 2) + p, d] = pair
            else:
                for d in range(head_size):
                    words[t * (TILE // 2) + p, d] = np.uint32(values[one, d]) if 2 * p < there else np.uint32(0)
    return words


@jit
def add_values(
    shares: Any,  # [2, 8 queries, num_keys]: upper and lower
    pairs: Any,  # [num_keys / 2, head_size]
    first_pair: int,  # of tiles
    sums: Any,  # [2, 8 queries, head_size] written
) -> None:
    """sums = weights . values, of the upper and of the lower weights."""
    num_keys, head_size = shares.shape[2], pairs.shape[1]
    for first in range(0, head_size, 4 * TILE):
        tile_zero(0)
        tile_zero(1)
        tile_zero(2)
        tile_zero(3)
        for t in range(first_pair, num_keys // (2 * TILE)):
            at = pairs.ctypes.data + (t * TILE * head_size + first) * 4
            tile_load(4, shares.ctypes.data + t * 2 * TILE * BYTES, num_keys * BYTES)
            tile_load(5, at, head_size * 4)
            tile_dot_bf16(0, 4, 5)
            tile_load(6, at + 64, head_size * 4)
            tile_dot_bf16(1, 4, 6)
            tile_load(7, at + 128, head_size * 4)
            tile_dot_bf16(2, 4, 7)
            tile_load(5, at + 192, head_size * 4)
            tile_dot_bf16(3, 4, 5)
        at = sums.ctypes.data + first * 4
        tile_store(0, at, head_size * 4)
        tile_store(1, at + 64, head_size * 4)
        tile_store(2, at + 128, head_size * 4)
        tile_store(3, at + 192, head_size * 4)
