"""The tensor operations of long queries.

Knows neither requests nor caches. Called by cpu.py. Twin in vLLM: csrc/cpu/cpu_attn_impl.hpp and
merge_attn_states.
"""

from typing import Any

import torch

from minivllm.kernels.paged_attention.cpu_plan import Keys

# (query, key, value, *, attn_mask, is_causal, scale) -> (out, lse), operands [batch, heads, rows or keys, head_size].
# is_causal: row i sees keys 0..i. A row that sees no key gives 0, with an lse of 0, so such a row must not be merged.
flash_attention = torch._scaled_dot_product_flash_attention_for_cpu


def gather(
    cache: torch.Tensor,  # [num_kv_heads, num_slots, head_size]
    keys: Keys,  # with slots
) -> torch.Tensor:  # [num_kv_heads, num_keys, head_size]
    """The keys' rows of every head, copied side by side."""
    rows = cache.view(-1, cache.shape[2]).index_select(0, keys.rows_of(cache))
    return rows.view(cache.shape[0], keys.num_keys, cache.shape[2])


def flash_heads(
    q: torch.Tensor,  # [num_rows, num_kv_heads, group, head_size]
    k: torch.Tensor,  # [num_kv_heads, num_keys, head_size]
    v: torch.Tensor,  # [num_kv_heads, num_keys, head_size]
    **options: Any,  # of flash_attention
) -> tuple[torch.Tensor, torch.Tensor]:  # [num_kv_heads, group, num_rows, head_size], [num_kv_heads, group, num_rows]
    """Flash attention with many rows: KV heads as the batch, and a group's heads share keys without a copy."""
    group = q.shape[2]
    k, v = (x.unsqueeze(1).expand(-1, group, -1, -1) for x in (k, v))
    return flash_attention(q.permute(1, 2, 0, 3), k, v, **options)


def merge(
    out_a: torch.Tensor,  # [..., head_size]
    lse_a: torch.Tensor,  # [...] log of the sum of exp(score) over a's keys
    out_b: torch.Tensor,  # [..., head_size]
    lse_b: torch.Tensor,  # [...]
) -> torch.Tensor:  # [..., head_size]
    """Attention over the union of two sets of keys, from the attention over each."""
    weight = torch.sigmoid(lse_a - lse_b).unsqueeze(-1).to(out_a.dtype)
    return torch.lerp(out_b, out_a, weight)


def soft_cap_attention(
    q: torch.Tensor,  # [num_kv_heads, group, num_rows, head_size]
    k: torch.Tensor,  # [num_kv_heads, num_keys, head_size]
    v: torch.Tensor,  # [num_kv_heads, num_keys, head_size]
    mask: torch.Tensor,  # [num_rows, num_keys] or [num_kv_heads, group, num_rows, num_keys], added after the cap
    scale: float,
    soft_cap: float,
) -> torch.Tensor:  # [num_kv_heads, group, num_rows, head_size]
    """Attention with scores squashed into (-soft_cap, soft_cap), which no fused kernel offers."""
    scores = torch.matmul(q * scale, k.transpose(1, 2).unsqueeze(1))  # [num_kv_heads, group, num_rows, num_keys]
    scores = torch.tanh(scores.div_(soft_cap)).mul_(soft_cap).add_(mask)
    return torch.matmul(torch.softmax(scores, dim=-1), v.unsqueeze(1))


def alibi_bias(
    slopes: torch.Tensor,  # [num_kv_heads, group]
    num_rows: int,
    num_keys: int,
    offset: int,
) -> torch.Tensor:  # [num_kv_heads, group, num_rows, num_keys]
    """-slope * (query position - key position), where row i stands `offset` + i positions after key 0."""
    distance = torch.arange(num_rows).unsqueeze(1) + offset - torch.arange(num_keys)  # [num_rows, num_keys]
    return -slopes[:, :, None, None] * distance
