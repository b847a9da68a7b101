"""Ranks as threads of this process, over the same memory and sockets that processes get."""

from __future__ import annotations

import itertools
import os
import socket
import threading
from collections.abc import Callable
from typing import Any

from minivllm.worker.collectives import SharedMemoryCollectives, shared_bytes


def connected(size: int) -> list[SharedMemoryCollectives]:
    """What each rank computes through. To be closed."""
    memory = os.memfd_create("test")
    os.ftruncate(memory, shared_bytes(size))
    sockets: list[dict[int, socket.socket]] = [{} for _ in range(size)]
    for low, high in itertools.combinations(range(size), 2):
        sockets[low][high], sockets[high][low] = socket.socketpair()
    found = [SharedMemoryCollectives(rank, memory, own) for rank, own in enumerate(sockets)]
    os.close(memory)
    return found


def on_ranks(size: int, function: Callable[[int, SharedMemoryCollectives], Any]) -> list[Any]:
    """What function(rank, collectives) returns on each of `size` ranks, or an exception. Who fails leaves."""
    results: list[Any] = [None] * size
    errors: dict[int, BaseException] = {}

    def run(rank: int, collectives: SharedMemoryCollectives) -> None:
        try:
            results[rank] = function(rank, collectives)
        except BaseException as error:
            errors[rank] = error
            collectives.close()

    ends = connected(size)
    threads = [threading.Thread(target=run, args=numbered) for numbered in enumerate(ends)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for collectives in ends:
        collectives.close()
    for error in errors.values():
        raise error
    return results
