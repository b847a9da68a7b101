"""Sums and gathers over ranks that share memory: every shape, the same bits on all, and nobody waits for the dead."""

from __future__ import annotations

import time

import pytest
import torch

from minivllm.errors import EngineDeadError
from minivllm.worker import collectives as module
from minivllm.worker.collectives import SLOT_BYTES, SharedMemoryCollectives
from tests.worker.rank_threads import connected, on_ranks

SHAPES = ((1, 576), (3, 7), (33, 64), (0, 8), (2 * SLOT_BYTES // 4096 + 1, 1024))  # the last: several slots and a rest


def part(rank: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_sum_is_the_same_on_every_rank_to_the_bit(size: int, dtype: torch.dtype):
    def sums(rank: int, collectives: SharedMemoryCollectives) -> list[torch.Tensor]:
        return [collectives.all_reduce(part(rank, shape, dtype)) for shape in SHAPES]

    found = on_ranks(size, sums)
    for index, shape in enumerate(SHAPES):
        expected = part(0, shape, dtype)
        for rank in range(1, size):
            expected = expected + part(rank, shape, dtype)
        assert all(torch.equal(of_rank[index], expected) for of_rank in found)


def test_a_sum_of_what_is_not_contiguous():
    found = on_ranks(2, lambda rank, c: c.all_reduce(part(rank, (6, 10))[:, ::2]))
    expected = part(0, (6, 10))[:, ::2] + part(1, (6, 10))[:, ::2]
    assert all(torch.equal(of_rank, expected) for of_rank in found)


@pytest.mark.parametrize("widths", [(5, 5), (5, 6, 6), (1, 300_000), (64, 64)], ids=str)
@pytest.mark.parametrize("num_rows", [0, 1, 7])
def test_rank_0_gathers_all_columns_in_order(widths: tuple[int, ...], num_rows: int):
    parts = [part(rank, (num_rows, width)) for rank, width in enumerate(widths)]
    first, *others = on_ranks(len(widths), lambda rank, c: c.gather(parts[rank], widths))
    assert torch.equal(first, torch.cat(parts, 1))
    assert all(torch.equal(other, own) for other, own in zip(others, parts[1:], strict=True))


@pytest.mark.parametrize("num_bytes", [0, 1, 4096, 2 * SLOT_BYTES + 5])
@pytest.mark.parametrize("size", [2, 3])
def test_everybody_gets_the_bytes_of_rank_0_between_sums(num_bytes: int, size: int):
    data = torch.randint(256, (num_bytes,), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)

    def hear(rank: int, collectives: SharedMemoryCollectives) -> list[torch.Tensor]:
        found = []
        for _ in range(3):
            found.append(collectives.broadcast(data.clone() if rank == 0 else torch.zeros_like(data)))
            collectives.all_reduce(torch.ones(5))
        return found

    assert all(torch.equal(found, data) for of_rank in on_ranks(size, hear) for found in of_rank)


def test_a_call_is_waited_for_longer_than_a_step(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(module, "SPINS", 1)

    def hear(rank: int, collectives: SharedMemoryCollectives) -> int:
        if rank == 0:
            time.sleep(0.3)
        return int(collectives.broadcast(torch.tensor([7 * (rank == 0)], dtype=torch.uint8))[0])

    assert on_ranks(2, hear) == [7, 7]


def test_a_fast_rank_never_overwrites_what_a_slow_one_still_reads(monkeypatch: pytest.MonkeyPatch):
    def many(rank: int, collectives: SharedMemoryCollectives) -> list[float]:
        found = []
        for number in range(50):
            found.append(float(collectives.all_reduce(torch.full((100,), float(number)))[-1]))
            if rank == 0 and number % 7 == 0:
                time.sleep(0.002)
        return found

    slow_add = torch.add

    def slowly(*arguments: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        if torch.rand(()) < 0.2:
            time.sleep(0.001)
        return slow_add(*arguments, out=out)

    monkeypatch.setattr(torch, "add", slowly)
    assert on_ranks(2, many) == [[2.0 * number for number in range(50)]] * 2


@pytest.mark.parametrize("spins", [0, 100_000])
def test_whoever_waits_for_a_rank_that_ends_hears_of_it_at_once(spins: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "SPINS", spins)

    def leave_early(rank: int, collectives: SharedMemoryCollectives) -> None:
        collectives.all_reduce(torch.ones(3))
        if rank == 1:
            raise KeyError("it dies here")
        collectives.all_reduce(torch.ones(3))

    started = time.monotonic()
    with pytest.raises((KeyError, EngineDeadError)) as caught:
        on_ranks(3, leave_early)
    assert time.monotonic() - started < 5
    assert isinstance(caught.value, KeyError) or "rank 1 of this model has ended" in str(caught.value)


def test_a_rank_that_has_ended_before_is_named():
    first, second = connected(2)
    second.close()
    with pytest.raises(EngineDeadError, match="rank 1 of this model has ended, and without its part nothing can be"):
        first.all_reduce(torch.ones(3))
    first.close()


def test_a_rank_that_is_stuck_is_not_waited_for_forever(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.05)
    first, second = connected(2)
    with pytest.raises(EngineDeadError, match="rank 1 has not answered for 0.05 seconds"):
        first.gather(torch.ones(1, 3), (3, 3))
    first.close()
    second.close()
