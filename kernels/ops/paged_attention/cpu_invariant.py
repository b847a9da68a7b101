"""Attention whose bits depend on a row's own request only: not on the batch, the chunking or the block ids.

Floating-point sums change with their order, and libraries choose the order by shape and stride. So here every operand's
shape follows from absolute positions alone:

    query tile  rows at positions [t, t + QUERY_TILE), t a multiple of QUERY_TILE; rows not in this step are zeros
    key tile    KEY_TILE positions; a query tile lies in exactly one of them, the last that it sees
    per query tile: flash attention over all earlier key tiles, unmasked; over the last one, masked; then one merge

Keys are always copied, so strides and alignment do not depend on block ids. One decoded token costs a whole query
tile; that is the price. Called by cpu.py. Twin in vLLM: model_executor/layers/batch_invariant.py.
"""

from dataclasses import dataclass

import numpy as np
import torch

from minivllm.kernels.paged_attention.cpu_plan import Context, Keys, causal_mask
from minivllm.kernels.paged_attention.cpu_primitives import alibi_bias, flash_heads, gather, merge, soft_cap_attention

QUERY_TILE = 16
KEY_TILE = 128


@dataclass
class QueryTile:
    """QUERY_TILE rows and the keys they see, as offsets into the request's gathered keys."""

    first_row: int  # in the padded query
    first_key: int
    masked_key: int  # keys from here on need the mask
    end_key: int
    offset: int  # positions from masked_key to the tile's first row
    mask: torch.Tensor  # [QUERY_TILE, end_key - masked_key] 0 or -inf


@dataclass
class InvariantPlan:
    """Every request's tiles."""

    num_padded_rows: int
    padded_rows: torch.Tensor  # [num_tokens] int64, where each query row goes
    requests: list[tuple[Keys, list[QueryTile]]]  # whole key tiles, and query tiles


def invariant_attention(
    q: torch.Tensor,  # [num_tokens, num_kv_heads, group, head_size]
    k: torch.Tensor,  # [1, num_kv_heads, num_slots, head_size]
    v: torch.Tensor,  # [1, num_kv_heads, num_slots, head_size]
    plan: InvariantPlan,
    scale: float,
    soft_cap: float | None,
    alibi_slopes: torch.Tensor | None,  # [num_heads]
) -> torch.Tensor:  # [num_tokens, num_kv_heads, group, head_size]
    """Attention of every row over its context, one query tile after the other."""
    padded = q.new_zeros(plan.num_padded_rows, *q.shape[1:]).index_copy_(0, plan.padded_rows, q)
    out = torch.empty_like(padded)
    for read, tiles in plan.requests:
        keys, values = gather(k, read)[0], gather(v, read)[0]
        for tile in tiles:
            rows = slice(tile.first_row, tile.first_row + QUERY_TILE)
            attended = _attend_tile(padded[rows], keys, values, tile, scale, soft_cap, alibi_slopes)
            out[rows] = attended.permute(2, 0, 1, 3)
    return out.index_select(0, plan.padded_rows)


def plan_invariant(contexts: list[Context], dtype: torch.dtype, window: int | None, one_mask: bool) -> InvariantPlan:
    """`one_mask`: soft cap or ALiBi touch every key, so all keys of a tile take the masked way."""
    masks: dict[tuple[int, int], torch.Tensor] = {}
    requests = []
    padded_rows = []
    num_padded_rows = 0
    for context in contexts:
        start = context.seq_len - context.num_rows  # position of the first row
        first_tile = start - start % QUERY_TILE
        padded_rows.append(num_padded_rows - first_tile + np.arange(start, context.seq_len))
        tiles = []
        origin = _first_key(first_tile, window)
        for position in range(first_tile, context.seq_len, QUERY_TILE):
            first_key, end_key = _first_key(position, window), position - position % KEY_TILE + KEY_TILE
            hidden = window is not None and position + QUERY_TILE > window  # the window hides keys from some row
            masked_key = first_key if one_mask or hidden else end_key - KEY_TILE
            pattern = (end_key - masked_key, position - masked_key)
            if pattern not in masks:
                masks[pattern] = torch.from_numpy(causal_mask(QUERY_TILE, *pattern, window)).to(dtype)
            first_row = num_padded_rows + position - first_tile
            edges = (first_key - origin, masked_key - origin, end_key - origin)
            tiles.append(QueryTile(first_row, *edges, position - masked_key, masks[pattern]))
        # Keys that do not exist yet stand masked in the last tile: read the request's first key for them.
        positions = np.arange(origin, end_key)
        slots = context.slots(np.where(positions < context.seq_len, positions, origin))
        requests.append((Keys(len(slots), slots=torch.from_numpy(slots)), tiles))
        num_padded_rows += len(tiles) * QUERY_TILE
    return InvariantPlan(num_padded_rows, torch.from_numpy(np.concatenate(padded_rows)), requests)


def _first_key(position: int, window: int | None) -> int:
    """Start of the first key tile that the query tile at `position` may see."""
    first = 0 if window is None else max(0, position + 1 - window)
    return first - first % KEY_TILE


def _attend_tile(
    q: torch.Tensor,  # [QUERY_TILE, num_kv_heads, group, head_size]
    k: torch.Tensor,  # [num_kv_heads, num_keys, head_size]
    v: torch.Tensor,  # [num_kv_heads, num_keys, head_size]
    tile: QueryTile,
    scale: float,
    soft_cap: float | None,
    alibi_slopes: torch.Tensor | None,  # [num_heads]
) -> torch.Tensor:  # [num_kv_heads, group, QUERY_TILE, head_size]
    masked = slice(tile.masked_key, tile.end_key)
    mask = tile.mask
    if alibi_slopes is not None:
        mask = mask + alibi_bias(alibi_slopes.view(q.shape[1:3]), *mask.shape, tile.offset).to(q.dtype)
    if soft_cap is not None:
        return soft_cap_attention(q.permute(1, 2, 0, 3), k[:, masked], v[:, masked], mask, scale, soft_cap)
    out, lse = flash_heads(q, k[:, masked], v[:, masked], scale=scale, attn_mask=mask)
    if tile.masked_key == tile.first_key:
        return out
    earlier = slice(tile.first_key, tile.masked_key)
    earlier_out, earlier_lse = flash_heads(q, k[:, earlier], v[:, earlier], scale=scale)
    return merge(earlier_out, earlier_lse, out, lse)
