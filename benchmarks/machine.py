"""What this machine is and what it can do at most: the yardsticks beside every figure of compare.py.

It knows no engine. Sizes are chosen so that everything here takes a few seconds, also without bf16 instructions.
"""

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

READ_BYTES = 256 * 2**20  # well above any cache
GEMM_SIZE = 1024
INTERESTING_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")


def describe() -> dict[str, Any]:
    """Processor, cores, the instruction sets that matter, memory, versions, and how busy the machine already is."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags", fields.get("Features", "")).split()
    return {
        "cpu": fields.get("model name", platform.processor() or platform.machine()),
        "cores": num_cores(),
        "flags": [flag for flag in INTERESTING_FLAGS if flag in flags],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_average_1min": round(os.getloadavg()[0], 2),
    }


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def has_fast_bf16(flags: list[str]) -> bool:
    """Whether the processor multiplies bfloat16 itself; without that, float32 is every engine's faster dtype."""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def limits() -> dict[str, float]:
    """Measured here and now with all cores: memory read in GB/s, matrix multiplication in GFLOP/s per dtype."""
    torch.set_num_threads(num_cores())
    columns = 4096
    matrix = torch.ones(READ_BYTES // 4 // columns, columns)
    vector = torch.ones(columns)
    # A sum and a matrix-vector product both read everything once; the better one is the limit.
    read_seconds = min(_fastest(lambda: matrix.sum()), _fastest(lambda: matrix @ vector))
    result = {"read_gb_per_s": READ_BYTES / read_seconds / 1e9}
    for name in ("float32", "bfloat16"):
        square = torch.ones(GEMM_SIZE, GEMM_SIZE, dtype=getattr(torch, name))
        result[f"gemm_{name}_gflop_per_s"] = 2 * GEMM_SIZE**3 / _fastest(lambda square=square: square @ square) / 1e9
    return result


def _fastest(run: Callable[[], object], repeats: int = 10, budget_seconds: float = 2.0) -> float:
    """Seconds of the fastest of up to `repeats` runs; slow ones (bf16 without instructions) not for long."""
    seconds: list[float] = []
    while len(seconds) < repeats and sum(seconds) < budget_seconds:
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
