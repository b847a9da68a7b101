"""bfloat16 weights, float32 arithmetic: for CPUs that multiply float32 faster, once enough rows share the cost.

Some CPUs have bfloat16 instructions that take twice as long as float32's (Sapphire Rapids without its matrix unit:
190 GFLOP/s against 360 here). Weights stay in bfloat16, in memory once; a product of many rows first widens its
weight into a float32 scratch that all layers of that shape share, and multiplies there. Milliseconds for the linears
of 30 layers of SmolLM2-135M, two threads:

    rows                   32      64     128     256    1024
    bfloat16 directly      51      90     167     325    1280
    widened first          60      91     137     223     750

Widening is two integer operations, because a bfloat16 is the upper half of a float32, and because oneDNN's layouts
differ in one place only:   bfloat16 [.., columns / 2, rows, 2]    float32 [.., columns / 2, 2, rows].
That is checked, bit by bit, for the first weight of each shape; where it does not hold nothing is widened.

Knows no layer. Called by: models/linear.py. Twin in vLLM: none.
"""

from __future__ import annotations

import time
from functools import cached_property

import torch

from minivllm.models import onednn
from minivllm.models.onednn import memory, pack

WIDEN_FROM_ROWS = 96
CLEARLY_FASTER = 1.3  # float32 over bfloat16; below this the widening would cost more than it gains
ROWS_PER_TILE = 64  # of the weight, in both of oneDNN's layouts


class Scratch:
    """A float32 weight of one shape, in oneDNN's layout, overwritten by whoever multiplies next."""

    def __init__(self, shape: tuple[int, int]):
        self.packed = pack(torch.zeros(shape))  # [out_features, in_features] opaque
        halves = memory(self.packed, torch.int32).view(-1, 2, ROWS_PER_TILE)
        self.even, self.odd = halves[:, 0], halves[:, 1]  # both [num_values / 128, 64]: even and odd columns

    def widen(self, pairs: torch.Tensor) -> torch.Tensor:
        """pairs: [num_values / 128, 64] int32, two bfloat16 each, the even column in the lower half. Returns packed."""
        torch.bitwise_left_shift(pairs, 16, out=self.even)
        torch.bitwise_and(pairs, -1 << 16, out=self.odd)
        return self.packed


class Widening:
    """The scratches of one model, by shape of the weight; None for a shape that cannot be widened."""

    def __init__(self) -> None:
        self._scratches: dict[tuple[int, int], Scratch | None] = {}

    @cached_property
    def pays(self) -> bool:
        """Whether this CPU multiplies float32 clearly faster than bfloat16; measured once, 20 milliseconds."""
        seconds = {dtype: _seconds_of_a_product(dtype) for dtype in (torch.float32, torch.bfloat16)}
        return seconds[torch.bfloat16] > CLEARLY_FASTER * seconds[torch.float32]

    def prepare(self, packed: torch.Tensor, plain: torch.Tensor) -> WideWeight | None:
        """The other face of a packed weight, or None. plain: [out_features, in_features], the same weight."""
        shape = (plain.shape[0], plain.shape[1])
        if plain.dtype != torch.bfloat16 or shape[0] % ROWS_PER_TILE or shape[1] % 2 or not self.pays:
            return None
        pairs = memory(packed, torch.int32)
        if pairs.numel() * 2 != plain.numel():  # padded tiles
            return None
        wide = pairs.view(-1, ROWS_PER_TILE)
        if shape not in self._scratches:
            scratch = Scratch(shape)
            scratch.widen(wide)
            expected = pack(plain.float())
            is_equal = torch.equal(memory(scratch.packed, torch.int32), memory(expected, torch.int32))
            self._scratches[shape] = scratch if is_equal else None
        found = self._scratches[shape]
        return None if found is None else WideWeight(packed, wide, found)


class WideWeight:
    """One weight that can be multiplied in float32."""

    def __init__(
        self,
        packed: torch.Tensor,  # [out_features, in_features] opaque, kept because `pairs` is a view of its memory
        pairs: torch.Tensor,  # [num_values / 128, 64] int32
        scratch: Scratch,
    ):
        self.packed = packed
        self.pairs = pairs
        self.scratch = scratch

    def product(
        self,
        rows: torch.Tensor,  # [..., in_features] bfloat16
        bias: torch.Tensor | None,  # [out_features] bfloat16
    ) -> torch.Tensor:  # [..., out_features] bfloat16
        wide_bias = None if bias is None else bias.float()
        packed = self.scratch.widen(self.pairs)
        return onednn.product(rows.float(), packed, wide_bias).to(rows.dtype)


def _seconds_of_a_product(dtype: torch.dtype) -> float:
    rows, packed = torch.ones(256, 512, dtype=dtype), pack(torch.ones(512, 512, dtype=dtype))
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        onednn.product(rows, packed, None)
        seconds.append(time.perf_counter() - started)
    return min(seconds)
