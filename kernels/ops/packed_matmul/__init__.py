"""rows @ weight.T over a weight packed into strips of 32 outputs, in bfloat16 or in 4 bits.

    out[m, o] = sum_i rows[m, i] * weight[o, i] (+ bias[o]),    weight[32 s + o, 2 p + j] = strips[s, p, o, j]

That is how oneDNN packs a weight on a CPU with AMX (models/onednn.py looks whether it does): the weight that serves
many rows there serves few rows here, and is in memory once. Sums are float32, rounded once to bfloat16. A row's bits
depend on that row alone. Without AMX there is only the reference.

Or over a weight in 4 bits, whose strips hold codes, with a scale and a minimum for every 32 columns: codes.py.

Called by models/linear.py and by decoder_step. Twin in vLLM: csrc/cpu/micro_gemm.
"""

from __future__ import annotations

from types import ModuleType

import torch

from minivllm.kernels.amx import HAS_AMX
from minivllm.kernels.dispatch import choose
from minivllm.kernels.packed_matmul import cpu, reference
from minivllm.kernels.packed_matmul.reference import pack_codes

__all__ = ["MAX_ROWS", "pack_codes", "packed_matmul"]

MAX_ROWS = 128 if HAS_AMX else 0  # up to here it is faster than oneDNN (benchmarks/LOG.md)


def packed_matmul(
    rows: torch.Tensor,  # [num_rows, in_features] bfloat16
    strips: torch.Tensor,  # [ceil(out_features / 32), in_features / 2, 32, 2] bfloat16, zeros behind the last output
    out_features: int,
    *,
    levels: torch.Tensor
    | None = None,  # [.., in_features / 32, 2, 32] fp16: strips are codes [.., in_features / 2, 32]
    bias: torch.Tensor | None = None,  # [out_features] bfloat16
    impl: str = "auto",
) -> torch.Tensor:  # [num_rows, out_features] bfloat16
    """Changes no argument. Raises ValueError naming both sides where shapes or dtypes do not fit."""
    num_columns = rows.shape[-1]
    if rows.dim() != 2 or rows.dtype != torch.bfloat16:
        raise ValueError(f"rows: expected [num_rows, in_features] bfloat16, got {list(rows.shape)} {rows.dtype}")
    if num_columns % 32:
        raise ValueError(f"rows: expected a multiple of 32 columns, got {num_columns}")
    num_strips = -(-out_features // 32)
    if levels is None:
        _check("strips", strips, (num_strips, num_columns // 2, 32, 2), torch.bfloat16)
    else:
        _check("strips", strips, (num_strips, num_columns // 2, 32), torch.uint8)
        _check("levels", levels, (num_strips, num_columns // 32, 2, 32), torch.float16)
    if bias is not None:
        _check("bias", bias, (out_features,), torch.bfloat16)
    module: ModuleType = cpu if HAS_AMX and choose(impl, rows) == "cpu" else reference
    product: torch.Tensor = module.packed_matmul(rows, strips, bias, out_features, levels)
    return product


def _check(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:  # tensor: of any shape
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(
            f"{name}: expected dense {list(shape)} {str(dtype).removeprefix('torch.')}, "
            f"got {list(tensor.shape)} {tensor.dtype}"
        )
