"""Where the ranks of one model meet inside the compiled step: the sum of what each of them has of a product.

Every rank multiplies into its slot of a memory that all of them see, raises its counter, waits until the others have
raised theirs, and adds up all slots in the order of the ranks: all get the same bits. Of many rows a rank adds up some
only, and writes what became of them into a slot of the next set for the others. There are two sets of slots, used
in turn: a slow rank may still read one while a fast one writes the other, and for the next but one they must meet.

Parts are bfloat16, rounded once, as the result of a product is anywhere else; they are added in float32 and rounded
once more. Parts in float32 would be twice the bytes, and bytes are what a sum of many rows takes its time for.

Knows no process and no model. Made by minivllm/worker/collectives.py, in whose memory it is. Twin in vLLM:
csrc/cpu/shm.cpp.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from minivllm.kernels.amx import on_stack
from minivllm.kernels.jit import FLOAT32, array_at, call, cycles, jit, load_shared, narrow, pause, store_shared, widen

BYTES = 2  # of a bfloat16
COUNTER_BYTES = 128  # a counter's place: two cache lines, which the CPU may fetch together
SLOT_ROWS = 32  # a slot holds at least so many rows of a product, else there is no compiled step
ALONE = (0, 1, 0, 0, 0, 0, 0, 0)  # the numbers of a rank that meets nobody
VALUES_AT_ONCE = 512


@dataclass(frozen=True, eq=False)
class Meeting:
    """One rank's. The memory and `count` must live as long."""

    rank: int
    size: int
    slots: int  # address of [2, size, slot_bytes]
    slot_bytes: int
    counters: int  # address of [size] counters, COUNTER_BYTES apart: how often each rank has come
    count: np.ndarray  # [1] int64, this rank's exchanges so far, of whatever kind; an even one is of the first set
    spin_cycles: int  # to wait for another rank before wait(it) is called, and again before every further call
    wait: Callable[[int], None]  # returns soon, to wait on, or raises to give up
    all_reduce: Callable[[torch.Tensor], torch.Tensor]  # the sum of all parts, of any shape: for the reference
    errors: list[BaseException] = field(default_factory=list)  # what `wait` has raised

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """As the compiled step takes it."""
        address = ctypes.cast(self._callback, ctypes.c_void_p).value or 0
        place = (self.slots, self.slot_bytes, self.counters, int(self.count.ctypes.data))
        return (self.rank, self.size, *place, self.spin_cycles, address)

    @cached_property
    def _callback(self) -> Any:
        def wait(rank: int) -> int:
            try:
                self.wait(rank)
            except BaseException as error:  # compiled code cannot raise it; decoder_step does
                self.errors.append(error)
            return len(self.errors)

        return ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(wait)

    def fits(self, hidden_size: int) -> bool:
        """Whether a slot has room for the rows of a piece."""
        return self.slot_bytes >= SLOT_ROWS * hidden_size * BYTES


@jit
def meet(meeting: tuple[int, ...], count: int) -> bool:
    """Go on when every rank has come `count` times; what it wrote before is then to be seen. False: it never will."""
    rank, size, _, _, counters, _, spin_cycles, wait = meeting
    store_shared(counters + rank * COUNTER_BYTES, count)
    for other in range(size):
        since = cycles()
        while load_shared(counters + other * COUNTER_BYTES) < count:
            pause()
            if cycles() - since > spin_cycles:
                if call(wait, other) != 0:
                    return False
                since = cycles()
    return True


@jit
def add_up(parts: int, size: int, slot_bytes: int, out: int, num_values: int, like: Any) -> None:
    """out [num_values] = the sum of `size` parts, slot_bytes apart, each of them added in float32."""
    sums_at = on_stack(2048)  # VALUES_AT_ONCE float32
    for first in range(0, num_values, VALUES_AT_ONCE):
        num = min(VALUES_AT_ONCE, num_values - first)
        sums, result = array_at(sums_at, (num,), FLOAT32), array_at(out + first * BYTES, (num,), like)
        part = array_at(parts + first * BYTES, (num,), like)
        for i in range(num):
            sums[i] = widen(part[i])
        for rank in range(1, size):
            part = array_at(parts + rank * slot_bytes + first * BYTES, (num,), like)
            for i in range(num):
                sums[i] += widen(part[i])
        for i in range(num):
            result[i] = narrow(sums[i], like)
