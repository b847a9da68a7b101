"""Attention over a paged KV cache with eager torch on a CPU; the plan (cpu_plan.py) says which operation runs when.

One primitive does the work: torch's flash kernel reads strided keys in place, takes a group of query heads as its rows
and returns the log-sum-exp by which partial results merge. Knows of requests only what the plan says. Called by the
package; batch-invariant steps are handed to cpu_invariant.py. Twin in vLLM: v1/attention/backends/cpu_attn.py with
csrc/cpu.
"""

import torch

from minivllm.kernels.paged_attention.cpu_invariant import invariant_attention, plan_invariant
from minivllm.kernels.paged_attention.cpu_plan import (
    Keys,
    LayerPlan,
    LayerShape,
    PrefillPart,
    ShortPart,
    StepPlan,
    Tile,
    plan_layer,
)
from minivllm.kernels.paged_attention.cpu_primitives import (
    alibi_bias,
    flash_attention,
    flash_heads,
    gather,
    merge,
    soft_cap_attention,
)
from minivllm.kernels.paged_attention.metadata import AttentionMetadata


def paged_attention(
    query: torch.Tensor,  # [num_tokens, num_heads, head_size]
    k_cache: torch.Tensor,  # [num_kv_heads, num_blocks, block_size, head_size]
    v_cache: torch.Tensor,  # [num_kv_heads, num_blocks, block_size, head_size]
    metadata: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    alibi_slopes: torch.Tensor | None,  # [num_heads] fp32
) -> torch.Tensor:  # [num_tokens, num_heads, head_size]
    """See the package's docstring. Fills metadata.plan on the first call of a step."""
    if metadata.plan is None:
        metadata.plan = StepPlan(metadata)
    assert isinstance(metadata.plan, StepPlan), metadata.plan
    num_tokens, num_heads, head_size = query.shape
    num_kv_heads = k_cache.shape[0]
    group = num_heads // num_kv_heads
    q = query.view(num_tokens, num_kv_heads, group, head_size)
    k, v = (cache.view(1, num_kv_heads, -1, head_size) for cache in (k_cache, v_cache))  # one slot per row
    all_tiles = soft_cap is not None or alibi_slopes is not None
    if metadata.batch_invariant:
        tiles = metadata.plan.derive(plan_invariant, query.dtype, sliding_window, all_tiles)
        return invariant_attention(q, k, v, tiles, scale, soft_cap, alibi_slopes).flatten(1, 2)
    shape = LayerShape(num_kv_heads, group, head_size, query.dtype, sliding_window, all_tiles)
    plan = metadata.plan.derive(plan_layer, shape)
    if plan.short_rows is None:
        return _short_queries(q, k, v, plan, scale).view(num_tokens, num_heads, head_size)
    out = query.new_empty(q.shape)
    if plan.parts:
        out.index_copy_(0, plan.short_rows, _short_queries(q.index_select(0, plan.short_rows), k, v, plan, scale))
    for prefill in plan.prefills:
        _prefill(q, k, v, out, prefill, scale)
    for tile in plan.tiles:
        _tile(q, k, v, out, tile, scale, soft_cap, alibi_slopes)
    return out.view(num_tokens, num_heads, head_size)


def encoder_attention(
    query: torch.Tensor,  # [num_tokens, num_heads, head_size]
    key: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
    value: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
    query_start_loc: list[int],  # [num_reqs + 1]
    *,
    scale: float,
    batch_invariant: bool,
) -> torch.Tensor:  # [num_tokens, num_heads, head_size]
    """See the package's docstring. One call per request, whose shapes depend on that request alone.

    So batch invariance only needs copies, by which every request's operands are aligned alike.
    """
    num_tokens, num_heads, head_size = query.shape
    num_kv_heads = key.shape[1]
    q = query.view(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_size)
    k, v = key.transpose(0, 1), value.transpose(0, 1)  # [num_kv_heads, num_tokens, head_size]
    out = query.new_empty(q.shape)
    for start, end in zip(query_start_loc, query_start_loc[1:], strict=False):
        rows, keys, values = q[start:end], k[:, start:end], v[:, start:end]
        if batch_invariant:
            rows, keys, values = (x.clone(memory_format=torch.contiguous_format) for x in (rows, keys, values))
        attended, _ = flash_heads(rows, keys, values, scale=scale)
        out[start:end] = attended.permute(2, 0, 1, 3)
    return out.view(num_tokens, num_heads, head_size)


def _short_queries(
    q: torch.Tensor,  # [num_short_rows, num_kv_heads, group, head_size]
    k: torch.Tensor,  # [1, num_kv_heads, num_slots, head_size]
    v: torch.Tensor,  # [1, num_kv_heads, num_slots, head_size]
    plan: LayerPlan,
    scale: float,
) -> torch.Tensor:  # [num_short_rows, num_kv_heads, group, head_size]
    num_runs = len(plan.runs)
    rows = q.split(plan.part_rows)
    parts = [_short_part(rows[i], k, v, part, scale) for i, part in enumerate(plan.parts)]
    out = torch.cat([part_out for part_out, _ in parts])
    if num_runs:
        rows = q[:num_runs].split(1)
        runs = [_short_part(rows[i], k, v, run, scale) for i, run in enumerate(plan.runs)]
        run_out, run_lse = (torch.cat(pieces) for pieces in zip(*runs, strict=True))
        lse = torch.cat([part_lse for _, part_lse in parts])  # [num_short_rows, num_kv_heads, group]
        out[:num_runs] = merge(run_out, run_lse, out[:num_runs], lse[:num_runs])
    return out


def _short_part(
    q: torch.Tensor,  # [num_reqs * num_rows, num_kv_heads, group, head_size]
    k: torch.Tensor,  # [1, num_kv_heads, num_slots, head_size]
    v: torch.Tensor,  # [1, num_kv_heads, num_slots, head_size]
    part: ShortPart,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # as q, and its lse [num_reqs * num_rows, num_kv_heads, group]
    num_kv_heads, group, head_size = q.shape[1:]
    if part.keys.slots is None:
        keys, values = _read(k, part.keys), _read(v, part.keys)
    else:
        keys, values = _gather_into_buffers(k, v, part)
    if part.num_rows > 1:  # rows and heads side by side: [num_reqs, num_kv_heads, num_rows * group, head_size]
        q = q.view(part.num_reqs, part.num_rows, num_kv_heads, group, head_size).transpose(1, 2).flatten(2, 3)
    out, lse = flash_attention(q, keys, values, attn_mask=part.mask, scale=scale)
    if part.num_rows > 1:
        out = out.view(part.num_reqs, num_kv_heads, part.num_rows, group, head_size).transpose(1, 2).flatten(0, 1)
        lse = lse.view(part.num_reqs, num_kv_heads, part.num_rows, group).transpose(1, 2).flatten(0, 1)
    return out, lse


def _prefill(
    q: torch.Tensor,  # [num_tokens, num_kv_heads, group, head_size]
    k: torch.Tensor,  # [1, num_kv_heads, num_slots, head_size]
    v: torch.Tensor,  # [1, num_kv_heads, num_slots, head_size]
    out: torch.Tensor,  # [num_tokens, num_kv_heads, group, head_size], this request's rows are written
    part: PrefillPart,
    scale: float,
) -> None:
    """Causal attention over the rows' own keys, merged with the earlier context, which needs no mask."""
    rows = slice(part.first_row, part.first_row + part.num_rows)
    keys, values = _read(k, part.keys)[0], _read(v, part.keys)[0]
    own = part.keys.num_keys - part.num_rows
    attended, lse = flash_heads(q[rows], keys[:, own:], values[:, own:], scale=scale, is_causal=True)
    if own:
        earlier, earlier_lse = flash_heads(q[rows], keys[:, :own], values[:, :own], scale=scale)
        attended = merge(earlier, earlier_lse, attended, lse)
    out[rows] = attended.permute(2, 0, 1, 3)


def _tile(
    q: torch.Tensor,  # [num_tokens, num_kv_heads, group, head_size]
    k: torch.Tensor,  # [1, num_kv_heads, num_slots, head_size]
    v: torch.Tensor,  # [1, num_kv_heads, num_slots, head_size]
    out: torch.Tensor,  # [num_tokens, num_kv_heads, group, head_size], the tile's rows are written
    tile: Tile,
    scale: float,
    soft_cap: float | None,
    alibi_slopes: torch.Tensor | None,  # [num_heads]
) -> None:
    rows = slice(tile.first_row, tile.first_row + tile.num_rows)
    keys, values = _read(k, tile.keys)[0], _read(v, tile.keys)[0]
    mask = tile.mask  # [num_rows, num_keys]
    if alibi_slopes is not None:
        mask = mask + alibi_bias(alibi_slopes.view(q.shape[1:3]), *mask.shape, tile.offset).to(q.dtype)
    if soft_cap is None:
        attended, _ = flash_heads(q[rows], keys, values, scale=scale, attn_mask=mask)
    else:
        attended = soft_cap_attention(q[rows].permute(1, 2, 0, 3), keys, values, mask, scale, soft_cap)
    out[rows] = attended.permute(2, 0, 1, 3)


def _read(cache: torch.Tensor, keys: Keys) -> torch.Tensor:  # [1, num_kv_heads, num_slots or num_keys, head_size]
    if keys.slots is None:
        return cache.narrow(2, keys.start_slot, keys.num_keys)
    return gather(cache, keys)


def _gather_into_buffers(
    k: torch.Tensor,  # [1, num_kv_heads, num_slots, head_size]
    v: torch.Tensor,  # [1, num_kv_heads, num_slots, head_size]
    part: ShortPart,
) -> tuple[torch.Tensor, torch.Tensor]:  # two of [num_reqs, num_kv_heads, num_keys, head_size]
    """Copies a batch's keys and values side by side, into memory that all layers of the step reuse."""
    num_kv_heads, head_size = k.shape[1], k.shape[3]
    if part.buffers is None:
        shape = (num_kv_heads * part.keys.num_keys, head_size)
        part.buffers = (k.new_empty(shape), v.new_empty(shape))
    views = []
    for cache, buffer in zip((k, v), part.buffers, strict=True):
        torch.index_select(cache.view(-1, head_size), 0, part.keys.rows_of(cache), out=buffer)
        views.append(buffer.view(num_kv_heads, part.num_reqs, -1, head_size).transpose(0, 1))
    return views[0], views[1]
