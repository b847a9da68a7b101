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
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch.nn import functional as F

from minivllm.errors import EngineDeadError

# Bytes of one rank's slot. Larger tensors go in pieces, which stay in a core's cache.
SLOT_BYTES = 1 << 20
SPINS = 2000  # looks for a signal, about a millisecond, before the thread sleeps: waking costs 20 to 40 us
PATIENCE_SECONDS = 300.0  # no step takes so long: then a rank is stuck


def shared_bytes(size: int) -> int:
    """Size of the memory that `size` ranks share."""
    return 2 * size * SLOT_BYTES


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
        self._slots = torch.frombuffer(memory, dtype=torch.uint8).view(2, self.size, SLOT_BYTES)
        self._turn = 0
        self._sockets = dict(sockets)
        for stream in sockets.values():
            stream.setblocking(False)
        self._spins = SPINS if len(os.sched_getaffinity(0)) >= self.size else 0

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

    def close(self) -> None:
        """Leave: whoever waits for this rank gets an error."""
        for stream in self._sockets.values():
            stream.close()

    def _exchange(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Write the own values [n], wait for the others; every rank's slot, valid until the next but one exchange."""
        self._turn ^= 1
        slots = [slot.view(values.dtype) for slot in self._slots[self._turn]]
        slots[self.rank][: len(values)].copy_(values)
        self._meet()
        return slots

    def _meet(self) -> None:
        """Go on when every rank has come. The system calls keep the order of memory: written before sent."""
        try:
            for stream in self._sockets.values():
                stream.send(b"\0")
        except OSError:  # closed; who it was is seen below, or there
            pass
        for rank, stream in self._sockets.items():
            self._wait_for(rank, stream)

    def _wait_for(self, rank: int, stream: socket.socket) -> None:
        for _ in range(self._spins):
            try:
                signal = stream.recv(1)
                break
            except BlockingIOError:
                continue
            except OSError:
                raise gone(rank) from None
        else:
            if not select.select([stream], [], [], PATIENCE_SECONDS)[0]:
                raise EngineDeadError(f"rank {rank} has not answered for {PATIENCE_SECONDS:g} seconds")
            try:
                signal = stream.recv(1)
            except OSError:
                raise gone(rank) from None
        if not signal:
            raise gone(rank)


class GroupCollectives:
    """Through torch.distributed's default group, on the device of the tensors."""

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


def gone(rank: int | None = None) -> EngineDeadError:
    """The error for whoever waited."""
    who = "another rank" if rank is None else f"rank {rank}"
    return EngineDeadError(f"{who} of this model has ended, and without its part nothing can be computed")
