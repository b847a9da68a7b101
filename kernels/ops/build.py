"""What a Triton kernel is compiled for ahead of time, and what it has to move and multiply: the input of report.py.

A `Build` is one kernel with everything that is fixed at compile time; every kernel.py lists its own in `builds()`.
A `Workload` says, by arithmetic alone, how many bytes and operations one named call takes.

Knows no compiler and no GPU. Called by ops/*/kernel.py and report.py. Twin in vLLM: none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Workload:
    """One call, as the roofline sees it.

    bytes: read and written in device memory, each value once. flops: of tl.dot and element-wise, a multiply-add is 2.
    programs: of the grid. bytes_in_flight: what one program has asked memory for before it waits.
    """

    name: str
    bytes: int
    flops: int
    programs: int
    bytes_in_flight: int


@dataclass(frozen=True)
class Build:
    """One kernel and one configuration.

    Args:
        types: argument -> Triton's type ("*bf16", "i32"; "*fp8" for e4m3, which Triton reads as another type on sm_80);
            every argument that is no constant.
        constants: the compile-time arguments.
        divisible: arguments that are multiples of 16 at every call: without that promise loads are scalar.
        has_dot: its products must be tensor instructions. has_wide_loads: its inner loop must load 128 bits at once.
    """

    operation: str
    name: str
    kernel: Any  # a triton JITFunction
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    divisible: frozenset[str]
    num_threads: int  # of one program; a warp has 32 of them, on AMD 64
    workload: Workload
    num_stages: int = 3
    has_dot: bool = False
    has_wide_loads: bool = True
