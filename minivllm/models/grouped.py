"""Weights as files store them in few bits: integer codes, and a scale for every group of columns.

    8 bits (Q8_0)               weight[o, i] = scales[o, g] * code(o, i)                     code in -128 .. 127
    4 bits (Q4_0, Q4_1, Q4_K)   weight[o, i] = scales[o, g] * code(o, i) + minimums[o, g]    code in 0 .. 15

g = i // 32 in all of them: Q4_K's blocks of 256 are eight groups of 32, whose scales and minimums are 6-bit multiples
of two numbers of the block. So they are all one form, and `GroupedWeight` is it. The other formats of GGUF (5 and 6
bits) have no product in torch and are not here.

Rows can be taken, joined and reordered as those of a tensor: a row of codes has its own scales.

Knows no product (models/quantised.py) and no file (models/gguf.py, which calls from_gguf_blocks). Twin in vLLM: the
dequantisation kernels of csrc/quantization/gguf.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from minivllm.kernels.quant_matmul import from_q4_0, from_q4_1, pack_int4, quantise_int4, unpack_int4

GROUP_SIZE = 32  # columns
_K_GROUPS = 8  # in a block of Q4_K


@dataclass(frozen=True)
class GroupedWeight:
    """One weight in groups of GROUP_SIZE columns."""

    codes: torch.Tensor  # [out_features, in_features // 2] uint8, packing.py's order; 8 bits: [.., in_features] int8
    scales: torch.Tensor  # [out_features, num_groups] fp16 or fp32
    minimums: torch.Tensor | None  # [out_features, num_groups] as scales; None with 8 bits

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features), as of the plain weight."""
        return self.scales.shape[0], self.scales.shape[1] * GROUP_SIZE

    @property
    def bits(self) -> int:
        return 8 if self.minimums is None else 4

    def integers(self) -> torch.Tensor:  # -> [out_features, in_features] int8, or 4 bits: uint8 in 0 .. 15
        return self.codes if self.minimums is None else unpack_int4(self.codes, GROUP_SIZE)

    def dequantise(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:  # -> [out_features, in_features]
        """The weight itself: computed in float32 and rounded once."""
        values = self.integers().float().unflatten(1, (-1, GROUP_SIZE)) * self.scales.float()[..., None]
        if self.minimums is not None:
            values = values + self.minimums.float()[..., None]
        return values.flatten(1).to(dtype)

    def map_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> GroupedWeight:
        """With `change` ([out_features, n] -> [rows, n], whatever n is) done to the rows of every part."""
        minimums = None if self.minimums is None else change(self.minimums)
        return GroupedWeight(change(self.codes), change(self.scales), minimums)


def join(weights: Sequence[GroupedWeight]) -> GroupedWeight:
    """One weight under the other; all of one number of bits and one in_features."""
    minimums = [weight.minimums for weight in weights if weight.minimums is not None]
    return GroupedWeight(
        torch.cat([weight.codes for weight in weights]),
        torch.cat([weight.scales.float() for weight in weights]),
        torch.cat([minimum.float() for minimum in minimums]) if minimums else None,
    )


def round_to_int4(weight: torch.Tensor) -> GroupedWeight:  # [out_features, in_features], a multiple of GROUP_SIZE
    """Every value to the nearest of its group's 16 levels, which divide the group's range evenly."""
    return GroupedWeight(*quantise_int4(weight, GROUP_SIZE))


# ------------------------------------------------------------------ GGUF's blocks
def from_gguf_blocks(kind: str, blocks: torch.Tensor) -> GroupedWeight:
    """kind: one of GGUF_KINDS; blocks: [out_features, row_bytes] uint8, as the file has them. Exact."""
    return GGUF_KINDS[kind](blocks)


def _from_q8_0(blocks: torch.Tensor) -> GroupedWeight:  # [out_features, num_groups * 34] uint8
    """An fp16 scale and 32 signed bytes."""
    parts = blocks.unflatten(1, (-1, 2 + GROUP_SIZE))
    scales = parts[..., :2].contiguous().view(torch.float16)[..., 0]  # [out_features, num_groups]
    return GroupedWeight(parts[..., 2:].flatten(1).view(torch.int8), scales.contiguous(), None)


def _from_q4_k(blocks: torch.Tensor) -> GroupedWeight:  # [out_features, num_blocks * 144] uint8
    """fp16 d and dmin, 12 bytes of eight 6-bit scales and minimums, 128 bytes of codes: 32 bytes hold two groups,
    the first in their low halves. A scale is d * 6 bits, a minimum -dmin * 6 bits: exact in float32."""
    parts = blocks.unflatten(1, (-1, 144))  # [out_features, num_blocks, 144]
    factors = parts[..., :4].contiguous().view(torch.float16).float()  # [out_features, num_blocks, 2]
    low, high, rest = parts[..., 4:16].split(4, dim=-1)  # each [out_features, num_blocks, 4]
    scales = torch.cat([low & 63, rest & 15 | (low >> 6) << 4], -1)  # [out_features, num_blocks, 8]
    minimums = torch.cat([high & 63, rest >> 4 | (high >> 6) << 4], -1)  # [out_features, num_blocks, 8]
    pairs = parts[..., 16:].unflatten(-1, (_K_GROUPS // 2, 1, GROUP_SIZE))  # bytes of two groups
    codes = torch.cat([pairs & 15, pairs >> 4], dim=-2)  # [out_features, num_blocks, 4, 2, 32]
    return GroupedWeight(
        pack_int4(codes.flatten(1), GROUP_SIZE),
        (scales * factors[..., :1]).flatten(1),
        (minimums * -factors[..., 1:]).flatten(1),
    )


GGUF_KINDS: dict[str, Callable[[torch.Tensor], GroupedWeight]] = {
    "Q4_0": lambda blocks: GroupedWeight(*from_q4_0(blocks)),
    "Q4_1": lambda blocks: GroupedWeight(*from_q4_1(blocks)),
    "Q4_K": _from_q4_k,
    "Q8_0": _from_q8_0,
}
