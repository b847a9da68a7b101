"""What the ranks of one model do together: a sum over all of them, and the logits gathered on rank 0.

    SharedMemoryCollectives   processes on CPUs of one machine: data in shared memory, a byte through a socket as signal
    GroupCollectives          everything else: torch.distributed, gloo between CPUs and NCCL between GPUs

gloo sends through TCP, also to the next core. A sum over two ranks of one thread, rows of 576 float32 values,
microseconds (median of 150 to 200, one run on a machine that others used as well):

    rows                 1     32    1024
    gloo               125    126    1922
    shared memory       10     19     457

A model of 30 layers has 61 of them in every step. The socket is the reason why nothing hangs: a process that ends, in
whatever way, closes it, and whoever waits sees that at once.

Knows no model. Twin in vLLM: vllm/distributed/parallel_state.py and csrc/cpu/shm.cpp.
"""

from __future__ import annotations

import itertools
import mmap
import os
import select
import socket
import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F

from minivllm.errors import EngineDeadError
from minivllm.kernels.decoder_step import COUNTER_BYTES, Meeting

# Bytes of one rank's slot. Larger tensors go in pieces, which stay in a core's cache.
SLOT_BYTES = 1 << 20
SPINS = 2000  # looks for a signal, about a millisecond, before the thread sleeps: waking costs 20 to 40 us
SPIN_CYCLES = 1 << 22  # the same inside a compiled step, one or two milliseconds
NAP_SECONDS = 1e-4  # and then between two looks
PATIENCE_SECONDS = 300.0  # no step takes so long: then a rank is stuck


def shared_bytes(size: int) -> int:
    """Size of the memory that `size` ranks share."""
    return size * (2 * SLOT_BYTES + COUNTER_BYTES)


class SharedMemoryCollectives:
    """Every rank writes its part into its slot, they meet, and every rank adds up all slots in the order of the ranks:
    all get the same bits.

    There are two sets of slots, used in turn: while a slow rank still reads one, a fast one can only have come as far
    as writing the other, because for the next but one it must meet the slow rank.

    file: descriptor of shared_bytes(size) of memory; sockets: rank -> a stream to it, of every other rank.
    """

    def __init__(self, rank: int, file: int, sockets: Mapping[int, socket.socket]):
        self.rank, self.size = rank, len(sockets) + 1
        memory = mmap.mmap(file, shared_bytes(self.size))
        self._memory = torch.frombuffer(memory, dtype=torch.uint8)  # [shared_bytes]: all slots, then the counters
        self._slots = self._memory[: 2 * self.size * SLOT_BYTES].view(2, self.size, SLOT_BYTES)
        self._count = np.zeros(1, np.int64)  # exchanges so far; whether it is odd says which set of slots
        self._sockets = dict(sockets)
        for stream in sockets.values():
            stream.setblocking(False)
        has_core = len(os.sched_getaffinity(0)) >= self.size
        self._spins = SPINS if has_core else 0
        self._waiting_since = (-1, -1, 0.0)  # in a compiled step: exchange, rank, time
        self.meeting = Meeting(
            rank=self.rank,
            size=self.size,
            slots=self._slots.data_ptr(),
            slot_bytes=SLOT_BYTES,
            counters=self._slots.data_ptr() + self._slots.nbytes,
            count=self._count,
            spin_cycles=SPIN_CYCLES if has_core else 0,
            wait=self._wait_on,
            all_reduce=self.all_reduce,
        )

    def all_reduce(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of all parts, in place. part: any shape. Raises EngineDeadError when a rank is gone."""
        part = part.contiguous()
        for piece in part.view(-1).split(SLOT_BYTES // part.itemsize):
            slots = [slot[: len(piece)] for slot in self._exchange(piece)]
            torch.add(slots[0], slots[1], out=piece)
            for slot in slots[2:]:
                piece.add_(slot)
        return part

    def gather(self, part: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        """part: [num_rows, widths[rank]] -> on rank 0 [num_rows, sum(widths)]. Raises EngineDeadError."""
        per_slot = SLOT_BYTES // part.itemsize
        rows_at_once = max(1, per_slot // max(widths))
        ends = list(itertools.accumulate(widths))
        whole = part.new_empty(len(part) if self.rank == 0 else 0, ends[-1])
        if self.rank == 0:
            whole[:, : widths[0]] = part
        for row in range(0, len(part), rows_at_once):
            for column in range(0, max(widths), per_slot):
                rows = part[row : row + rows_at_once]
                slots = self._exchange(
                    rows[:, column : column + per_slot].flatten() if self.rank else part.new_empty(0)
                )
                if self.rank == 0:
                    for rank in range(1, self.size):
                        place = whole[row : row + rows_at_once, ends[rank - 1] + column : ends[rank]][:, :per_slot]
                        place.copy_(slots[rank][: place.numel()].view(place.shape))
        return part if self.rank else whole

    def broadcast(self, data: torch.Tensor) -> torch.Tensor:
        """Rank 0's bytes on every rank, in place, whenever they come. data: [num_bytes]. Raises EngineDeadError."""
        for piece in data.split(SLOT_BYTES):
            slots = self._exchange(piece if self.rank == 0 else piece[:0], in_step=False)
            if self.rank:
                piece.copy_(slots[0][: len(piece)])
        return data

    def close(self) -> None:
        """Leave: whoever waits for this rank gets an error."""
        for stream in self._sockets.values():
            stream.close()

    def _exchange(self, values: torch.Tensor, *, in_step: bool = True) -> list[torch.Tensor]:
        """Write the own values [n], wait for the others; every rank's slot, valid until the next but one exchange.

        in_step: who takes too long is stuck. Else nobody knows when the others come.
        """
        self._count += 1
        slots = [slot.view(values.dtype) for slot in self._slots[int(self._count[0]) & 1]]
        slots[self.rank][: len(values)].copy_(values)
        self._meet(PATIENCE_SECONDS if in_step else None)
        return slots

    def _meet(self, patience: float | None) -> None:
        """Go on when every rank has come. The system calls keep the order of memory: written before sent."""
        try:
            for stream in self._sockets.values():
                stream.send(b"\0")
        except OSError:  # closed; who it was is seen below, or there
            pass
        for rank, stream in self._sockets.items():
            self._wait_for(rank, stream, patience)

    def _wait_for(self, rank: int, stream: socket.socket, patience: float | None) -> None:
        for _ in range(self._spins):
            try:
                signal = stream.recv(1)
                break
            except BlockingIOError:
                continue
            except OSError:
                raise gone(rank) from None
        else:
            if not select.select([stream], [], [], patience)[0]:
                raise stuck(rank)
            try:
                signal = stream.recv(1)
            except OSError:
                raise gone(rank) from None
        if not signal:
            raise gone(rank)

    def _wait_on(self, rank: int) -> None:
        """A compiled step has spun for long, and this rank is still not where the step is. Returns after a nap."""
        count, now = int(self._count[0]), time.monotonic()
        if self._waiting_since[:2] != (count, rank):
            self._waiting_since = (count, rank, now)
        if now - self._waiting_since[2] > PATIENCE_SECONDS:
            raise stuck(rank)
        stream = self._sockets[rank]
        if select.select([stream], [], [], NAP_SECONDS)[0] and _is_closed(stream):
            place = self._slots.nbytes + rank * COUNTER_BYTES
            if int(self._memory[place : place + 8].view(torch.int64)) < count:  # else it came, and then it ended
                raise gone(rank)


def _is_closed(stream: socket.socket) -> bool:
    """Of one that can be read from."""
    try:
        return not stream.recv(1, socket.MSG_PEEK)
    except OSError:
        return True


class GroupCollectives:
    """Through torch.distributed's default group, on the device of the tensors."""

    meeting = None  # no compiled step: between machines nothing is shared

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size

    def all_reduce(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of all parts, in place. part: any shape. Raises EngineDeadError when a rank is gone."""
        part = part.contiguous()
        try:
            dist.all_reduce(part)
        except RuntimeError as error:
            raise gone() from error
        return part

    def gather(self, part: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        """part: [num_rows, widths[rank]] -> on rank 0 [num_rows, sum(widths)]. Raises EngineDeadError."""
        padded = F.pad(part, (0, max(widths) - part.shape[1]))  # all of one shape, as it must be
        parts = [torch.empty_like(padded) for _ in widths] if self.rank == 0 else None
        try:
            dist.gather(padded, parts, dst=0)
        except RuntimeError as error:
            raise gone() from error
        if parts is None:
            return part
        return torch.cat([rows[:, :width] for rows, width in zip(parts, widths, strict=True)], 1)

    def close(self) -> None:
        """The group is ranks.py's to end."""


def stuck(rank: int) -> EngineDeadError:
    """The error for whoever has waited too long."""
    return EngineDeadError(f"rank {rank} has not answered for {PATIENCE_SECONDS:g} seconds")


def gone(rank: int | None = None) -> EngineDeadError:
    """The error for whoever waited."""
    who = "another rank" if rank is None else f"rank {rank}"
    return EngineDeadError(f"{who} of this model has ended, and without its part nothing can be computed")
