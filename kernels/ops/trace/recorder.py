"""Turns what the interpreter does into the records of a trace: addresses become numbers of a tensor's values.

An address belongs to the argument that has a value there, as its shape and strides say; so two views of one tensor,
as keys and values of one row are, keep their names.

Knows one thing of kernels: a loop whose variables are called first_key, running_max and running_sum is attention's
online softmax. Called by trace(). Twin in vLLM: none.
"""

import itertools
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import numpy as np
import torch

from minivllm.kernels.trace.interpreter import Launched
from minivllm.kernels.trace.records import Access, Launch, Program, Span, TensorInfo, Tile

TILE_VARIABLES = ("first_key", "running_max", "running_sum")


@dataclass
class _Running:
    """A program that is being interpreted."""

    accesses: list[Access] = field(default_factory=list)
    tiles: list[Tile] = field(default_factory=list)
    open_tile: int | None = None  # the one whose keys are being read

    def enter(self, kind: str, frame: FrameType) -> int | None:
        """The tile that an access belongs to. The first access behind a tile finds its results in the variables."""
        variables = frame.f_locals
        if not all(name in variables for name in TILE_VARIABLES):
            return None
        first_key, *running = (_numbers(variables[name]) for name in TILE_VARIABLES)
        tile = int(first_key[0])
        if self.open_tile is not None and (kind == "store" or tile != self.open_tile):
            self.tiles.append(Tile(self.open_tile, *running))
        is_over = kind == "store" or (self.open_tile is None and bool(self.tiles))
        self.open_tile = None if is_over else tile
        return self.open_tile


class Recorder:
    """An observer of the interpreter; see interpreter.Observer."""

    def __init__(self) -> None:
        self._launches: list[tuple[Launched, dict[tuple[int, int, int], _Running]]] = []

    def launch(self, launched: Launched) -> None:
        self._launches.append((launched, {}))

    def access(
        self,
        kind: str,
        program: tuple[int, int, int],
        addresses: np.ndarray,  # [num_active]
        num_lanes: int,
        values: np.ndarray | None,  # [num_active]
        frame: FrameType,
    ) -> None:
        launched, programs = self._launches[-1]
        running = programs.setdefault(program, _Running())
        tile = running.enter(kind, frame)
        if not addresses.size:
            return
        name, numbers = _owner(launched, addresses, frame.f_lineno, program)
        tensor = launched.tensors[name]
        touched = np.unique(numbers)
        running.accesses.append(
            Access(
                kind=kind,
                tensor=name,
                spans=_spans(touched),
                axes=tuple(_spans(np.unique(axis)) for axis in np.unravel_index(touched, tensor.shape)),
                num_lanes=num_lanes,
                num_active=addresses.size,
                line=frame.f_lineno,
                tile=tile,
                values=None if values is None else _floats(values, tensor.dtype),
            )
        )

    def launches(self) -> tuple[Launch, ...]:
        """Everything so far, with the programs that touched nothing."""
        return tuple(_launch(launched, programs) for launched, programs in self._launches)


def _launch(launched: Launched, programs: dict[tuple[int, int, int], _Running]) -> Launch:
    x, y, z = (range(size) for size in launched.grid)
    found = [(index, programs.get(index, _Running())) for index in itertools.product(x, y, z)]
    return Launch(
        kernel=launched.kernel,
        grid=launched.grid,
        tensors=tuple(
            TensorInfo(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in launched.tensors.items()
        ),
        numbers={name: value for name, value in launched.numbers.items() if isinstance(value, int | float | str)},
        first_line=launched.code.co_firstlineno,
        source=launched.source,
        programs=tuple(Program(index, tuple(one.accesses), tuple(one.tiles)) for index, one in found),
    )


# ------------------------------------------------------------------ addresses
def _owner(
    launched: Launched,
    addresses: np.ndarray,  # [num_active]
    line: int,
    program: tuple[int, int, int],
) -> tuple[str, np.ndarray]:  # [num_active]
    """The argument that has values at all these addresses, and their numbers."""
    found = {}
    for name, tensor in launched.tensors.items():
        numbers = numbers_at(tensor, addresses)
        if numbers is not None:
            found[name] = numbers
    if not found:
        raise IndexError(f"program {program}, line {line}: it touches memory outside of the kernel's tensors")
    name = next(iter(found)) if len(found) == 1 else _named(launched, line, list(found))
    return name, found[name]


def _named(launched: Launched, line: int, names: list[str]) -> str:
    """One tensor may be given as several arguments: the one that the code from `line` on names first."""
    for text in launched.source[line - launched.code.co_firstlineno :]:
        said = [(text.index(f"{name}_ptr"), name) for name in names if f"{name}_ptr" in text]
        if said:
            return min(said)[1]
    return names[0]


def numbers_at(tensor: torch.Tensor, addresses: np.ndarray) -> np.ndarray | None:  # [...], [num_active] -> [num_active]
    """Row-major numbers of the tensor's values at these addresses; None if it has no value at one of them.

    Of a view whose dimensions interleave otherwise than by size of stride nothing is found.
    """
    if not tensor.numel():
        return None
    strides = tensor.stride()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
    offsets = addresses.astype(np.int64) - tensor.data_ptr()  # in bytes
    if offsets.min() < 0 or offsets.max() > last * tensor.itemsize:
        return None
    rest, misfit = np.divmod(offsets, tensor.itemsize)
    if misfit.any():
        return None
    numbers = np.zeros_like(rest)
    steps = np.cumprod([1, *reversed(tensor.shape)])[-2::-1]  # of the numbers, per dimension
    for axis in sorted(range(tensor.ndim), key=lambda axis: strides[axis], reverse=True):
        if tensor.shape[axis] > 1 and strides[axis]:
            index, rest = np.divmod(rest, strides[axis])
            if (index >= tensor.shape[axis]).any():
                return None
            numbers += index * steps[axis]
    return None if rest.any() else numbers


def _spans(numbers: np.ndarray) -> tuple[Span, ...]:  # [n], ascending
    """Runs of consecutive numbers."""
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    return tuple((int(run[0]), int(run[-1]) + 1) for run in np.split(numbers, breaks))


# ------------------------------------------------------------------ values
def _floats(values: np.ndarray, dtype: torch.dtype) -> tuple[float, ...]:  # [n]
    """Stored values; the interpreter keeps types that numpy lacks as bits."""
    if dtype in (torch.bool, torch.float64) or not dtype.is_floating_point or values.dtype.kind == "f":
        return tuple(float(value) for value in values)
    bits = torch.from_numpy(np.ascontiguousarray(values).view(np.int16 if dtype.itemsize == 2 else np.uint8))
    return tuple(bits.view(dtype).float().tolist())


def _numbers(value: Any) -> tuple[float, ...]:
    """A variable of a kernel: a number, or the interpreter's tensor."""
    handle = getattr(value, "handle", None)
    return (float(value),) if handle is None else tuple(float(number) for number in handle.data.reshape(-1))
