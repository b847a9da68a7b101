"""The kernels' rule, what Triton's interpreter changes in it, and a fence around the kernels' memory."""

from __future__ import annotations

import math
from types import FrameType

import numpy as np
import torch

from minivllm.kernels.trace.interpreter import Launched
from tests.kernels.helpers import assert_kernel_is_right, assert_rounded_once, random_values

OUTSIDE = "outside of the kernel's tensors"
TWICE = "values that another program has stored"

# The interpreter cuts bfloat16 results off where a GPU rounds them: bfloat16 is judged by one step instead of half.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def assert_right(
    kernel: torch.Tensor,  # [...] what Triton computed
    reference: torch.Tensor,  # [...] the reference in the kernel's dtype
    exact: torch.Tensor,  # [...] the reference in float64
) -> None:
    """assert_kernel_is_right, with a second step of rounding for a cut bfloat16."""
    if kernel.dtype == torch.bfloat16:
        assert kernel.isfinite().all(), "the kernel read poison, or left a value unwritten"
        step = torch.finfo(torch.bfloat16).eps * exact.abs()
        kernel = torch.where((kernel.double() - exact).abs() <= step, exact.to(kernel.dtype), kernel)
    assert_kernel_is_right(kernel, reference, exact)


def assert_row_is_right(
    kernel: torch.Tensor,  # [...] what Triton computed
    reference: torch.Tensor,  # [...] the reference in the kernel's dtype
    exact: torch.Tensor,  # [...] the reference in float64
) -> None:
    """assert_right, and every single value was rounded once (the interpreter cuts bfloat16 off instead)."""
    assert_right(kernel, reference, exact)
    if kernel.dtype != torch.bfloat16:
        assert_rounded_once(kernel, exact)


# ------------------------------------------------------------------ the kernels' memory
def far_apart(num_rows: int, *shape: int) -> torch.Tensor:  # [num_rows, *shape]
    """Rows 2^30 values from each other: offsets from the third on do not fit into 32 bits. Only their pages exist."""
    size = math.prod(shape)
    memory = torch.empty((num_rows - 1) * 2**30 + size, dtype=torch.float16)
    rows = memory.as_strided((num_rows, size), (2**30, 1))
    rows.copy_(random_values(num_rows, size, dtype=torch.float16))
    return memory.as_strided((num_rows, *shape), (2**30, *torch.empty(shape).stride()))


class Fence:
    """An observer of the interpreter that refuses what a GPU would do without a word: to touch memory outside of the
    launch's tensors, and to let two programs store the same value, where the last one wins by chance."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []
        self.stored: dict[int, tuple[int, int, int]] = {}  # address -> program

    def launch(self, launched: Launched) -> None:
        self.ranges = sorted({memory_of(tensor) for tensor in launched.tensors.values() if tensor.numel()})
        self.stored = {}

    def access(
        self,
        kind: str,
        program: tuple[int, int, int],
        addresses: np.ndarray,  # [num_active]
        num_lanes: int,
        values: np.ndarray | None,  # [num_active]
        frame: FrameType,
    ) -> None:
        inside = np.zeros(addresses.shape, dtype=bool)
        for start, stop in self.ranges:
            inside |= (addresses >= start) & (addresses < stop)
        if not inside.all():
            raise IndexError(f"program {program}, line {frame.f_lineno}: {int((~inside).sum())} {kind}s {OUTSIDE}")
        if kind == "store" and any(self.stored.setdefault(at, program) != program for at in addresses.tolist()):
            raise IndexError(f"program {program}, line {frame.f_lineno}: it stores {TWICE}")


def memory_of(tensor: torch.Tensor) -> tuple[int, int]:  # [...]
    """The addresses of its first value and behind its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize
