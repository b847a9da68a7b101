"""packed_matmul: a weight is read in order, once per group of rows, and multiplied while it is in the cache.

A thread takes a strip of 32 outputs, whose weights go into AMX's tile registers as they lie in memory: 2 KiB make the
two right-hand sides of 16 or 32 rows.

    rows       left-hand tiles 4 and 5     [16 rows, 32 columns] each
    weights    right-hand tiles 6 and 7    [16 pairs of columns, 16 outputs, 2]
    sums       tiles 0 to 3                [16 rows, 16 outputs] each

oneDNN multiplies the same memory. For 32 rows it takes 1.6 to 2.9 times as long here, for 1,024 rows 0.7 to 1.8 times,
by shape (a loop over one weight, 2026-11-26).

Called by the package and by decoder_step/cpu.py. Twin in vLLM: csrc/cpu/micro_gemm/cpu_micro_gemm_amx.hpp.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from minivllm.kernels.amx import (
    TILE_SHAPE,
    load_tiles_shape,
    narrow_row,
    on_stack,
    prefetch,
    release_tiles,
    tile_dot_bf16,
    tile_load,
    tile_store,
    tile_zero,
)
from minivllm.kernels.jit import (
    FLOAT32,
    array_at,
    exp,
    get_thread_id,
    jit,
    like,
    narrow,
    prange,
    rounded,
    use_torch_threads,
    widen,
)
from minivllm.kernels.packed_matmul.codes import FEW_ROWS, dot_codes, sum_pieces, widen_strip

STRIP = 32  # outputs
TILE_ROWS = 16
ROWS_AT_ONCE = 32
CHUNK = 32  # columns of one left-hand tile
BYTES = 2  # of a bfloat16
CACHE_LINE = 64
SUMS_BYTES = ROWS_AT_ONCE * STRIP * 4
GROUP_BYTES = 3 << 17
AHEAD = 4096  # bytes: the CPU itself asks no further than the end of a page (a tenth faster)


def padded(num_rows: int) -> int:
    """Rows that must be in memory behind the first of num_rows: tiles are read and written whole."""
    return -(-num_rows // TILE_ROWS) * TILE_ROWS


def packed_matmul(
    rows: torch.Tensor,  # [num_rows, in_features]
    strips: torch.Tensor,  # [ceil(out_features / 32), in_features / 2, 32, 2], or codes: [.., in_features / 2, 32]
    bias: torch.Tensor | None,  # [out_features]
    out_features: int,
    levels: torch.Tensor | None,  # [ceil(out_features / 32), in_features / 32, 2, 32], of codes
) -> torch.Tensor:  # [num_rows, out_features]
    """See the package's docstring."""
    num_rows, in_features = rows.shape
    source = torch.zeros(padded(num_rows), in_features, dtype=rows.dtype)  # [padded rows, in_features]
    source[:num_rows] = rows
    out = torch.empty(num_rows, out_features, dtype=rows.dtype)
    weight = (strips.data_ptr(), 0 if levels is None else levels.data_ptr())
    use_torch_threads()
    scratch = widened(in_features) if levels is not None else source  # alive until the call returns
    sizes = (num_rows, in_features, out_features)
    bias_at = 0 if bias is None else bias.data_ptr()
    multiply(source.data_ptr(), weight, bias_at, out.data_ptr(), sizes, scratch.data_ptr(), like(rows))
    return out


def widened(in_features: int) -> torch.Tensor:  # [num_threads, 2, in_features * 32]
    """Where each thread may widen two strips of codes."""
    return torch.empty(torch.get_num_threads(), 2, in_features * STRIP, dtype=torch.bfloat16)


@jit
def dot(rows: int, num_rows: int, num_columns: int, strip: int, ahead: int, sums: int) -> None:
    """sums[:num_rows rounded up, 32] = rows . strip, at most 32 rows.

    rows: address of [num_rows rounded up to 16, num_columns]; strip: address of [num_columns / 2, 32, 2], which asks
    for the bytes `ahead` of it unless that is 0; sums: address of [32, 32] float32.
    """
    row_bytes, sum_bytes, pair_bytes = num_columns * BYTES, STRIP * 4, STRIP * 2 * BYTES
    lower = rows + TILE_ROWS * row_bytes
    tile_zero(0)
    tile_zero(1)
    tile_zero(2)
    tile_zero(3)
    for chunk in range(num_columns // CHUNK):
        weights = strip + chunk * (CHUNK // 2) * pair_bytes
        if ahead > 0:
            for line in range(0, (CHUNK // 2) * pair_bytes, CACHE_LINE):
                prefetch(weights + ahead + line)
        tile_load(6, weights, pair_bytes)
        tile_load(4, rows + chunk * CHUNK * BYTES, row_bytes)
        tile_dot_bf16(0, 4, 6)
        tile_load(7, weights + pair_bytes // 2, pair_bytes)
        tile_dot_bf16(1, 4, 7)
        if num_rows > TILE_ROWS:
            tile_load(5, lower + chunk * CHUNK * BYTES, row_bytes)
            tile_dot_bf16(2, 5, 6)
            tile_dot_bf16(3, 5, 7)
    tile_store(0, sums, sum_bytes)
    tile_store(1, sums + sum_bytes // 2, sum_bytes)
    if num_rows > TILE_ROWS:
        tile_store(2, sums + TILE_ROWS * sum_bytes, sum_bytes)
        tile_store(3, sums + TILE_ROWS * sum_bytes + sum_bytes // 2, sum_bytes)


@jit(inline="always")
def place_of(weight: tuple[int, int], number: int, in_features: int, num_rows: int, scratch: int) -> Any:
    """Where strip `number` lies: its values and 0, or its codes and levels. For many rows codes are widened first."""
    values, levels = weight
    if levels == 0:
        return values + number * in_features * STRIP * BYTES, np.int64(0)
    codes, levels = values + number * in_features * STRIP // 2, levels + number * in_features * 2 * BYTES
    if num_rows <= FEW_ROWS:
        return codes, levels
    widen_strip(codes, levels, in_features, scratch)
    return scratch, np.int64(0)


@jit(inline="always")
def sums_of_rows(rows: int, num_rows: int, in_features: int, weight: tuple[int, int]) -> Any:
    """What dot_codes needs of the rows, or nothing: [num_rows, in_features / 32]."""
    needed = num_rows if weight[1] != 0 and num_rows <= FEW_ROWS else 0
    row_sums = np.empty((needed, in_features // CHUNK), np.float32)
    sum_pieces(rows, needed, in_features, row_sums)
    return row_sums


@jit
def times(
    rows: int, num_rows: int, in_features: int, place: tuple[int, int], ahead: int, row_sums: Any, sums: int
) -> None:
    """sums = rows . the strip at `place`, as dot's."""
    if place[1] == 0:
        dot(rows, num_rows, in_features, place[0], ahead, sums)
    else:
        dot_codes(rows, num_rows, in_features, place[0], place[1], row_sums, sums)


@jit(inline="always")
def add_bias(sums: Any, num_rows: int, bias: Any) -> None:  # [32, 32], changed; [32], of the strip's outputs
    for row in range(num_rows):
        for i in range(len(bias)):
            sums[row, i] += widen(bias[i])


@jit(inline="always")
def keep(sums: int, num_rows: int, out: int, row_bytes: int) -> None:
    """The rows of sums [32, 32], rounded, as 32 columns of the rows at `out`."""
    for row in range(num_rows):
        narrow_row(sums + row * STRIP * 4, out + row * row_bytes)
        narrow_row(sums + row * STRIP * 4 + TILE_ROWS * 4, out + row * row_bytes + TILE_ROWS * BYTES)


@jit(parallel=True)
def multiply(
    rows: int,  # [padded(num_rows), in_features]
    weight: tuple[int, int],  # strips and 0; or codes and levels
    bias: int,  # [out_features], or 0
    out: int,  # [num_rows, out_features] written
    sizes: tuple[int, ...],  # num_rows, in_features, out_features
    scratch: int,  # `widened`, for weights in codes
    like: Any,
) -> None:
    """out = rows . weight + bias, rounded once."""
    num_rows, in_features, out_features = sizes
    outs, biases = array_at(out, (num_rows, out_features), like), array_at(bias, (out_features,), like)
    row_bytes, num_strips = in_features * BYTES, -(-out_features // STRIP)
    row_sums = sums_of_rows(rows, num_rows, in_features, weight)
    for part in prange(num_groups(num_rows, in_features) * num_strips):
        load_tiles_shape(TILE_SHAPE.ctypes.data)
        sums_at = on_stack(SUMS_BYTES)
        sums = array_at(sums_at, (ROWS_AT_ONCE, STRIP), FLOAT32)
        group, strip = part // num_strips, part % num_strips
        width = min(STRIP, out_features - strip * STRIP)
        own = scratch + get_thread_id() * 2 * in_features * STRIP * BYTES
        place = place_of(weight, strip, in_features, num_rows, own)
        start, end = rows_of_group(num_rows, in_features, group)
        for first in range(start, end, ROWS_AT_ONCE):
            count, ahead = min(ROWS_AT_ONCE, end - first), AHEAD if first == start else 0
            times(rows + first * row_bytes, count, in_features, place, ahead, row_sums, sums_at)
            if bias != 0:
                add_bias(sums, count, biases[strip * STRIP : strip * STRIP + width])
            if width == STRIP:
                keep(sums_at, count, out + (first * out_features + strip * STRIP) * BYTES, out_features * BYTES)
            else:
                for row in range(count):
                    for i in range(width):
                        outs[first + row, strip * STRIP + i] = narrow(sums[row, i], like)
        release_tiles()


@jit(parallel=True)
def multiply_and_gate(
    rows: int,  # [padded(num_rows), in_features]
    weight: tuple[int, int],  # as multiply's: the gate's strips, then as many others
    bias: int,  # [2 * out_features], or 0
    out: int,  # [num_rows, out_features] written: silu(gate) * other
    sizes: tuple[int, ...],  # num_rows, in_features, out_features
    scratch: int,
    like: Any,
) -> None:
    """silu_and_mul of the product, rounded where the two operations would round."""
    num_rows, in_features, out_features = sizes
    biases = array_at(bias, (2 * out_features,), like)
    row_bytes, num_strips = in_features * BYTES, out_features // STRIP
    row_sums = sums_of_rows(rows, num_rows, in_features, weight)
    for part in prange(num_groups(num_rows, in_features) * num_strips):
        load_tiles_shape(TILE_SHAPE.ctypes.data)
        gates_at, ups_at = on_stack(SUMS_BYTES), on_stack(SUMS_BYTES)
        gates = array_at(gates_at, (ROWS_AT_ONCE, STRIP), FLOAT32)
        ups = array_at(ups_at, (ROWS_AT_ONCE, STRIP), FLOAT32)
        group, strip = part // num_strips, part % num_strips
        column, own = strip * STRIP, scratch + get_thread_id() * 2 * in_features * STRIP * BYTES
        gate = place_of(weight, strip, in_features, num_rows, own)
        up = place_of(weight, num_strips + strip, in_features, num_rows, own + in_features * STRIP * BYTES)
        start, end = rows_of_group(num_rows, in_features, group)
        for first in range(start, end, ROWS_AT_ONCE):
            count, ahead = min(ROWS_AT_ONCE, end - first), AHEAD if first == start else 0
            source = rows + first * row_bytes
            times(source, count, in_features, gate, ahead, row_sums, gates_at)
            times(source, count, in_features, up, ahead, row_sums, ups_at)
            if bias != 0:
                add_bias(gates, count, biases[column : column + STRIP])
                add_bias(ups, count, biases[out_features + column : out_features + column + STRIP])
            gate_values(gates_at, ups_at, count * STRIP, like)
            keep(gates_at, count, out + (first * out_features + column) * BYTES, out_features * BYTES)
        release_tiles()


@jit(in_order=True)
def gate_values(gates_at: int, ups_at: int, count: int, like: Any) -> None:
    """gates = silu(gates) * ups, both [count] float32"""
    gates, ups = array_at(gates_at, (count,), FLOAT32), array_at(ups_at, (count,), FLOAT32)
    for i in range(len(gates)):
        gate = rounded(gates[i], like)
        gate = rounded(gate / (np.float32(1) + exp(-gate)), like)
        gates[i] = gate * rounded(ups[i], like)


@jit(inline="always")
def num_groups(num_rows: int, in_features: int) -> int:
    """Rows are taken in groups that stay in a core's cache while the strips pass by."""
    return -(-num_rows * in_features * BYTES // GROUP_BYTES)


@jit(inline="always")
def rows_of_group(num_rows: int, in_features: int, group: int) -> tuple[int, int]:
    """The first and the end of its rows."""
    blocks = -(-num_rows // ROWS_AT_ONCE)
    size = -(-blocks // num_groups(num_rows, in_features)) * ROWS_AT_ONCE
    return group * size, min(num_rows, (group + 1) * size)
