"""silu_and_mul in Triton: a program per row and stretch of columns; gate and up are read, their product is written.

Bound by memory: three values move for each one computed. Called by the package on GPU
tensors. Twin in vLLM: csrc/activation_kernels.cu.
"""

import torch
import triton
import triton.language as tl

from minivllm.kernels.build import Build, Workload
from minivllm.kernels.dispatch import warp_size

BLOCK = 1024
NUM_THREADS = 128
SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)


@triton.jit
def silu_and_mul_kernel(
    x_ptr,
    out_ptr,
    x_stride,  # between rows, in values
    size,
    IS_SILU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One stretch of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    gate = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
    up = tl.load(x_ptr + row * x_stride + size + columns, mask=mask, other=0.0).to(tl.float32)
    # tanh-GELU is also a gate times a sigmoid: 0.5 (1 + tanh y) = sigmoid(2 y)
    slope = gate if IS_SILU else 2 * SQRT_2_OVER_PI * (gate + 0.044715 * gate * gate * gate)
    small = tl.exp(-tl.abs(slope))  # never overflows
    gated = gate * tl.where(slope >= 0, 1.0, small) / (1 + small)
    tl.store(out_ptr + row * size + columns, (gated * up).to(out_ptr.dtype.element_ty), mask=mask)


def silu_and_mul(
    x: torch.Tensor,  # [..., 2 * size]
    activation: str,
) -> torch.Tensor:  # [..., size]
    """See the package's docstring."""
    size = x.shape[-1] // 2
    rows = x.reshape(-1, 2 * size)
    out = torch.empty((*x.shape[:-1], size), dtype=x.dtype, device=x.device)
    if rows.shape[0] and size:
        grid = (rows.shape[0], triton.cdiv(size, BLOCK))
        silu_and_mul_kernel[grid](
            rows,
            out,
            rows.stride(0),
            size,
            IS_SILU=activation == "silu",
            BLOCK=BLOCK,
            num_warps=NUM_THREADS // warp_size(x),
        )
    return out


def builds() -> list[Build]:
    """The gate of Llama-3-8B, a step of 1,024 tokens."""
    rows, size = 1024, 14336
    return [
        Build(
            operation="silu_and_mul",
            name=f"{activation} {size}",
            kernel=silu_and_mul_kernel,
            types={"x_ptr": "*bf16", "out_ptr": "*bf16", "x_stride": "i32", "size": "i32"},
            constants={"IS_SILU": activation == "silu", "BLOCK": BLOCK},
            divisible=frozenset({"x_ptr", "out_ptr", "x_stride", "size"}),
            num_threads=NUM_THREADS,
            workload=Workload(
                f"{rows} rows", 6 * rows * size, 8 * rows * size, rows * triton.cdiv(size, BLOCK), 4 * BLOCK
            ),
        )
        for activation in ("silu", "gelu_tanh")
    ]
