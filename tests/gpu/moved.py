"""Runs an operation on another device for a test that knows only the CPU.

`moved(operation, device)` takes and returns tensors of the CPU. In between they lie on the device, with the same
strides; what the operation changes in place is brought back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch


def moved(operation: Callable[..., Any], device: str, *, always: bool = False) -> Callable[..., Any]:
    """Only calls with impl="triton" are moved, or all of them."""

    @functools.wraps(operation)
    def call(*arguments: Any, **named: Any) -> Any:
        if not always and named.get("impl") != "triton":
            return operation(*arguments, **named)
        there = [to(value, device) for value in arguments]
        named_there = {name: to(value, device) for name, value in named.items()}
        output = operation(*there, **named_there)
        for here, other in zip([*arguments, *named.values()], [*there, *named_there.values()], strict=True):
            if isinstance(here, torch.Tensor) and not same_bits(here, other.cpu()):
                here.copy_(other)
        return back(output)

    return call


class MovedModule:
    """A kernel's module whose functions all run on the device."""

    def __init__(self, module: ModuleType, device: str):
        self._module, self._device = module, device

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        return moved(found, self._device, always=True) if callable(found) and name != "StepTensors" else found


def to(value: Any, device: str) -> Any:
    """A copy on the device with the same strides; other values as they are."""
    if not isinstance(value, torch.Tensor):
        return value
    if any(stride == 0 and size > 1 for size, stride in zip(value.shape, value.stride(), strict=True)):
        return value.to(device)
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device).copy_(value)


def back(value: Any) -> Any:
    """Tensors of a tensor, a tuple or a named tuple on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, tuple):
        items = [back(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:  # [...], [...]
    """NaN equals itself."""
    if not one.numel():
        return one.shape == other.shape
    return torch.equal(*(values.contiguous().reshape(-1).view(torch.uint8) for values in (one, other)))
