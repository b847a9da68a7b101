"""rows @ weight.T for the few rows of a decode step, over a bfloat16 weight packed into strips of 32 outputs.

    out[m, o] = sum_i rows[m, i] * weight[o, i] (+ bias[o]),    weight[32 s + o, 2 p + j] = strips[s, p, o, j]

That is how oneDNN packs a weight on a CPU with AMX (models/onednn.py looks whether it does): the weight that serves
many rows there serves few rows here, and is in memory once. Sums are float32, rounded once to bfloat16. A row's bits
depend on that row alone. Without AMX there is only the reference.

Called by models/linear.py and by decoder_step. Twin in vLLM: csrc/cpu/micro_gemm.
"""

from __future__ import annotations

from types import ModuleType

import torch

from minivllm.kernels.amx import HAS_AMX
from minivllm.kernels.dispatch import choose
from minivllm.kernels.packed_matmul import cpu, reference

__all__ = ["MAX_ROWS", "packed_matmul"]

MAX_ROWS = 64 if HAS_AMX else 0  # up to here it is faster than oneDNN (benchmarks/LOG.md)


def packed_matmul(
    rows: torch.Tensor,  # [num_rows, in_features] bfloat16
    strips: torch.Tensor,  # [ceil(out_features / 32), in_features / 2, 32, 2] bfloat16, zeros behind the last output
    out_features: int,
    *,
    bias: torch.Tensor | None = None,  # [out_features] bfloat16
    impl: str = "auto",
) -> torch.Tensor:  # [num_rows, out_features] bfloat16
    """Changes no argument. Raises ValueError naming both sides where shapes or dtypes do not fit."""
    num_columns = rows.shape[-1]
    expected = (-(-out_features // 32), num_columns // 2, 32, 2)
    if rows.dim() != 2 or rows.dtype != torch.bfloat16:
        raise ValueError(f"rows: expected [num_rows, in_features] bfloat16, got {list(rows.shape)} {rows.dtype}")
    if num_columns % 32:
        raise ValueError(f"rows: expected a multiple of 32 columns, got {num_columns}")
    if strips.shape != expected or strips.dtype != torch.bfloat16 or not strips.is_contiguous():
        raise ValueError(f"strips: expected dense {list(expected)} bfloat16, got {list(strips.shape)} {strips.dtype}")
    if bias is not None and (bias.shape != (out_features,) or bias.dtype != torch.bfloat16):
        raise ValueError(f"bias: expected [{out_features}] bfloat16, got {list(bias.shape)} {bias.dtype}")
    module: ModuleType = cpu if HAS_AMX and choose(impl, rows) == "cpu" else reference
    product: torch.Tensor = module.packed_matmul(rows, strips, bias, out_features)
    return product
