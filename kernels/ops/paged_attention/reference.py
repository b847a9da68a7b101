"""What attention over a paged KV cache means, in plain torch: the specification of paged_attention.

One request after the other, every score written out; computes in the dtype of its inputs, up to float64. Knows
nothing of plans or speed. Called through `impl="reference"` and by tests. Twin in vLLM: ref_paged_attn in
tests/kernels/attention/test_flash_attn.py.
"""

import torch

from minivllm.kernels.paged_attention.metadata import AttentionMetadata, HeadShares, heads_of_requests


def paged_attention(
    query: torch.Tensor,  # [num_tokens, num_heads, head_size]
    k_cache: torch.Tensor,  # [num_kv_heads, num_blocks, block_size, head_size]
    v_cache: torch.Tensor,  # [num_kv_heads, num_blocks, block_size, head_size]
    metadata: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    alibi_slopes: torch.Tensor | None,  # [num_heads]
    k_scales: torch.Tensor | None = None,  # [num_kv_heads, num_blocks, block_size]
    v_scales: torch.Tensor | None = None,  # [num_kv_heads, num_blocks, block_size]
    head_shares: HeadShares | None = None,  # of each KV head
) -> torch.Tensor:  # [num_tokens, num_heads, head_size]
    """Row at position p of a request attends that request's keys at positions 0..p. See the package's docstring."""
    out = torch.empty_like(query)
    starts = metadata.query_start_loc
    for r, seq_len in enumerate(metadata.seq_lens):
        rows = slice(starts[r], starts[r + 1])
        query_positions = torch.arange(seq_len - (rows.stop - rows.start), seq_len)  # [num_rows]
        key_positions = torch.arange(seq_len)  # [seq_len]
        blocks = metadata.block_table[r].long()[key_positions // metadata.block_size]  # [seq_len]
        offsets = key_positions % metadata.block_size  # [seq_len]
        distance = query_positions[:, None] - key_positions  # [num_rows, seq_len]
        visible = distance >= 0  # [num_rows, seq_len]
        if sliding_window is not None:
            visible &= distance < sliding_window
        out[rows] = _attend(
            query[rows].transpose(0, 1),
            _values(k_cache, k_scales, blocks, offsets, query.dtype),
            _values(v_cache, v_scales, blocks, offsets, query.dtype),
            visible,
            scale=scale,
            soft_cap=soft_cap,
            bias=None if alibi_slopes is None else -alibi_slopes.to(query.dtype)[:, None, None] * distance,
        ).transpose(0, 1)
    group = query.shape[1] // k_cache.shape[0]
    heads = heads_of_requests(starts, metadata.seq_lens, k_cache.shape[0], head_shares)
    for r, (first, end) in enumerate(heads.tolist()):
        out[starts[r] : starts[r + 1], : first * group] = 0
        out[starts[r] : starts[r + 1], end * group :] = 0
    return out


def encoder_attention(
    query: torch.Tensor,  # [num_tokens, num_heads, head_size]
    key: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
    value: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
    query_start_loc: list[int],  # [num_reqs + 1]
    *,
    scale: float,
) -> torch.Tensor:  # [num_tokens, num_heads, head_size]
    """Every row of a request attends every row of the same request."""
    out = torch.empty_like(query)
    for start, end in zip(query_start_loc, query_start_loc[1:], strict=False):
        visible = torch.ones(end - start, end - start, dtype=torch.bool)  # [num_rows, num_rows]
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        out[start:end] = _attend(q, k, v, visible, scale=scale, soft_cap=None, bias=None).transpose(0, 1)
    return out


def _values(
    cache: torch.Tensor,  # [num_kv_heads, num_blocks, block_size, head_size]
    scales: torch.Tensor | None,  # [num_kv_heads, num_blocks, block_size]
    blocks: torch.Tensor,  # [seq_len]
    offsets: torch.Tensor,  # [seq_len]
    dtype: torch.dtype,
) -> torch.Tensor:  # [num_kv_heads, seq_len, head_size]
    """One request's keys or values; codes times scales, computed in float32 at least and rounded to dtype."""
    found = cache[:, blocks, offsets]
    if scales is None:
        return found
    wide = torch.promote_types(dtype, torch.float32)
    return (found.to(wide) * scales[:, blocks, offsets, None].to(wide)).to(dtype)


def _attend(
    q: torch.Tensor,  # [num_heads, num_rows, head_size]
    k: torch.Tensor,  # [num_kv_heads, num_keys, head_size]
    v: torch.Tensor,  # [num_kv_heads, num_keys, head_size]
    visible: torch.Tensor,  # [num_rows, num_keys] bool
    *,
    scale: float,
    soft_cap: float | None,
    bias: torch.Tensor | None,  # [num_heads, num_rows, num_keys]
) -> torch.Tensor:  # [num_heads, num_rows, head_size]
    group = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(group, dim=0), v.repeat_interleave(group, dim=0)
    scores = q @ k.transpose(1, 2) * scale  # [num_heads, num_rows, num_keys]
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if bias is not None:
        scores = scores + bias
    return torch.softmax(scores.masked_fill(~visible, float("-inf")), dim=-1) @ v
