"""Ranks: the processes that compute one model together, and how rank 0 tells the others what to do.

    rank 0    the engine's process: scheduler, sampler, server. Starts the others, tells them every call first.
    rank 1..  rank_process.py: waits for a call, makes it, waits for the next

A call is a JSON object (a pickle could be code) that goes to all through shared memory, or gloo; a report, a list of
numbers from every rank, goes the other way. Who started the ranks decides what they compute through (collectives.py):

    rank 0, with as many processes as it needs     CPU: shared memory. GPU: NCCL
    torchrun, or whoever set RANK and WORLD_SIZE   CPU: gloo. GPU: NCCL. Over several machines as well
    Ray, as rank 0 asked it (ray_actors.py)        the same

A rank that ends closes its connections, so every other one that waits for it gets an error at once and ends as well.

Knows no model. Called by parallel_executor.py, rank_process.py and ray_actors.py. Twin in vLLM: MultiprocExecutor and
its MessageQueue in vllm/v1/executor/multiproc_executor.py.
"""

from __future__ import annotations

import datetime
import itertools
import json
import os
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist

from minivllm.errors import ConfigError, EngineDeadError
from minivllm.worker.collectives import (
    PATIENCE_SECONDS,
    GroupCollectives,
    SharedMemoryCollectives,
    gone,
    shared_bytes,
)

START_SECONDS = 120.0  # for every process to import torch and to call back
STOP_SECONDS = 5.0
IDLE_DAYS = 24  # between two calls, while there is no request; gloo counts milliseconds in 32 bits
_LENGTH_BYTES, _FIRST_BYTES = 8, 4096  # most calls are one message of this size


class Process(Protocol):
    """Another rank, to whoever has started it: a subprocess.Popen, or a thing with the same three methods."""

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, when it has ended. Raises subprocess.TimeoutExpired after `timeout` seconds."""

    def kill(self) -> None:
        """End it at once."""


class Ranks:
    """One rank's connection to the others. All methods raise EngineDeadError when a rank is gone.

    processes: those that this rank has started.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        device_type: str,
        *,
        store: dist.Store | None = None,
        collectives: SharedMemoryCollectives | None = None,
        processes: Mapping[int, Process] | None = None,
    ):
        self.rank, self.size = rank, size
        self.processes = dict(processes or {})
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo",
            store=store,
            rank=rank if store is not None else -1,  # else all of it is in the environment
            world_size=size if store is not None else -1,
            timeout=datetime.timedelta(seconds=PATIENCE_SECONDS),
        )
        self._calls = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=IDLE_DAYS))
        self.collectives = collectives or GroupCollectives(rank, size)
        self._is_in_step = True
        self._close = weakref.finalize(self, _end, self.processes)

    @property
    def is_alive(self) -> bool:
        return self._is_in_step and all(process.poll() is None for process in self.processes.values())

    def tell(self, call: str, **arguments: Any) -> None:
        """Rank 0: have the others make this call. Then make it too: they wait for this rank's part."""
        text = json.dumps({"call": call, **arguments}, separators=(",", ":")).encode()
        padded = len(text).to_bytes(_LENGTH_BYTES, "little") + text
        first = padded[:_FIRST_BYTES].ljust(_FIRST_BYTES, b" ")
        self._broadcast(torch.frombuffer(bytearray(first), dtype=torch.uint8))
        if len(padded) > _FIRST_BYTES:
            self._broadcast(torch.frombuffer(bytearray(padded[_FIRST_BYTES:]), dtype=torch.uint8))

    def hear(self) -> dict[str, Any]:
        """Others: the next call, whenever it comes."""
        first = bytes(self._broadcast(torch.empty(_FIRST_BYTES, dtype=torch.uint8)).numpy())
        end = _LENGTH_BYTES + int.from_bytes(first[:_LENGTH_BYTES], "little")
        text = first[_LENGTH_BYTES:end]
        if end > _FIRST_BYTES:
            text += bytes(self._broadcast(torch.empty(end - _FIRST_BYTES, dtype=torch.uint8)).numpy())
        call: dict[str, Any] = json.loads(text)
        return call

    def _broadcast(self, data: torch.Tensor) -> torch.Tensor:  # [num_bytes] uint8
        if isinstance(self.collectives, SharedMemoryCollectives):  # a tenth of gloo's time
            return self.collectives.broadcast(data)
        try:
            dist.broadcast(data, 0, group=self._calls)
        except RuntimeError as error:
            raise gone() from error
        return data

    def report(self, numbers: list[int]) -> list[list[int]]:
        """All ranks at once: each gives as many numbers. Rank 0 gets every rank's, the others nothing."""
        own = torch.tensor(numbers)  # [num_numbers] int64
        found = [torch.empty_like(own) for _ in range(self.size)] if self.rank == 0 else None
        try:
            dist.gather(own, found, dst=0)
        except RuntimeError as error:
            raise gone() from error
        return [numbers.tolist() for numbers in found or []]

    def give_up(self) -> None:
        """After an error: nobody knows who waits for whom, and no call would be heard."""
        self._is_in_step = False
        _end(self.processes)

    def close(self) -> None:
        """Rank 0: have the others end; who does not is killed."""
        if self._close.alive:
            try:
                if self.is_alive:
                    self.tell("stop")
                _wait_for_the_end(self.processes)
            except EngineDeadError:
                pass
            self._close()
            self.collectives.close()
            dist.destroy_process_group()


def connect(size: int, device_type: str, *, share_memory: bool = True) -> Ranks:
    """This process's place among `size` ranks: 0 of those it starts now, or what RANK says.

    share_memory: between CPUs, where this process starts the others.

    Raises ConfigError where they cannot be started or do not fit.
    """
    if dist.is_initialized():
        raise refused(size, "a process has one engine over several devices at a time, and this one has")
    if "RANK" in os.environ:
        rank, world_size = int(os.environ["RANK"]), int(os.environ.get("WORLD_SIZE", "1"))
        if world_size != size:
            raise refused(size, f"WORLD_SIZE is {world_size}: start as many processes as there are ranks")
        return Ranks(rank, size, device_type)
    if device_type == "cuda" and size > torch.cuda.device_count():
        raise refused(size, f"this machine has {torch.cuda.device_count()} GPUs, and every rank needs one")
    return _start(size, device_type, share_memory and device_type != "cuda")


def local_rank() -> int:
    """Which device of its machine a process that torchrun has started should take."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")))


def is_another_rank() -> bool:
    """Whether torchrun has started this process to compute with rank 0 and not to serve."""
    return int(os.environ.get("RANK", "0")) > 0


def refused(size: int, why: str) -> ConfigError:
    """The error for whoever asked for so many."""
    return ConfigError(f"tensor_parallel_size is {size}, but {why}.", parameter="tensor_parallel_size")


# ------------------------------------------------------------------ starting and ending processes
def _start(size: int, device_type: str, share_memory: bool) -> Ranks:
    """Ranks 1 .. size - 1 as processes of this machine, each with its share of the threads."""
    store = _open_store("127.0.0.1", size)
    num_threads = _share_threads(size)
    memory = os.memfd_create("minivllm-ranks")  # of no file system: a container's /dev/shm may be small
    os.ftruncate(memory, shared_bytes(size))
    sockets: dict[int, dict[int, socket.socket]] = {rank: {} for rank in range(size)}  # of each rank, to each other
    for low, high in itertools.combinations(range(size) if share_memory else (), 2):
        sockets[low][high], sockets[high][low] = socket.socketpair()
    processes: dict[int, Process] = {}
    try:
        for rank in range(1, size):
            numbers = [str(number) for number in (rank, size, store.port, memory)]
            processes[rank] = subprocess.Popen(
                [sys.executable, "-m", "minivllm.worker.rank_process", device_type, *numbers]
                + [f"{peer}:{stream.fileno()}" for peer, stream in sockets[rank].items()],
                env={**os.environ, "OMP_NUM_THREADS": str(num_threads)},
                pass_fds=[memory, *(stream.fileno() for stream in sockets[rank].values())],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for rank 0, which may still let answers end
            )
            for stream in sockets[rank].values():
                stream.close()  # the process has it: when it ends, nobody keeps it open
        _wait_for_the_start(store, processes)
        collectives = SharedMemoryCollectives(0, memory, sockets[0]) if share_memory else None
        return Ranks(0, size, device_type, store=store, collectives=collectives, processes=processes)
    except BaseException:
        _end(processes)
        for own in sockets.values():
            for stream in own.values():
                stream.close()
        raise
    finally:
        os.close(memory)  # mapped by now


def start_elsewhere(
    size: int, device_type: str, host: str, launch: Callable[[int, int], Mapping[int, Process]]
) -> Ranks:
    """Rank 0 of processes that somebody else starts, on this machine or another.

    host: where the others reach this process. launch(port, num_threads): start ranks 1 .. size - 1, each of which calls
    join_elsewhere with that port.

    Raises ConfigError.
    """
    if dist.is_initialized():
        raise refused(size, "a process has one engine over several devices at a time, and this one has")
    store = _open_store(host, size)
    processes = launch(store.port, _share_threads(size))
    try:
        _wait_for_the_start(store, processes)
        return Ranks(0, size, device_type, store=store, processes=processes)
    except BaseException:
        _end(processes)
        raise


def join_elsewhere(device_type: str, rank: int, size: int, host: str, port: int) -> Ranks:
    """The other end of start_elsewhere."""
    return Ranks(rank, size, device_type, store=_join_store(host, port, rank, size))


def _share_threads(size: int) -> int:
    """This rank takes its share of this process's threads; how many that is."""
    num_threads = max(1, torch.get_num_threads() // size)
    torch.set_num_threads(num_threads)
    return num_threads


def _open_store(host: str, size: int) -> dist.TCPStore:
    return dist.TCPStore(host, 0, size, is_master=True, wait_for_workers=False)


def _join_store(host: str, port: int, rank: int, size: int) -> dist.Store:
    """Rank 0's; it hears that this rank has started."""
    store = dist.TCPStore(host, port, size, is_master=False)
    store.set(_started_key(rank), "")
    return store


def join(arguments: list[str]) -> Ranks:
    """The other end of `_start`: device type, rank, size, port, descriptor of the memory, and RANK:DESCRIPTOR of each
    socket, none where nothing is shared."""
    device_type, *numbers = arguments[:5]
    rank, size, port, memory = (int(number) for number in numbers)
    store = _join_store("127.0.0.1", port, rank, size)
    files = {int(peer): int(file) for peer, _, file in (argument.partition(":") for argument in arguments[5:])}
    sockets = {peer: socket.socket(fileno=file) for peer, file in files.items()}
    collectives = SharedMemoryCollectives(rank, memory, sockets) if sockets else None
    return Ranks(rank, size, device_type, store=store, collectives=collectives)


def _started_key(rank: int) -> str:
    return f"started/{rank}"


def _wait_for_the_start(store: dist.Store, processes: Mapping[int, Process]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not store.check([_started_key(rank) for rank in processes]):
        ended = [rank for rank, process in processes.items() if process.poll() is not None]
        if ended or time.monotonic() > deadline:
            why = f"rank {ended[0]} ended at once, its message is above" if ended else "not all processes have started"
            raise refused(len(processes) + 1, why)
        time.sleep(0.02)


def _wait_for_the_end(processes: Mapping[int, Process]) -> None:
    deadline = time.monotonic() + STOP_SECONDS
    for process in processes.values():
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return


def _end(processes: Mapping[int, Process]) -> None:
    for process in processes.values():
        process.kill()
        process.wait()
