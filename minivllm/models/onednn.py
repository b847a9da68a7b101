"""oneDNN's packed weights through torch's private operations: pack, multiply, look at the memory.

oneDNN compiles a kernel for every new shape: 1 to 3 ms, and 0.6 MiB that it never gives back (2,000 different numbers
of rows took 700 MiB). Every step of an engine may have another number of rows. So rows come in 27 sizes up to 1,024,
the missing ones filled with zeros: 8 % more rows on average from 64 to 1,024, none at one and two.

Knows no layer. Called by: models/linear.py, models/quantised.py, models/widening.py. Twin in vLLM: the oneDNN handler
of vllm/_custom_ops.py and csrc/cpu/dnnl_helper.cpp.
"""

from __future__ import annotations

import ctypes
import itertools

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


def linear(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """rows [num_rows, in_features] @ weight.T of a plain weight [out_features, in_features]."""
    return F.linear(_pad(rows), weight)[: rows.shape[0]]


def pack_int8(codes: torch.Tensor) -> torch.Tensor:  # [out_features, in_features] int8 -> opaque
    """As `pack`; behind the tiles lies the sum of each row, 4 bytes."""
    return torch.ops.onednn.qlinear_prepack(codes.contiguous(), None)


def int8_product(
    rows: torch.Tensor,  # [num_rows, in_features] uint8: codes + 128 (signed ones are 200 times slower on some CPUs)
    packed: torch.Tensor,  # [out_features, in_features] int8 opaque, from `pack_int8`
    scales: torch.Tensor,  # [out_features] fp32
) -> torch.Tensor:  # [num_rows, out_features] fp32
    """(rows - 128) @ codes.T * scales; the sums are exact integers."""
    zero = torch.zeros(1, dtype=torch.int32)  # of the weight: its codes are signed
    # then: no bias, the result as it is in float32, nothing fused behind it
    out = torch.ops.onednn.qlinear_pointwise(
        _pad(rows), 1.0, 128, packed, scales, zero, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return out[: rows.shape[0]]


def _pad(rows: torch.Tensor) -> torch.Tensor:  # [num_rows, in_features] -> [padded_rows(num_rows), in_features]
    padding = padded_rows(rows.shape[0]) - rows.shape[0]
    return F.pad(rows, (0, 0, 0, padding)) if padding else rows


def padded_rows(num_rows: int) -> int:
    """The size that a product of `num_rows` rows is computed with."""
    step = next((step for limit, step in ROW_STEPS if num_rows <= limit), LARGE_ROW_STEP)
    return -(-num_rows // step) * step


def memory(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The bytes of a packed weight as [num_values] of `dtype`. Valid as long as `packed` lives."""
    num_bytes = int(torch.ops.mkldnn._nbytes(packed))
    address = int(torch.ops.mkldnn.data_ptr(packed))
    return torch.frombuffer((ctypes.c_char * num_bytes).from_address(address), dtype=dtype)


# ------------------------------------------------------------------ a packed weight as packed_matmul takes it
def strips(packed: torch.Tensor) -> torch.Tensor:  # opaque -> [out_features / 32, in_features / 2, 32, 2]
    """A view of the packed weight's memory, valid as long as it lives. Only where `is_in_strips`."""
    out_features, in_features = packed.shape
    return memory(packed, packed.dtype).view(-(-out_features // 32), in_features // 2, 32, 2)


def is_in_strips(shape: tuple[int, int]) -> bool:
    """Whether oneDNN packs bfloat16 weights of this shape in strips of 32 rows (it does where the CPU has AMX).

    The layout depends on the shape alone, so a weight of random numbers tells: 2 ms for a million weights.
    """
    plain = torch.randn(shape, dtype=torch.bfloat16)  # [out_features, in_features]
    packed = pack(plain)
    tiles = find_tiles(packed, plain) if packed.is_mkldnn else None
    return tiles is not None and as_strips(tiles, shape[1]) is not None


def as_strips(tiles: torch.Tensor, in_features: int) -> torch.Tensor | None:
    """Strips [.., in_features / 2, 32, 2] of what `find_tiles` gives: if the rows fit, and no column is padding.

    tiles: [row_tiles, column_tiles, columns / group, rows, group]
    """
    whole = tiles.dtype == torch.bfloat16 and tiles.shape[3:] == (32, 2) and in_features % 32 == 0
    return tiles.flatten(1, 2) if whole and tiles.shape[1] * tiles.shape[2] * 2 == in_features else None


# ------------------------------------------------------------------ reading rows of a packed weight
def read_rows(tiles: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Rows of a packed weight, columns padded to whole tiles.

    tiles: [row_tiles, column_tiles, columns / group, rows, group] as `find_tiles` returns it; ids: [num_rows].
    """
    rows_per_tile = tiles.shape[3]
    return tiles[ids // rows_per_tile, :, :, ids % rows_per_tile].flatten(1)


def find_tiles(packed: torch.Tensor, plain: torch.Tensor) -> torch.Tensor | None:
    """A view of a packed weight's memory through which `read_rows` gives the rows of `plain`, or None.

    Valid as long as `packed` lives. packed: opaque; plain: [out_features, in_features], the same weight.
    oneDNN's inner-product layouts are tiles [columns / group, rows, group]; group is 2 or 4 where the CPU multiplies
    pairs of bfloat16 or four bytes at once. The tile's size differs by CPU and dtype, so it is searched for: 0.5 ms,
    plus a whole check.
    """
    values = memory(packed, packed.dtype)  # [num_values], padding included; int8: and 4 bytes a row behind the tiles
    num_rows, num_columns = plain.shape
    sizes = (64, 48, 32, 24, 16, 8, 4, 2, 1)
    for rows, columns, group in itertools.product(sizes, (*sizes, num_columns), (1, 2, 4)):
        row_tiles, column_tiles = -(-num_rows // rows), -(-num_columns // columns)
        num_values = row_tiles * rows * column_tiles * columns
        num_spare = 4 * row_tiles * rows if packed.dtype == torch.int8 else 0
        if columns % group or num_values + num_spare != values.numel():
            continue
        tiles = values[:num_values].view(row_tiles, column_tiles, columns // group, rows, group)
        if _reads_back(tiles, plain, rows=3) and _reads_back(tiles, plain, rows=num_rows):
            return tiles
    return None


def _reads_back(tiles: torch.Tensor, plain: torch.Tensor, *, rows: int) -> bool:
    """Whether the first `rows` rows, read through the tiles, are bit-equal to the plain ones. As in find_tiles:
    tiles: five dimensions [row_tiles, ...], plain: [out_features, in_features]."""
    ids = torch.arange(min(rows, plain.shape[0]))
    return all(
        torch.equal(read_rows(tiles, some)[:, : plain.shape[1]], plain[some])
        for some in ids.split(4096)  # bounds the temporary copy
    )
