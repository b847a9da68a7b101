"""rms_norm in Triton: one program per row, the whole row in registers.

    row ──load──▶ + residual ──▶ round, store the sum ──▶ mean of squares ──▶ scale ──▶ store

A row is read once and written once (twice with a residual), so the kernel is bound by memory: README.md counts.
Called by the package on GPU tensors. Twin in vLLM: csrc/layernorm_kernels.cu.
"""

import torch
import triton
import triton.language as tl

from minivllm.kernels.build import Build, Workload
from minivllm.kernels.dispatch import warp_size

MAX_SIZE = 16384  # values of one row that fit into a program's registers


@triton.jit
def rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    total_ptr,
    x_stride,  # between rows, in values; the other four tensors are contiguous
    size,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    ADD_ONE: tl.constexpr,
    BLOCK: tl.constexpr,  # power of two >= size
):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    total = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
    if HAS_RESIDUAL:
        total += tl.load(residual_ptr + row * size + columns, mask=mask, other=0.0).to(tl.float32)
        rounded = total.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * size + columns, rounded, mask=mask)
        total = rounded.to(tl.float32)  # the norm is taken of what the next layer will see
    mean_square = tl.sum(total * total, axis=0) / size
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    if ADD_ONE:
        weight += 1.0
    out = total * tl.rsqrt(mean_square + eps) * weight
    tl.store(out_ptr + row * size + columns, out.to(out_ptr.dtype.element_ty), mask=mask)


def rms_norm(
    x: torch.Tensor,  # [..., size]
    weight: torch.Tensor,  # [size]
    eps: float,
    residual: torch.Tensor | None,  # [..., size]
    add_one: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # out and s, both [..., size]
    """See the package's docstring. Raises ValueError for rows that do not fit into registers."""
    size = x.shape[-1]
    if size > MAX_SIZE:
        raise ValueError(f"x: expected rows of at most {MAX_SIZE} values, got {size}")
    rows = x.reshape(-1, size)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(out)
    block = triton.next_power_of_2(size)
    if rows.shape[0]:
        rms_norm_kernel[(rows.shape[0],)](
            rows,
            rows if residual is None else residual.contiguous(),
            weight.contiguous(),
            out,
            total,
            rows.stride(0),
            size,
            eps,
            HAS_RESIDUAL=residual is not None,
            ADD_ONE=add_one,
            BLOCK=block,
            num_warps=num_threads(block) // warp_size(x),
        )
    return out, total


def num_threads(block: int) -> int:
    """Eight values per thread or more: 128-bit loads in every dtype, and no more threads than loads."""
    return min(max(block // 8, 64), 512)


def builds() -> list[Build]:
    """bfloat16 rows of Llama-3-8B and of a small model, a step of 1,024 tokens."""
    found = []
    for size in (576, 4096):
        block = triton.next_power_of_2(size)
        rows, row_bytes = 1024, 2 * size
        types = dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "out_ptr", "total_ptr"), "*bf16")
        found.append(
            Build(
                operation="rms_norm",
                name=f"size {size}",
                kernel=rms_norm_kernel,
                types={**types, "x_stride": "i32", "size": "i32", "eps": "fp32"},
                constants={"HAS_RESIDUAL": True, "ADD_ONE": False, "BLOCK": block},
                divisible=frozenset({*types, "x_stride", "size"}),
                num_threads=num_threads(block),
                workload=Workload(
                    f"{rows} rows", rows * 4 * row_bytes + row_bytes, 6 * rows * size, rows, 2 * row_bytes
                ),
            )
        )
    return found
