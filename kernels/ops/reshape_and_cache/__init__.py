"""Writes a step's keys and values into the paged cache.

    cache[:, slot // block_size, slot % block_size] = row,      slot = slot_mapping[token]

A quantised cache gets codes and scales instead (quantised_cache.py says what they are):

    scale = max |row| / LARGEST_CODE,      cache[...] = round(row / scale),      to the nearest code, ties to even

Slot -1 means: do not write (padding). All other slots must lie in the cache and differ from each other. Untouched
slots keep their content. Called by models/layers.py before attention, so that a token also sees itself.
Twin in vLLM: csrc/cache_kernels.cu (reshape_and_cache) and v1/attention/ops/triton_reshape_and_cache_flash.py.
"""

from types import ModuleType

import torch

from minivllm.kernels.dispatch import choose
from minivllm.kernels.quantised_cache import check_scales, is_quantised
from minivllm.kernels.reshape_and_cache import cpu, reference

__all__ = ["reshape_and_cache"]


def reshape_and_cache(
    key: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
    value: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
    k_cache: torch.Tensor,  # [num_kv_heads, num_blocks, block_size, head_size]
    v_cache: torch.Tensor,  # [num_kv_heads, num_blocks, block_size, head_size]
    slot_mapping: torch.Tensor,  # [num_tokens] int64
    *,
    k_scales: torch.Tensor | None = None,  # [num_kv_heads, num_blocks, block_size] fp32, for an int8 or float8 cache
    v_scales: torch.Tensor | None = None,  # [num_kv_heads, num_blocks, block_size] fp32
    impl: str = "auto",
) -> None:
    """Changes k_cache and v_cache in place, and of quantised caches the scales. Rows to quantise must be finite.

    Raises ValueError naming both sides where shapes or dtypes do not fit, or where a slot lies outside the cache: no
    such slot is ever written. On a GPU it is skipped without a word: to find it would be to wait for the device.
    """
    num_kv_heads, _, _, head_size = k_cache.shape
    if key.shape[1:] != (num_kv_heads, head_size) or value.shape != key.shape or v_cache.shape != k_cache.shape:
        raise ValueError(
            f"key, value: expected [num_tokens, {num_kv_heads}, {head_size}] as the caches {list(k_cache.shape)} and "
            f"{list(v_cache.shape)}, got {list(key.shape)} and {list(value.shape)}"
        )
    if slot_mapping.shape != key.shape[:1] or slot_mapping.dtype != torch.int64:
        raise ValueError(
            f"slot_mapping: expected [{key.shape[0]}] int64, got {list(slot_mapping.shape)} {slot_mapping.dtype}"
        )
    check_scales(k_cache, v_cache, k_scales, v_scales)
    if is_quantised(k_cache):
        if key.dtype != value.dtype or not key.is_floating_point():
            raise ValueError(f"key, value: expected one floating-point type, got {key.dtype} and {value.dtype}")
    elif key.dtype != k_cache.dtype or value.dtype != v_cache.dtype:
        raise ValueError(f"key, value: expected {k_cache.dtype} as the caches, got {key.dtype} and {value.dtype}")
    _implementation(impl, key).write(key, value, k_cache, v_cache, slot_mapping, k_scales, v_scales)


def _implementation(impl: str, x: torch.Tensor) -> ModuleType:  # [...]
    chosen = choose(impl, x)
    if chosen == "triton":
        from minivllm.kernels.reshape_and_cache import kernel  # only here: triton is not everywhere

        return kernel
    return cpu if chosen == "cpu" else reference
