"""Strips in 4 bits: a code per weight, and a scale and a minimum for every 32 columns of an output.

    weight[32 s + o, 32 g + 2 p + j] = levels[s, g, 0, o] * code + levels[s, g, 1, o]
    code, of 0 .. 15                 = half j of the byte codes[s, 16 g + p, o], the lower half first

A group has as many columns as a left-hand tile, so 32 outputs x 32 columns are one piece: 512 bytes of codes, 128 of
levels. There are two ways to multiply with it, and few rows take the first:

    few rows     128 + code is exact in bfloat16 and takes two instructions to make: 0x4300 with the code in its lowest
                 bits. The piece's product with those integers is put right afterwards, for each row:
                     sum += scale * product + (minimum - 128 * scale) * sum of the row's 32 values
    many rows    the strip is widened to the bfloat16 that it stands for, rounded once, and multiplied as any other

The first costs something per row and piece, the second per weight, three times what the integers cost.

Knows no product but this. Called by cpu.py. Twin in vLLM: csrc/cpu/cpu_wna16.cpp.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minivllm.kernels.amx import (
    on_stack,
    prefetch,
    tile_dot_bf16,
    tile_load,
    tile_store,
    tile_zero,
    widen_codes,
)
from minivllm.kernels.jit import BFLOAT16, BYTE, FLOAT32, WORD, array_at, jit, widen, widen_half

FEW_ROWS = 32  # up to here as integers
STRIP = 32  # outputs
PIECE = 32  # columns, of one group
PAIRS = PIECE // 2
CODE_BYTES, LEVEL_BYTES, PIECE_BYTES = PAIRS * STRIP, 2 * STRIP * 2, PAIRS * STRIP * 4  # of a piece; and as bfloat16
LEVELS_BYTES, PIECES_BYTES, PARTS_BYTES = 2 * STRIP * 4, 2 * PIECE_BYTES, FEW_ROWS * STRIP * 4
TILE_ROWS = 16
BYTES = 2  # of a bfloat16
CACHE_LINE = 64
AHEAD = 4096  # bytes, as for other strips
OFFSET = 128.0


@jit
def widen_strip(codes: int, levels: int, in_features: int, strip: int) -> None:
    """Written to `strip`: [in_features / 2, 32, 2] bfloat16.

    codes: address of the strip's [in_features / 2, 32]; levels: of its [in_features / 32, 2, 32].
    """
    floats = on_stack(LEVELS_BYTES)
    scales, minimums = floats, floats + STRIP * 4
    for piece in range(in_features // PIECE):
        read_levels(levels + piece * LEVEL_BYTES, floats)
        for pair in range(piece * PAIRS, (piece + 1) * PAIRS):
            source, target = codes + pair * STRIP, strip + pair * STRIP * 4
            prefetch(source + AHEAD)
            widen_codes(source, scales, minimums, target)
            widen_codes(source + TILE_ROWS, scales + CACHE_LINE, minimums + CACHE_LINE, target + CACHE_LINE)


@jit(inline="always")
def read_levels(levels: int, floats: int) -> None:
    """A piece's [2, 32] fp16 at `levels` as float32 at `floats`."""
    source, target = array_at(levels, (2 * STRIP,), BFLOAT16), array_at(floats, (2 * STRIP,), FLOAT32)
    for i in range(2 * STRIP):
        target[i] = widen_half(source[i])


@jit
def sum_pieces(rows: int, num_rows: int, in_features: int, row_sums: Any) -> None:
    """row_sums[row, piece] = sum of the row's values of that piece. rows: address of [num_rows, in_features]"""
    values = array_at(rows, (num_rows, in_features // PIECE, PIECE), BFLOAT16)
    for row in range(num_rows):
        for piece in range(in_features // PIECE):
            summed = np.float32(0)
            for i in range(PIECE):
                summed += widen(values[row, piece, i])
            row_sums[row, piece] = summed


@jit
def dot_codes(
    rows: int,  # address of [num_rows rounded up to 16, num_columns] bfloat16, at most 32 rows
    num_rows: int,
    num_columns: int,
    codes: int,  # addresses of the strip's codes and levels
    levels: int,
    row_sums: Any,  # [num_rows, num_columns / 32]
    sums: int,  # address of [32, 32] float32, written
) -> None:
    """sums[:num_rows, 32] = rows . weight of the strip, from integers."""
    tiles, parts = on_stack(PIECES_BYTES), on_stack(PARTS_BYTES)
    row_bytes, sum_bytes, pair_bytes = num_columns * BYTES, STRIP * 4, STRIP * 2 * BYTES
    lower, num_pieces = rows + TILE_ROWS * row_bytes, num_columns // PIECE
    whole = array_at(sums, (FEW_ROWS, STRIP), FLOAT32)
    for row in range(num_rows):
        for i in range(STRIP):
            whole[row, i] = 0
    make_integers(codes, tiles)
    for piece in range(num_pieces):
        here = tiles + piece % 2 * PIECE_BYTES
        if piece + 1 < num_pieces:  # before the tiles load: what was just written is not in the cache yet
            make_integers(codes + (piece + 1) * CODE_BYTES, tiles + (piece + 1) % 2 * PIECE_BYTES)
        tile_zero(0)
        tile_zero(1)
        tile_load(4, rows + piece * PIECE * BYTES, row_bytes)
        tile_load(6, here, pair_bytes)
        tile_dot_bf16(0, 4, 6)
        tile_load(7, here + pair_bytes // 2, pair_bytes)
        tile_dot_bf16(1, 4, 7)
        tile_store(0, parts, sum_bytes)
        tile_store(1, parts + sum_bytes // 2, sum_bytes)
        if num_rows > TILE_ROWS:
            tile_zero(2)
            tile_zero(3)
            tile_load(5, lower + piece * PIECE * BYTES, row_bytes)
            tile_dot_bf16(2, 5, 6)
            tile_dot_bf16(3, 5, 7)
            tile_store(2, parts + TILE_ROWS * sum_bytes, sum_bytes)
            tile_store(3, parts + TILE_ROWS * sum_bytes + sum_bytes // 2, sum_bytes)
        put_right(parts, levels + piece * LEVEL_BYTES, row_sums, piece, num_rows, whole)


@jit(inline="always")
def make_integers(codes: int, tiles: int) -> None:
    """A piece's 128 + code: [16, 32] bytes at `codes` as [16, 32, 2] bfloat16 at `tiles`."""
    source, target = array_at(codes, (PAIRS * STRIP,), BYTE), array_at(tiles, (PAIRS * STRIP,), WORD)
    for line in range(0, CODE_BYTES, CACHE_LINE):
        prefetch(codes + AHEAD + line)
    for i in range(PAIRS * STRIP):
        both = np.uint32(source[i])
        target[i] = (both | both << np.uint32(12)) & np.uint32(0x000F000F) | np.uint32(0x43004300)


@jit(inline="always")
def put_right(parts: int, levels: int, row_sums: Any, piece: int, num_rows: int, sums: Any) -> None:
    """sums += scale * parts + (minimum - 128 * scale) * row's sum, of one piece."""
    floats = on_stack(LEVELS_BYTES)
    read_levels(levels, floats)
    both = array_at(floats, (2, STRIP), FLOAT32)  # scales; minimums, from here on less 128 scales
    for i in range(STRIP):
        both[1, i] -= np.float32(OFFSET) * both[0, i]
    products = array_at(parts, (FEW_ROWS, STRIP), FLOAT32)
    for row in range(num_rows):
        of_row = row_sums[row, piece]
        for i in range(STRIP):
            sums[row, i] += products[row, i] * both[0, i] + both[1, i] * of_row
