"""What writing into the cache means, one token after the other. Called through `impl="reference"` and by tests.

Twin in vLLM: tests/kernels/attention/test_cache.py.
"""

import torch

from minivllm.kernels.quantised_cache import LARGEST_CODE, SMALLEST_SCALE


def write(
    key: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
    value: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
    k_cache: torch.Tensor,  # [num_kv_heads, num_blocks, block_size, head_size]
    v_cache: torch.Tensor,  # [num_kv_heads, num_blocks, block_size, head_size]
    slot_mapping: torch.Tensor,  # [num_tokens] int64
    k_scales: torch.Tensor | None,  # [num_kv_heads, num_blocks, block_size]
    v_scales: torch.Tensor | None,  # [num_kv_heads, num_blocks, block_size]
) -> None:
    """See the package's docstring."""
    _write(key, k_cache, slot_mapping, k_scales)
    _write(value, v_cache, slot_mapping, v_scales)


def _write(
    rows: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
    cache: torch.Tensor,  # [num_kv_heads, num_blocks, block_size, head_size]
    slot_mapping: torch.Tensor,  # [num_tokens] int64
    scales: torch.Tensor | None,  # [num_kv_heads, num_blocks, block_size]
) -> None:
    """One token after the other."""
    num_blocks, block_size = cache.shape[1:3]
    slots = slot_mapping.tolist()
    outside = [slot for slot in slots if not -1 <= slot < num_blocks * block_size]
    if outside:
        raise ValueError(f"slot_mapping: expected slots in [-1, {num_blocks * block_size}), got {outside[0]}")
    for row, slot in zip(rows, slots, strict=True):
        if slot == -1:
            continue
        block, offset = slot // block_size, slot % block_size
        if scales is None:
            cache[:, block, offset] = row
        else:
            cache[:, block, offset], scales[:, block, offset] = _quantise(row, cache.dtype)


def _quantise(
    row: torch.Tensor,  # [num_kv_heads, head_size]
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:  # [num_kv_heads, head_size] of dtype, [num_kv_heads] fp32
    """Codes and scales. Computed in float32; in float64 if the row is."""
    wide = row if row.dtype == torch.float64 else row.float()
    scales = (wide.abs().amax(dim=-1) / LARGEST_CODE[dtype]).clamp(min=SMALLEST_SCALE).float()
    ratios = wide / scales[:, None]  # [num_kv_heads, head_size]
    return (ratios.round() if dtype == torch.int8 else ratios).to(dtype), scales
