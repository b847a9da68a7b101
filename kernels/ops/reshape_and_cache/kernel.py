"""reshape_and_cache in Triton: a program per token and KV head copies one key and one value into their slot.

Bound by memory. Slots are int64: in a cache of 2^31 values and more their offsets need it. A slot outside the cache,
-1 included, writes nothing. Called by the package on GPU tensors. Twin in vLLM: csrc/cache_kernels.cu.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def reshape_and_cache_kernel(
    key_ptr,
    value_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slot_mapping_ptr,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    num_slots,
    head_size,
    BLOCK: tl.constexpr,  # power of two >= head_size
):
    """One token's key and value of one head."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token)
    if (slot < 0) | (slot >= num_slots):
        return
    columns = tl.arange(0, BLOCK)
    mask = columns < head_size
    target = (head * num_slots + slot) * head_size + columns
    key = tl.load(key_ptr + token * key_token_stride + head * key_head_stride + columns, mask=mask)  # [BLOCK]
    tl.store(k_cache_ptr + target, key, mask=mask)
    value = tl.load(value_ptr + token * value_token_stride + head * value_head_stride + columns, mask=mask)
    tl.store(v_cache_ptr + target, value, mask=mask)


def write(
    key: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
    value: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
    k_cache: torch.Tensor,  # [num_kv_heads, num_blocks, block_size, head_size]
    v_cache: torch.Tensor,  # [num_kv_heads, num_blocks, block_size, head_size]
    slot_mapping: torch.Tensor,  # [num_tokens] int64
) -> None:
    """See the package's docstring; the caches are contiguous."""
    num_kv_heads, num_blocks, block_size, head_size = k_cache.shape
    key, value = (rows if rows.stride(2) == 1 else rows.contiguous() for rows in (key, value))
    if not key.shape[0]:
        return
    reshape_and_cache_kernel[(key.shape[0], num_kv_heads)](
        key,
        value,
        k_cache,
        v_cache,
        slot_mapping,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        num_blocks * block_size,
        head_size,
        BLOCK=triton.next_power_of_2(head_size),
        num_warps=1,
    )
