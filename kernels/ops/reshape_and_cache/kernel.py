"""reshape_and_cache in Triton: a program per token copies the keys and values of all its heads into their slot.

Bound by memory. Slots are int64: in a cache of 2^31 values and more their offsets need it. A slot outside the cache,
-1 included, writes nothing. Called by the package on GPU tensors. Twin in vLLM: csrc/cache_kernels.cu.
"""

import torch
import triton
import triton.language as tl

from minivllm.kernels.build import Build, Workload
from minivllm.kernels.dispatch import warp_size

NUM_THREADS = 128


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
    num_heads,
    head_size,
    HEADS: tl.constexpr,  # power of two >= num_heads
    BLOCK: tl.constexpr,  # power of two >= head_size
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
    key = tl.load(key_ptr + token * key_token_stride + heads * key_head_stride + columns, mask=mask)
    tl.store(k_cache_ptr + target, key, mask=mask)
    value = tl.load(value_ptr + token * value_token_stride + heads * value_head_stride + columns, mask=mask)
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
    reshape_and_cache_kernel[(key.shape[0],)](
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
        num_kv_heads,
        head_size,
        HEADS=triton.next_power_of_2(num_kv_heads),
        BLOCK=triton.next_power_of_2(head_size),
        num_warps=NUM_THREADS // warp_size(key),
    )


def builds() -> list[Build]:
    """Eight KV heads of 128, a step of 1,024 tokens."""
    tokens, heads, head_size = 1024, 8, 128
    pointers = ("key_ptr", "value_ptr", "k_cache_ptr", "v_cache_ptr")
    strides = ("key_token_stride", "key_head_stride", "value_token_stride", "value_head_stride")
    return [
        Build(
            operation="reshape_and_cache",
            name=f"{heads} heads of {head_size}",
            kernel=reshape_and_cache_kernel,
            types={
                **dict.fromkeys(pointers, "*bf16"),
                "slot_mapping_ptr": "*i64",
                **dict.fromkeys((*strides, "num_slots", "num_heads", "head_size"), "i32"),
            },
            constants={"HEADS": heads, "BLOCK": head_size},
            divisible=frozenset({*pointers, "slot_mapping_ptr", *strides, "num_slots", "head_size"}),
            num_threads=NUM_THREADS,
            workload=Workload(
                f"{tokens} tokens", tokens * (8 * heads * head_size + 8), 0, tokens, 4 * heads * head_size
            ),
        )
    ]
