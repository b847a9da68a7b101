"""The records of a trace.

A trace holds launches of kernels, a launch programs in the order in which the interpreter ran them, a program accesses
in the order of the code. Values of a tensor are numbered in row-major order of its shape, whatever its strides.

Knows no Triton. Made by recorder.py, kept by document.py, drawn by page.py. Twin in vLLM: none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Span = tuple[int, int]  # first, and one behind the last


@dataclass(frozen=True)
class TensorInfo:
    """A tensor that a kernel was given, named as the argument is without its `_ptr`."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Access:
    """One tl.load or tl.store of one program.

    spans: the touched values, by number. axes: the same per dimension, so for a cache [heads, blocks, block_size,
    head_size] axes[1] are the block ids. Lanes whose mask is off touch nothing. values: what a store wrote, in the
    order of its lanes.
    """

    kind: str  # "load" or "store"
    tensor: str
    spans: tuple[Span, ...]
    axes: tuple[tuple[Span, ...], ...]
    num_lanes: int
    num_active: int
    line: int  # of the kernel's file
    tile: int | None = None  # first_key, inside attention's loop over keys
    values: tuple[float, ...] | None = None

    def indices(self, axis: int) -> list[int]:
        """All indices along one dimension, ascending."""
        return [index for start, stop in self.axes[axis] for index in range(start, stop)]

    def numbers(self) -> list[int]:
        """All touched values, ascending."""
        return [number for start, stop in self.spans for number in range(start, stop)]

    @property
    def text(self) -> str:
        """As in Python: k_cache[0, 7, 0:16, 0:64]."""
        return f"{self.tensor}[{', '.join(_slices(spans) for spans in self.axes)}]"


@dataclass(frozen=True)
class Tile:
    """The online softmax of attention after one tile of keys, per query row of the program, in base 2.

    A row that has seen no key yet has the maximum -inf. max + log2(sum) is the log-sum-exp of what it has seen.
    """

    first_key: int
    running_max: tuple[float, ...]
    running_sum: tuple[float, ...]


@dataclass(frozen=True)
class Program:
    """One instance of a kernel."""

    index: tuple[int, int, int]  # tl.program_id 0, 1 and 2
    accesses: tuple[Access, ...]
    tiles: tuple[Tile, ...]  # empty but for attention


@dataclass(frozen=True)
class Launch:
    """One call of one kernel."""

    kernel: str
    grid: tuple[int, int, int]
    tensors: tuple[TensorInfo, ...]
    numbers: Mapping[str, Any]  # the other arguments
    first_line: int  # of `source` in the kernel's file
    source: tuple[str, ...]
    programs: tuple[Program, ...]


def _slices(spans: tuple[Span, ...]) -> str:
    """0:16, or 3, or {0, 2:5}."""
    parts = [str(start) if stop == start + 1 else f"{start}:{stop}" for start, stop in spans]
    return parts[0] if len(parts) == 1 else f"{{{', '.join(parts)}}}"
