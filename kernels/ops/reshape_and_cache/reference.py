"""What writing into the cache means, one token after the other. Called through `impl="reference"` and by tests.

Twin in vLLM: tests/kernels/attention/test_cache.py.
"""

import torch


def write(
    key: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
    value: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
    k_cache: torch.Tensor,  # [num_kv_heads, num_blocks, block_size, head_size]
    v_cache: torch.Tensor,  # [num_kv_heads, num_blocks, block_size, head_size]
    slot_mapping: torch.Tensor,  # [num_tokens] int64
) -> None:
    """See the package's docstring."""
    _write(key, k_cache, slot_mapping)
    _write(value, v_cache, slot_mapping)


def _write(
    rows: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
    cache: torch.Tensor,  # [num_kv_heads, num_blocks, block_size, head_size]
    slot_mapping: torch.Tensor,  # [num_tokens] int64
) -> None:
    """One token after the other."""
    num_blocks, block_size = cache.shape[1:3]
    slots = slot_mapping.tolist()
    outside = [slot for slot in slots if not -1 <= slot < num_blocks * block_size]
    if outside:
        raise ValueError(f"slot_mapping: expected slots in [-1, {num_blocks * block_size}), got {outside[0]}")
    for row, slot in zip(rows, slots, strict=True):
        if slot != -1:
            cache[:, slot // block_size, slot % block_size] = row
