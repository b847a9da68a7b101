"""What a quantised key/value cache holds: codes of 8 bits, and one scale for every slot and KV head.

    value = code * scale          scale = max |row| / LARGEST_CODE, of one token's row in one KV head

Codes are int8, or float8 e4m3 (1 sign, 4 exponent, 3 mantissa bits; the format without infinities). A scale belongs to
one token, so to append a token changes nothing that is already there; one scale for a block or a head would have to be
made anew, and its codes with it, whenever a larger value arrives. It costs 4 bytes beside head_size bytes.

Knows no operation. Called by reshape_and_cache, which writes such caches, and paged_attention, which reads them. Twin
in vLLM: the int8 and fp8 kinds of kv_cache_dtype in v1/attention/ops/triton_reshape_and_cache_flash.py.
"""

from types import MappingProxyType

import torch

LARGEST_CODE = MappingProxyType({torch.int8: 127.0, torch.float8_e4m3fn: 448.0})
SMALLEST_SCALE = 2.0**-100  # rows of zeros have this one; far above where float32 loses bits


def is_quantised(k_cache: torch.Tensor) -> bool:  # [num_kv_heads, num_blocks, block_size, head_size]
    """Whether this cache holds codes, which need scales."""
    return k_cache.dtype in LARGEST_CODE


def check_scales(
    k_cache: torch.Tensor,  # [num_kv_heads, num_blocks, block_size, head_size]
    v_cache: torch.Tensor,  # [num_kv_heads, num_blocks, block_size, head_size]
    k_scales: torch.Tensor | None,  # [num_kv_heads, num_blocks, block_size] fp32
    v_scales: torch.Tensor | None,  # [num_kv_heads, num_blocks, block_size] fp32
) -> None:
    """Raises ValueError unless codes come with scales that fit, and values without."""
    scales = (k_scales, v_scales)
    if not is_quantised(k_cache):
        if any(scale is not None for scale in scales):
            raise ValueError(f"k_scales, v_scales: expected None for a cache of {k_cache.dtype}, got scales")
        return
    if v_cache.dtype != k_cache.dtype:
        raise ValueError(f"v_cache: expected {k_cache.dtype} as k_cache, got {v_cache.dtype}")
    for name, scale in zip(("k_scales", "v_scales"), scales, strict=True):
        expected = f"{name}: expected {list(k_cache.shape[:3])} contiguous torch.float32 for a cache of {k_cache.dtype}"
        if scale is None:
            raise ValueError(f"{expected}, got None")
        if scale.shape != k_cache.shape[:3] or scale.dtype != torch.float32 or not scale.is_contiguous():
            raise ValueError(f"{expected}, got {list(scale.shape)} {scale.dtype}, contiguous {scale.is_contiguous()}")
