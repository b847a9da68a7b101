"""Attention over a paged KV cache on a CPU; the plan (cpu_plan.py) says which request goes which way.

Few rows go to the compiled loop of cpu_rows.py; many rows, in bfloat16 with AMX, to that of cpu_prompts_amx.py, and
elsewhere to torch's flash kernel, which reads strided keys in place and returns the log-sum-exp by which partial
results merge. Knows of requests only what the plan says. Called by
the package. Twin in vLLM: v1/attention/backends/cpu_attn.py with csrc/cpu.
"""

import torch

from minivllm.kernels.jit import use_torch_threads
from minivllm.kernels.paged_attention.cpu_plan import (
    Keys,
    LayerPlan,
    LayerShape,
    PrefillPart,
    StepPlan,
    Tile,
    plan_layer,
)
from minivllm.kernels.paged_attention.cpu_primitives import (
    alibi_bias,
    flash_heads,
    gather,
    merge,
    soft_cap_attention,
)
from minivllm.kernels.paged_attention.cpu_prompts_amx import attend_prompts
from minivllm.kernels.paged_attention.cpu_rows import attend_rows
from minivllm.kernels.paged_attention.metadata import AttentionMetadata, HeadShares


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
    head_shares: HeadShares | None = None,  # of each KV head
) -> torch.Tensor:  # [num_tokens, num_heads, head_size]
    """See the package's docstring. Fills metadata.plan on the first call of a step."""
    if metadata.plan is None:
        use_torch_threads()
        metadata.plan = StepPlan(metadata)
    assert isinstance(metadata.plan, StepPlan), metadata.plan
    all_tiles = soft_cap is not None or alibi_slopes is not None
    num_kv_heads, head_size = k_cache.shape[0], k_cache.shape[3]
    group = query.shape[1] // num_kv_heads
    all_rows = metadata.batch_invariant
    shape = LayerShape(num_kv_heads, group, head_size, query.dtype, sliding_window, all_tiles, all_rows, head_shares)
    plan = metadata.plan.derive(plan_layer, shape, metadata.block_table)
    query = query.contiguous()
    out = torch.empty_like(query)
    if len(plan.rows.items):
        attend_rows(query, k_cache, v_cache, out, plan.rows, scale, soft_cap, alibi_slopes)
    if len(plan.prompts.works):
        attend_prompts(query, k_cache, v_cache, out, plan.prompts, scale)
    if plan.prefills or plan.tiles:
        _long_queries(query, k_cache, v_cache, out, plan, scale, soft_cap, alibi_slopes)
    return out


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


def _long_queries(
    query: torch.Tensor,  # [num_tokens, num_heads, head_size]
    k_cache: torch.Tensor,  # [num_kv_heads, num_blocks, block_size, head_size]
    v_cache: torch.Tensor,  # [num_kv_heads, num_blocks, block_size, head_size]
    out: torch.Tensor,  # [num_tokens, num_heads, head_size], the parts' rows are written
    plan: LayerPlan,
    scale: float,
    soft_cap: float | None,
    alibi_slopes: torch.Tensor | None,  # [num_heads]
) -> None:
    num_kv_heads, head_size = k_cache.shape[0], k_cache.shape[3]
    k, v = (cache.view(num_kv_heads, -1, head_size) for cache in (k_cache, v_cache))  # one slot per row
    q, grouped = (x.view(len(x), num_kv_heads, -1, head_size) for x in (query, out))  # the heads of a group together
    slopes = None if alibi_slopes is None else alibi_slopes.view(q.shape[1:3])
    for part in (*plan.prefills, *plan.tiles):
        rows = slice(part.first_row, part.first_row + part.num_rows)
        own, keys, values = part.heads, _read(k, part.keys)[part.heads], _read(v, part.keys)[part.heads]
        grouped[rows, : own.start], grouped[rows, own.stop :] = 0, 0
        if own.start == own.stop:
            continue
        if isinstance(part, PrefillPart):
            attended = _prefill(q[rows, own], keys, values, scale)
        else:
            attended = _tile(q[rows, own], keys, values, part, scale, soft_cap, None if slopes is None else slopes[own])
        grouped[rows, own] = attended.permute(2, 0, 1, 3)


def _prefill(
    q: torch.Tensor,  # [num_rows, num_kv_heads, group, head_size]
    keys: torch.Tensor,  # [num_kv_heads, num_keys, head_size], the last are the rows' own
    values: torch.Tensor,  # [num_kv_heads, num_keys, head_size]
    scale: float,
) -> torch.Tensor:  # [num_kv_heads, group, num_rows, head_size]
    """Causal attention over the rows' own keys, merged with the earlier context, which needs no mask."""
    own = keys.shape[1] - len(q)
    attended, lse = flash_heads(q, keys[:, own:], values[:, own:], scale=scale, is_causal=True)
    if own:
        earlier, earlier_lse = flash_heads(q, keys[:, :own], values[:, :own], scale=scale)
        attended = merge(earlier, earlier_lse, attended, lse)
    return attended


def _tile(
    q: torch.Tensor,  # [num_rows, num_kv_heads, group, head_size]
    keys: torch.Tensor,  # [num_kv_heads, num_keys, head_size]
    values: torch.Tensor,  # [num_kv_heads, num_keys, head_size]
    tile: Tile,
    scale: float,
    soft_cap: float | None,
    alibi_slopes: torch.Tensor | None,  # [num_kv_heads, group]
) -> torch.Tensor:  # [num_kv_heads, group, num_rows, head_size]
    mask = tile.mask  # [num_rows, num_keys]
    if alibi_slopes is not None:
        mask = mask + alibi_bias(alibi_slopes, *mask.shape, tile.offset).to(q.dtype)
    if soft_cap is None:
        return flash_heads(q, keys, values, scale=scale, attn_mask=mask)[0]
    return soft_cap_attention(q.permute(1, 2, 0, 3), keys, values, mask, scale, soft_cap)


def _read(cache: torch.Tensor, keys: Keys) -> torch.Tensor:  # [num_kv_heads, num_slots or num_keys, head_size]
    if keys.slots is None:
        return cache.narrow(1, keys.start_slot, keys.num_keys)
    return gather(cache, keys)
