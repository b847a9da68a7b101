"""rms_norm in one pass over each row. Called by the package on CPU tensors. Twin in vLLM: csrc/cpu/layernorm.cpp."""

from typing import Any

import numpy as np
import torch

from minivllm.kernels.jit import array_at, jit, like, narrow, prange, widen


def rms_norm(
    x: torch.Tensor,  # [..., size]
    weight: torch.Tensor,  # [size]
    eps: float,
    residual: torch.Tensor | None,  # [..., size]
    add_one: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # out and s, both [..., size]
    """See the package's docstring."""
    x = x.contiguous()
    addend = x if residual is None else residual.contiguous()
    total = x if residual is None else torch.empty(x.shape, dtype=x.dtype)
    out = torch.empty(x.shape, dtype=x.dtype)
    addresses = (x.data_ptr(), addend.data_ptr(), total.data_ptr(), out.data_ptr(), weight.data_ptr())
    size = x.shape[-1]
    norm_rows(*addresses, x.numel() // size, size, residual is not None, eps, float(add_one), like(x))
    return out, total


@jit(parallel=True)
def norm_rows(
    x: int,
    residual: int,
    total: int,  # written where there is a residual, else it is x
    out: int,  # written
    weight: int,
    num_rows: int,
    size: int,
    has_residual: bool,
    eps: float,
    plus: float,  # 1 for Gemma's 1 + weight
    like: Any,
) -> None:
    """total = x + residual, out = its norm, row by row."""
    addresses = (x, residual, total, out, weight)
    for row in prange(num_rows):
        norm_row(np.int64(row), addresses, num_rows, size, has_residual, eps, plus, like)


@jit(in_order=True)
def norm_row(
    row: int,
    addresses: tuple[int, ...],  # x, residual, total, out, weight of norm_rows
    num_rows: int,
    size: int,
    has_residual: bool,
    eps: float,
    plus: float,
    like: Any,
) -> None:
    """Row number `row` of norm_rows."""
    x, residual, total, out, weight = addresses
    rows, residuals = array_at(x, (num_rows, size), like), array_at(residual, (num_rows, size), like)
    totals, outs = array_at(total, (num_rows, size), like), array_at(out, (num_rows, size), like)
    weights = array_at(weight, (size,), like)
    if has_residual:
        for i in range(size):
            totals[row, i] = narrow(widen(rows[row, i]) + widen(residuals[row, i]), like)
    scale = np.float32(1) / np.sqrt(sum_of_squares(totals[row]) / np.float32(size) + np.float32(eps))
    for i in range(size):
        scaled = widen(totals[row, i]) * scale * (widen(weights[i]) + np.float32(plus))
        outs[row, i] = narrow(scaled, like)


@jit
def sum_of_squares(values: Any) -> Any:  # [size] -> float32
    total = np.float32(0)
    for i in range(len(values)):
        total += widen(values[i]) * widen(values[i])
    return total
