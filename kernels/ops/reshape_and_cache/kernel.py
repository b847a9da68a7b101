"""reshape_and_cache in Triton: a program per token copies the keys and values of all its heads into their slot.

Bound by memory. Slots are int64: in a cache of 2^31 values and more their offsets need it. A slot outside the cache,
-1 included, writes nothing.

Codes of a quantised cache equal the reference's bit by bit: divisions are exact to the last bit, and roundings go to
the nearest, ties to even, by integer arithmetic, because sm_80 has no conversion to e4m3 and others round otherwise.

Called by the package on GPU tensors. Twin in vLLM: csrc/cache_kernels.cu.
"""

import torch
import triton
import triton.language as tl

from minivllm.kernels.build import Build, Workload
from minivllm.kernels.dispatch import warp_size
from minivllm.kernels.quantised_cache import LARGEST_CODE, SMALLEST_SCALE

NUM_THREADS = 128
FLOOR = tl.constexpr(SMALLEST_SCALE)


@triton.jit
def _nearest_integer(x):
    """Of |x| < 2^22, ties to even: beside 1.5 * 2^23 the mantissa has no bits for fractions, so the sum is rounded."""
    return (x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def _e4m3_bits(x):
    """The nearest e4m3 value, ties to even, as its byte; of |x| <= 448."""
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # The mantissa keeps 3 of 23 bits, a carry goes on into the exponent; its bias falls from 127 to 7.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 the codes are the multiples of 2^-9: beside 2^14 the mantissa counts just these.
    small = (tl.abs(x) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < (121 << 23), small, normal)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _store_codes(
    rows,  # [HEADS, BLOCK]
    cache_ptr,  # int8, or the bytes of e4m3
    scales_ptr,  # [num_heads, num_slots] fp32
    target,  # [HEADS, BLOCK]
    scale_target,  # [HEADS, 1]
    mask,
    scale_mask,
    LARGEST: tl.constexpr,
):
    """scale = max |row| / LARGEST, and the row in multiples of it."""
    rows = rows.to(tl.float32)
    largest = tl.max(tl.abs(rows), axis=1, keep_dims=True)  # [HEADS, 1]
    scale = tl.maximum(tl.div_rn(largest, tl.full(largest.shape, LARGEST, tl.float32)), FLOOR)
    ratio = tl.div_rn(rows, tl.broadcast_to(scale, rows.shape))
    tl.store(scales_ptr + scale_target, scale, mask=scale_mask)
    if cache_ptr.dtype.element_ty == tl.int8:
        tl.store(cache_ptr + target, _nearest_integer(ratio).to(tl.int8), mask=mask)
    else:
        tl.store(cache_ptr + target, _e4m3_bits(ratio), mask=mask)


@triton.jit
def reshape_and_cache_kernel(
    key_ptr,
    value_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slot_mapping_ptr,
    k_scales_ptr,  # [num_heads, num_slots] fp32, written only where LARGEST is not 0
    v_scales_ptr,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    num_slots,
    num_heads,
    head_size,
    HEADS: tl.constexpr,  # power of two >= num_heads
    BLOCK: tl.constexpr,  # power of two >= head_size
    LARGEST: tl.constexpr,  # code of a quantised cache; 0: the cache holds the values themselves
):
    """One token's keys and values."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token)
    if (slot < 0) | (slot >= num_slots):
        return
    heads = tl.arange(0, HEADS)[:, None].to(tl.int64)
    columns = tl.arange(0, BLOCK)[None, :]
    mask = (heads < num_heads) & (columns < head_size)
    target = (heads * num_slots + slot) * head_size + columns  # [HEADS, BLOCK]
    key_offset = token * key_token_stride + heads * key_head_stride + columns
    value_offset = token * value_token_stride + heads * value_head_stride + columns
    if LARGEST == 0:
        tl.store(k_cache_ptr + target, tl.load(key_ptr + key_offset, mask=mask), mask=mask)
        tl.store(v_cache_ptr + target, tl.load(value_ptr + value_offset, mask=mask), mask=mask)
    else:
        is_head = heads < num_heads  # [HEADS, 1]
        scale_target = heads * num_slots + slot
        key = tl.load(key_ptr + key_offset, mask=mask, other=0.0)
        _store_codes(key, k_cache_ptr, k_scales_ptr, target, scale_target, mask, is_head, LARGEST)
        value = tl.load(value_ptr + value_offset, mask=mask, other=0.0)
        _store_codes(value, v_cache_ptr, v_scales_ptr, target, scale_target, mask, is_head, LARGEST)


def write(
    key: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
    value: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
    k_cache: torch.Tensor,  # [num_kv_heads, num_blocks, block_size, head_size]
    v_cache: torch.Tensor,  # [num_kv_heads, num_blocks, block_size, head_size]
    slot_mapping: torch.Tensor,  # [num_tokens] int64
    k_scales: torch.Tensor | None,  # [num_kv_heads, num_blocks, block_size] fp32
    v_scales: torch.Tensor | None,  # [num_kv_heads, num_blocks, block_size] fp32
) -> None:
    """See the package's docstring; the caches are contiguous."""
    num_kv_heads, num_blocks, block_size, head_size = k_cache.shape
    largest = LARGEST_CODE.get(k_cache.dtype, 0.0)
    if k_cache.dtype == torch.float8_e4m3fn:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    key, value = (rows if rows.stride(2) == 1 else rows.contiguous() for rows in (key, value))
    if not key.shape[0]:
        return
    reshape_and_cache_kernel[(key.shape[0],)](
        key,
        value,
        k_cache,
        v_cache,
        slot_mapping,
        slot_mapping if k_scales is None else k_scales,
        slot_mapping if v_scales is None else v_scales,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        num_blocks * block_size,
        num_kv_heads,
        head_size,
        HEADS=triton.next_power_of_2(num_kv_heads),
        BLOCK=triton.next_power_of_2(head_size),
        LARGEST=largest,
        num_warps=NUM_THREADS // warp_size(key),
    )


def builds() -> list[Build]:
    """Eight KV heads of 128, a step of 1,024 tokens: copied, and quantised in both ways."""
    return [
        _build("8 heads of 128", "*bf16", 0.0, 2),
        _build("8 heads of 128, int8", "*i8", LARGEST_CODE[torch.int8], 1),
        _build("8 heads of 128, fp8", "*u8", LARGEST_CODE[torch.float8_e4m3fn], 1),
    ]


def _build(name: str, cache_type: str, largest: float, code_bytes: int) -> Build:
    tokens, heads, head_size = 1024, 8, 128
    rows, caches, scales = ("key_ptr", "value_ptr"), ("k_cache_ptr", "v_cache_ptr"), ("k_scales_ptr", "v_scales_ptr")
    strides = ("key_token_stride", "key_head_stride", "value_token_stride", "value_head_stride")
    values = 2 * heads * head_size  # of one token
    num_bytes = values * (2 + code_bytes) + 8 + (2 * heads * 4 if largest else 0)
    return Build(
        operation="reshape_and_cache",
        name=name,
        kernel=reshape_and_cache_kernel,
        types={
            **dict.fromkeys(rows, "*bf16"),
            **dict.fromkeys(caches, cache_type),
            **dict.fromkeys(scales, "*fp32"),
            "slot_mapping_ptr": "*i64",
            **dict.fromkeys((*strides, "num_slots", "num_heads", "head_size"), "i32"),
        },
        constants={"HEADS": heads, "BLOCK": head_size, "LARGEST": largest},
        divisible=frozenset({*rows, *caches, *scales, "slot_mapping_ptr", *strides, "num_slots", "head_size"}),
        num_threads=NUM_THREADS,
        workload=Workload(
            f"{tokens} tokens", tokens * num_bytes, 3 * tokens * values if largest else 0, tokens, 2 * values
        ),
    )
