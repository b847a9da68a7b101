"""rotary_embedding in Triton: one program turns all heads of one token.

    heads x first halves (a)  ─┐
    heads x second halves (b) ─┴▶ a cos - b sin, b cos + a sin        one cos and one sin row for all heads

Bound by memory: every value is read and written once. Called by the package on GPU tensors.
Twin in vLLM: csrc/pos_encoding_kernels.cu.
"""

import torch
import triton
import triton.language as tl

from minivllm.kernels.build import Build, Workload
from minivllm.kernels.dispatch import warp_size

NUM_THREADS = 128


@triton.jit
def rotate_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    x_token_stride,
    x_head_stride,
    num_heads,
    half,
    HEADS: tl.constexpr,  # power of two >= num_heads
    HALF: tl.constexpr,  # power of two >= half
):
    """One token."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, HEADS)[:, None]
    pairs = tl.arange(0, HALF)[None, :]
    mask = (heads < num_heads) & (pairs < half)
    in_row = pairs < half
    # The second halves: there sin has no sign, and cos is the same in both.
    cos = tl.load(cos_ptr + token * 2 * half + half + pairs, mask=in_row, other=0.0)  # [1, HALF]
    sin = tl.load(sin_ptr + token * 2 * half + half + pairs, mask=in_row, other=0.0)
    source = x_ptr + token * x_token_stride + heads * x_head_stride + pairs
    a = tl.load(source, mask=mask, other=0.0).to(tl.float32)  # [HEADS, HALF]
    b = tl.load(source + half, mask=mask, other=0.0).to(tl.float32)
    target = out_ptr + (token * num_heads + heads) * 2 * half + pairs
    tl.store(target, (a * cos - b * sin).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(target + half, (b * cos + a * sin).to(out_ptr.dtype.element_ty), mask=mask)


def rotate(
    x: torch.Tensor,  # [num_tokens, heads, head_size]
    cos: torch.Tensor,  # [num_tokens, head_size]
    sin: torch.Tensor,  # [num_tokens, head_size]
) -> torch.Tensor:  # [num_tokens, heads, head_size]
    """See the package's docstring."""
    num_tokens, num_heads, head_size = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if num_tokens:
        rotate_kernel[(num_tokens,)](
            x,
            cos.contiguous(),
            sin.contiguous(),
            out,
            x.stride(0),
            x.stride(1),
            num_heads,
            head_size // 2,
            HEADS=triton.next_power_of_2(num_heads),
            HALF=triton.next_power_of_2(head_size // 2),
            num_warps=NUM_THREADS // warp_size(x),
        )
    return out


def builds() -> list[Build]:
    """The 32 query heads of Llama-3-8B, a step of 1,024 tokens."""
    tokens, heads, head_size = 1024, 32, 128
    row_bytes = 2 * heads * head_size
    angle_bytes = 2 * 4 * head_size // 2
    types = {"x_ptr": "*bf16", "cos_ptr": "*fp32", "sin_ptr": "*fp32", "out_ptr": "*bf16"}
    numbers = ("x_token_stride", "x_head_stride", "num_heads", "half")
    return [
        Build(
            operation="rotary_embedding",
            name=f"{heads} heads of {head_size}",
            kernel=rotate_kernel,
            types={**types, **dict.fromkeys(numbers, "i32")},
            constants={"HEADS": heads, "HALF": head_size // 2},
            divisible=frozenset({*types, *numbers}),
            num_threads=NUM_THREADS,
            workload=Workload(
                f"{tokens} tokens",
                tokens * (2 * row_bytes + angle_bytes),
                3 * tokens * heads * head_size,
                tokens,
                row_bytes + angle_bytes,
            ),
        )
    ]
