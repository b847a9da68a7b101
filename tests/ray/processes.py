"""Processes that Ray has started for a test, by the names that it gives them."""

from __future__ import annotations

import contextlib
from pathlib import Path


def named(name: str, ancestor: int) -> list[int]:
    """Ids of the processes below `ancestor` whose command line begins with `name`."""
    parents: dict[int, int] = {}
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            state, *numbers = (folder / "stat").read_text().rpartition(")")[2].split()
            parents[int(folder.name)] = int(numbers[0])
            if (folder / "cmdline").read_text().startswith(name) and state != "Z":
                found.append(int(folder.name))
    return sorted(pid for pid in found if ancestor in _line_of(pid, parents))


def _line_of(pid: int, parents: dict[int, int]) -> list[int]:
    line = []
    while pid := parents.get(pid, 0):
        line.append(pid)
    return line
