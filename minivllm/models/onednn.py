"""oneDNN's packed weights through torch's private operations: pack, multiply, look at the memory.

oneDNN compiles a kernel for every new shape: 1 to 3 ms, and 0.6 MiB that it never gives back (2,000 different numbers
of rows took 700 MiB). Every step of an engine may have another number of rows. So rows come in 27 sizes up to 1,024,
the missing ones filled with zeros: 8 % more rows on average from 64 to 1,024, none at one and two.

Knows no layer. Called by: models/linear.py, models/widening.py. Twin in vLLM: the oneDNN handler of
vllm/_custom_ops.py and csrc/cpu/dnnl_helper.cpp.
"""

from __future__ import annotations

import ctypes

import torch
from torch.nn import functional as F

# Which layout oneDNN packs to depends on the number of rows it is told to expect. With 1 it leaves float32 weights
# as they are on AVX2 (2x slower at 4 rows); from 2 on it tiles them, and one layout serves every number of rows.
PACK_FOR_ROWS = 32
# (up to so many rows, in steps of)
ROW_STEPS = ((2, 1), (8, 4), (64, 8), (128, 32))
LARGE_ROW_STEP = 64


def pack(weight: torch.Tensor) -> torch.Tensor:  # [out_features, in_features] -> opaque
    """The weight in oneDNN's tiled layout. It can be multiplied with, not sliced or saved."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, PACK_FOR_ROWS)


def product(
    rows: torch.Tensor,  # [..., in_features]
    packed: torch.Tensor,  # [out_features, in_features] opaque, from `pack`
    bias: torch.Tensor | None,  # [out_features]
) -> torch.Tensor:  # [..., out_features]
    """rows @ weight.T + bias."""
    flat = rows if rows.dim() == 2 else rows.reshape(-1, rows.shape[-1])
    num_rows = flat.shape[0]
    padding = padded_rows(num_rows) - num_rows
    if padding:
        flat = F.pad(flat, (0, 0, 0, padding))
    out = torch.ops.mkldnn._linear_pointwise(flat, packed, bias, "none", [], "")
    if padding:
        out = out[:num_rows]
    return out if rows.dim() == 2 else out.view(*rows.shape[:-1], -1)


def padded_rows(num_rows: int) -> int:
    """The size that a product of `num_rows` rows is computed with."""
    step = next((step for limit, step in ROW_STEPS if num_rows <= limit), LARGE_ROW_STEP)
    return -(-num_rows // step) * step


def memory(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The bytes of a packed weight as [num_values] of `dtype`. Valid as long as `packed` lives."""
    num_bytes = int(torch.ops.mkldnn._nbytes(packed))
    address = int(torch.ops.mkldnn.data_ptr(packed))
    return torch.frombuffer((ctypes.c_char * num_bytes).from_address(address), dtype=dtype)
