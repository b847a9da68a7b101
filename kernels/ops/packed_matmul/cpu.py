"""packed_matmul for few rows: each weight is read once, in order, and multiplied while it is in the cache.

A thread takes a strip of 32 outputs, whose weights go into AMX's tile registers as they lie in memory: 2 KiB make the
two right-hand sides of 16 or 32 rows.

    rows       left-hand tiles 4 and 5     [16 rows, 32 columns] each
    weights    right-hand tiles 6 and 7    [16 pairs of columns, 16 outputs, 2]
    sums       tiles 0 to 3                [16 rows, 16 outputs] each

oneDNN multiplies the same memory, and takes 1.4 times as long for 32 rows of the default model's layers
(benchmarks/LOG.md).

Called by the package and by decoder_step/cpu.py. Twin in vLLM: csrc/cpu/micro_gemm/cpu_micro_gemm_amx.hpp.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from minivllm.kernels.amx import (
    TILE_SHAPE,
    load_tiles_shape,
    release_tiles,
    tile_dot_bf16,
    tile_load,
    tile_store,
    tile_zero,
)
from minivllm.kernels.jit import array_at, exp, jit, like, narrow, prange, use_torch_threads, widen

STRIP = 32  # outputs
TILE_ROWS = 16
ROWS_AT_ONCE = 32
CHUNK = 32  # columns of one left-hand tile
BYTES = 2  # of a bfloat16


def padded(num_rows: int) -> int:
    """Rows that must be in memory behind the first of num_rows: tiles are read and written whole."""
    return -(-num_rows // TILE_ROWS) * TILE_ROWS


def packed_matmul(
    rows: torch.Tensor,  # [num_rows, in_features]
    strips: torch.Tensor,  # [ceil(out_features / 32), in_features / 2, 32, 2]
    bias: torch.Tensor | None,  # [out_features]
    out_features: int,
) -> torch.Tensor:  # [num_rows, out_features]
    """See the package's docstring."""
    num_rows, in_features = rows.shape
    source = torch.zeros(padded(num_rows), in_features, dtype=rows.dtype)  # [padded rows, in_features]
    source[:num_rows] = rows
    out = torch.empty(num_rows, out_features, dtype=rows.dtype)
    sizes = (num_rows, in_features, out_features)
    addresses = (source.data_ptr(), strips.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr())
    use_torch_threads()
    multiply(*addresses, sizes, like(rows))
    return out


@jit
def dot(rows: int, num_rows: int, num_columns: int, strip: int, sums: Any) -> None:
    """sums[:num_rows rounded up, 32] = rows . strip, at most 32 rows.

    rows: address of [num_rows rounded up to 16, num_columns]; strip: address of [num_columns / 2, 32, 2].
    """
    row_bytes, sum_bytes, pair_bytes = num_columns * BYTES, STRIP * 4, STRIP * 2 * BYTES
    lower, sums_at = rows + TILE_ROWS * row_bytes, sums.ctypes.data
    tile_zero(0)
    tile_zero(1)
    tile_zero(2)
    tile_zero(3)
    for chunk in range(num_columns // CHUNK):
        weights = strip + chunk * (CHUNK // 2) * pair_bytes
        tile_load(6, weights, pair_bytes)
        tile_load(7, weights + pair_bytes // 2, pair_bytes)
        tile_load(4, rows + chunk * CHUNK * BYTES, row_bytes)
        tile_dot_bf16(0, 4, 6)
        tile_dot_bf16(1, 4, 7)
        if num_rows > TILE_ROWS:
            tile_load(5, lower + chunk * CHUNK * BYTES, row_bytes)
            tile_dot_bf16(2, 5, 6)
            tile_dot_bf16(3, 5, 7)
    tile_store(0, sums_at, sum_bytes)
    tile_store(1, sums_at + sum_bytes // 2, sum_bytes)
    if num_rows > TILE_ROWS:
        tile_store(2, sums_at + TILE_ROWS * sum_bytes, sum_bytes)
        tile_store(3, sums_at + TILE_ROWS * sum_bytes + sum_bytes // 2, sum_bytes)


@jit(parallel=True)
def multiply(
    rows: int,  # [padded(num_rows), in_features]
    weight: int,  # strips
    bias: int,  # [out_features], or 0
    out: int,  # [num_rows, out_features] written
    sizes: tuple[int, ...],  # num_rows, in_features, out_features
    like: Any,
) -> None:
    """out = rows . weight + bias, rounded once."""
    num_rows, in_features, out_features = sizes
    outs, biases = array_at(out, (num_rows, out_features), like), array_at(bias, (out_features,), like)
    for strip in prange(-(-out_features // STRIP)):
        load_tiles_shape(TILE_SHAPE.ctypes.data)
        sums = np.empty((ROWS_AT_ONCE, STRIP), np.float32)
        width = min(STRIP, out_features - strip * STRIP)
        for first in range(0, num_rows, ROWS_AT_ONCE):
            count = min(ROWS_AT_ONCE, num_rows - first)
            source = rows + first * in_features * BYTES
            dot(source, count, in_features, weight + strip * in_features * STRIP * BYTES, sums)
            for row in range(count):
                if bias != 0:
                    for i in range(width):
                        sums[row, i] += widen(biases[strip * STRIP + i])
                for i in range(width):
                    outs[first + row, strip * STRIP + i] = narrow(sums[row, i], like)
        release_tiles()


@jit(parallel=True)
def multiply_and_gate(
    rows: int,  # [padded(num_rows), in_features]
    weight: int,  # strips: the gate's, then as many others
    bias: int,  # [2 * out_features], or 0
    out: int,  # [num_rows, out_features] written: silu(gate) * other
    sizes: tuple[int, ...],  # num_rows, in_features, out_features
    like: Any,
) -> None:
    """silu_and_mul of the product, rounded where the two operations would round."""
    num_rows, in_features, out_features = sizes
    outs, biases = array_at(out, (num_rows, out_features), like), array_at(bias, (2 * out_features,), like)
    strip_bytes = in_features * STRIP * BYTES
    for strip in prange(out_features // STRIP):
        load_tiles_shape(TILE_SHAPE.ctypes.data)
        gates, ups = np.empty((ROWS_AT_ONCE, STRIP), np.float32), np.empty((ROWS_AT_ONCE, STRIP), np.float32)
        gate_strip = weight + strip * strip_bytes
        up_strip = gate_strip + out_features // STRIP * strip_bytes
        for first in range(0, num_rows, ROWS_AT_ONCE):
            count = min(ROWS_AT_ONCE, num_rows - first)
            source = rows + first * in_features * BYTES
            dot(source, count, in_features, gate_strip, gates)
            dot(source, count, in_features, up_strip, ups)
            for row in range(count):
                if bias != 0:
                    for i in range(STRIP):
                        gates[row, i] += widen(biases[strip * STRIP + i])
                        ups[row, i] += widen(biases[out_features + strip * STRIP + i])
                for i in range(STRIP):
                    gate = widen(narrow(gates[row, i], like))
                    gate = widen(narrow(gate / (np.float32(1) + exp(-gate)), like))
                    outs[first + row, strip * STRIP + i] = narrow(gate * widen(narrow(ups[row, i], like)), like)
        release_tiles()
