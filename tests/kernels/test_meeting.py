"""Ranks that meet inside compiled code: sums on two cores at once, always right, and an end when one does not come."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest
import torch

from minivllm.kernels.decoder_step.meeting import COUNTER_BYTES, Meeting, add_up, meet
from minivllm.kernels.jit import BFLOAT16, INT64, array_at

NUM_VALUES = 528  # a whole turn of the loop over values, and a rest
SLOT_BYTES = 2048
WEIGHT_OF_RANK = 4  # rank r brings its number plus r of these


def meetings(size: int, wait: Callable[[int], None], spin_cycles: int = 1 << 14) -> tuple[list[Meeting], Any]:
    """What each rank meets through, and the memory that must live as long."""
    memory = np.zeros(size * (2 * SLOT_BYTES + COUNTER_BYTES), np.uint8)
    slots = int(memory.ctypes.data)
    counters = slots + 2 * size * SLOT_BYTES
    found = [
        Meeting(rank, size, slots, SLOT_BYTES, counters, np.zeros(1, np.int64), spin_cycles, wait, lambda part: part)
        for rank in range(size)
    ]
    return found, memory


@numba.njit(nogil=True)
def bring(meeting: Any, slot: int, number: int, like: Any) -> None:
    """Small numbers, exact in bfloat16: 1.0 is 0x3F80, and the exponent's bits count from there."""
    values = array_at(slot, (NUM_VALUES,), like)
    for i in range(NUM_VALUES):
        values[i] = 0x3F80 + ((number + meeting[0]) % WEIGHT_OF_RANK) * 0x80  # 1, 2, 4 or 8


@numba.njit(nogil=True)
def meet_often(meeting: Any, num_meetings: int, results: int, like: Any) -> int:
    """Every rank brings, meets and adds up; results [num_meetings, NUM_VALUES]. How often it has met."""
    count = array_at(meeting[5], (1,), INT64)
    for number in range(num_meetings):
        count[0] += 1
        parts = meeting[2] + (count[0] & 1) * meeting[1] * meeting[3]
        bring(meeting, parts + meeting[0] * meeting[3], number, like)
        if not meet(meeting, count[0]):
            return number
        add_up(parts, meeting[1], meeting[3], results + number * NUM_VALUES * 2, NUM_VALUES, like)
    return num_meetings


def run_ranks(found: list[Meeting], num_meetings: list[int]) -> tuple[list[int], list[torch.Tensor]]:
    """Each rank in a thread of its own, without Python's lock. How often each met, and its sums."""
    results = [torch.zeros(number, NUM_VALUES, dtype=torch.bfloat16) for number in num_meetings]
    met = [0] * len(found)

    def run(rank: int) -> None:
        met[rank] = meet_often(found[rank].numbers, num_meetings[rank], results[rank].data_ptr(), BFLOAT16)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(found))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return met, results


@pytest.mark.parametrize("size", [2, 3])
def test_every_sum_of_thousands_is_right_on_every_rank(size: int):
    """Fast ranks come back to a set of slots only when the slow ones have read it."""
    found, _memory = meetings(size, lambda rank: time.sleep(1e-5))
    met, results = run_ranks(found, [3000] * size)
    assert met == [3000] * size
    numbers = torch.arange(3000)[:, None]  # [num_meetings, 1]
    expected = sum(2.0 ** ((numbers + rank) % WEIGHT_OF_RANK) for rank in range(size))
    for result in results:
        assert torch.equal(result.double(), expected.double().expand(-1, NUM_VALUES))


def test_a_rank_that_does_not_come_ends_the_wait_when_the_caller_says_so():
    """`wait` is asked again and again, and what it raises is kept."""
    asked: list[int] = []
    is_gone = False

    def wait(rank: int) -> None:
        if is_gone:
            asked.append(rank)
        if len(asked) > 4:
            raise KeyError("it is gone")

    found, _memory = meetings(2, wait)
    assert run_ranks(found, [2, 2])[0] == [2, 2]
    is_gone = True
    assert run_ranks(found[:1], [3])[0] == [0]
    assert asked == [1] * 5
    assert [str(error) for error in found[0].errors] == ["'it is gone'"]
    assert found[1].errors == []
