"""Sees every load and store that Triton's interpreter makes, without a change to any kernel.

The interpreter calls a kernel as a Python function, once per program, and every access goes through two methods of
its builder. While `watch` runs, these two tell an observer first; so it may also refuse an access before it happens.

Knows addresses and the kernel's frame, not what they mean. The only place that knows the interpreter's inside: it is
no public interface of Triton's. Called by trace() and tests. Twin in vLLM: none; Triton-Viz works in the same place.
"""

import inspect
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any, Protocol

import numpy as np
import torch

NOT_INTERPRETED = (
    "trace: Triton's interpreter is off. Set TRITON_INTERPRET=1 before triton is imported, at best before Python "
    "starts: triton reads it once, at its import"
)


@dataclass(frozen=True)
class Launched:
    """One launch of one kernel, before its first program runs."""

    kernel: str
    grid: tuple[int, int, int]
    tensors: Mapping[str, torch.Tensor]  # [...] each, as the kernel's arguments are named, without `_ptr`
    numbers: Mapping[str, Any]  # the other arguments
    code: CodeType
    source: tuple[str, ...]  # its lines, from code.co_firstlineno on


class Observer(Protocol):
    """What `watch` calls."""

    def launch(self, launched: Launched) -> None: ...

    def access(
        self,
        kind: str,  # "load" or "store"
        program: tuple[int, int, int],
        addresses: np.ndarray,  # [num_active] uint64: the lanes that the mask lets through
        num_lanes: int,
        values: np.ndarray | None,  # [num_active] of a store, raw bits where numpy has no such type
        frame: FrameType,  # of the kernel: its variables, and the line that runs
    ) -> None: ...


def require_interpreter() -> None:
    """Raises RuntimeError that says what to do where kernels would be compiled."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(NOT_INTERPRETED)
    import triton.language
    from triton.runtime.interpreter import InterpretedFunction

    if not isinstance(triton.language.sigmoid, InterpretedFunction):  # was imported before the variable was set
        raise RuntimeError(NOT_INTERPRETED)


@contextmanager
def watch(observer: Observer) -> Iterator[None]:
    """Every launch, load and store until the end of the block; may be nested. RuntimeError: no interpreter."""
    require_interpreter()
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    masked_load, masked_store = builder.create_masked_load, builder.create_masked_store
    codes: list[CodeType] = []  # of the launch that runs

    def load(pointers: Any, mask: Any, *rest: Any) -> Any:
        _tell("load", pointers, mask, None)
        return masked_load(pointers, mask, *rest)

    def store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        _tell("store", pointers, mask, value)
        return masked_store(pointers, value, mask, *rest)

    def _tell(kind: str, pointers: Any, mask: Any, value: Any) -> None:
        shape = pointers.data.shape
        active = np.broadcast_to(mask.data, shape)
        frame = _frame_of(codes[-1])
        values = None if value is None else np.broadcast_to(value.data, shape)[active]
        observer.access(kind, builder.grid_idx, pointers.data[active], active.size, values, frame)

    class WatchedGrid(interpreter.GridExecutor):
        def __call__(self, *arguments: Any, **named: Any) -> None:
            launched = _launched(self, arguments, named)
            observer.launch(launched)
            codes.append(launched.code)
            try:
                super().__call__(*arguments, **named)
            finally:
                codes.pop()

    with (
        _replaced(builder, "create_masked_load", load),
        _replaced(builder, "create_masked_store", store),
        _replaced(interpreter, "GridExecutor", WatchedGrid),
    ):
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _launched(executor: Any, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Launched:
    accepted = {name: value for name, value in named.items() if name in executor.arg_names}  # not num_warps and such
    bound = inspect.getcallargs(executor.fn, *arguments, **accepted)
    grid = executor.grid(bound) if callable(executor.grid) else executor.grid
    grid = (*grid, 1, 1)[:3]
    bound = {name: getattr(value, "base", value) for name, value in bound.items()}  # triton.reinterpret wraps a tensor
    tensors = {name.removesuffix("_ptr"): value for name, value in bound.items() if isinstance(value, torch.Tensor)}
    numbers = {name: value for name, value in bound.items() if not isinstance(value, torch.Tensor)}
    code = executor.fn.__code__
    source = tuple(line.rstrip("\n") for line in inspect.getsourcelines(code)[0])
    return Launched(executor.fn.__name__, grid, tensors, numbers, code, source)


def _frame_of(code: CodeType) -> FrameType:
    """The kernel's frame, also when a function that it called makes the access."""
    frame = sys._getframe(2)
    while frame.f_code is not code:
        assert frame.f_back is not None, code
        frame = frame.f_back
    return frame
