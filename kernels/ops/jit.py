"""What the CPU kernels are compiled with: numba, and the few things that it lacks.

Numpy has no bfloat16, so kernels see it as uint16. Kernels load with `widen`, compute in float32 and store with
`narrow`; for float32 both do nothing. Compiled code is kept on disk, beside the source file or in the user's cache
folder: a kernel takes seconds the first time and milliseconds from then on.

Sums may be reordered (a vector unit adds eight at a time), but NaN and infinity keep their meaning: a request whose
numbers have gone bad must show it.

Knows no operation. Called by the `cpu` files of the operations. Twin in vLLM: csrc/cpu/cpu_types_x86.hpp.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import binding, ir
from numba import get_thread_id, prange, types
from numba.extending import intrinsic, overload

__all__ = [
    "BFLOAT16",
    "BYTE",
    "FLOAT32",
    "INT64",
    "WORD",
    "array_at",
    "call",
    "constant",
    "cycles",
    "exp",
    "exp2",
    "get_thread_id",
    "jit",
    "largest_of",
    "like",
    "load_shared",
    "narrow",
    "pause",
    "prange",
    "rounded",
    "store_shared",
    "supports",
    "tanh",
    "use_torch_threads",
    "value_of",
    "widen",
    "widen_half",
]

# Imported after torch, numba's threads are torch's own: both call the OpenMP that came first. Without a libgomp of the
# system numba has only a pool that two engines must not use at once; then kernels run on one thread.
try:
    import numba.np.ufunc.omppool
except ImportError:
    HAS_OPENMP = False
else:
    HAS_OPENMP = True


def _use_whole_vectors() -> None:
    """LLVM takes vectors of half the width on CPUs with AMX, for the clock of older ones; exp is a third faster with
    all of it (benchmarks/LOG.md). Numba reads this once, before the first kernel is compiled, and has no other place to
    say it. Who has set it keeps it."""
    features = binding.get_host_cpu_features()
    if features.get("amx-tile", False) and numba.config.CPU_FEATURES is None:
        numba.config.CPU_FEATURES = features.flatten() + ",-prefer-256-bit"


_use_whole_vectors()

ROUNDING = frozenset({"reassoc", "contract", "arcp", "nsz"})  # of LLVM's fast-math flags, those that spare NaN
# Without the first, a value's bits do not depend on whether it was computed in a vector. LLVM makes two loops of one
# that writes, and asks at run time whether what is written lies so close behind what is read that only the plain loop
# is right. The addresses of the day must not change a bit: tests/kernels/test_batch_invariance.py.
IN_ORDER = ROUNDING - {"reassoc"}


# ------------------------------------------------------------------ tensors in
# They tell a kernel what its addresses point to.
BFLOAT16, FLOAT32, INT64 = np.empty(0, np.uint16), np.empty(0, np.float32), np.empty(0, np.int64)
BYTE, WORD = np.empty(0, np.uint8), np.empty(0, np.uint32)  # two codes; two bfloat16


def supports(tensor: torch.Tensor) -> bool:  # [...]
    """Whether the compiled kernels know its dtype; the reference takes the others."""
    return tensor.dtype in (torch.bfloat16, torch.float32)


def like(tensor: torch.Tensor) -> np.ndarray:  # [...] -> [0]
    """An empty array of the type as which kernels see the tensor's values."""
    return BFLOAT16 if tensor.dtype == torch.bfloat16 else FLOAT32


@intrinsic
def _pointer(context: Any, address: Any, like: Any) -> Any:
    result = types.CPointer(like.dtype)
    return result(types.intp, like), lambda ctx, builder, sig, args: builder.inttoptr(
        args[0], ctx.get_value_type(result)
    )


@numba.njit(inline="always")
def array_at(address: int, shape: Any, like: Any) -> Any:
    """Inside a kernel: the dense array of `shape` that starts at `address`, of the values of `like`.

    Kernels take addresses because eight views of tensors as arrays cost more than the loop over one row.
    """
    return numba.carray(_pointer(address, like), shape)


# ------------------------------------------------------------------ compiling
# Name, size and date of every file that kernels are made of.
SOURCES = tuple(
    sorted(
        (str(file.relative_to(Path(__file__).parent)), file.stat().st_size, file.stat().st_mtime_ns)
        for file in Path(__file__).parent.rglob("*.py")
    )
)


def jit(
    function: Callable[..., Any] | None = None,
    *,
    parallel: bool = False,
    inline: str = "never",
    nogil: bool = False,
    in_order: bool = False,
) -> Any:
    """Decorator: compile on the first call, keep on disk. parallel: the iterations of `prange` are shared by threads.
    inline: "always" for what kernels call. nogil: for what takes milliseconds; other threads run Python meanwhile.
    in_order: sums and products as they are written, for a loop that writes what it computes (see IN_ORDER)."""
    if function is None:
        return partial(jit, parallel=parallel, inline=inline, nogil=nogil, in_order=in_order)
    rounding = set(IN_ORDER if in_order else ROUNDING)
    options: dict[str, Any] = {"fastmath": rounding, "error_model": "numpy", "inline": inline}
    options |= {"parallel": parallel and HAS_OPENMP, "nogil": nogil}
    if inline != "never":
        return numba.njit(**options)(function)
    try:
        compiled = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder that can be written to: compiled anew by every process
        return numba.njit(**options)(function)
    # Numba compiles anew what was written before the kernel's own file; a kernel also holds those that it calls.
    compiled._cache._cache_file._source_stamp = SOURCES
    return compiled


def constant(value: int) -> np.ndarray:
    """A number that is compiled into the kernel it is passed to, as Triton's constexpr: a loop of known length needs no
    code for its end. Numba compiles anew for new types only, so it travels as a type: of strings of so many bytes."""
    return np.empty(0, f"S{value}")


@intrinsic
def value_of(context: Any, constant: Any) -> Any:
    """Inside a kernel: the number that `constant` was made of, known to the compiler."""
    value = constant.dtype.count
    return types.intp(constant), lambda ctx, builder, sig, args: ir.Constant(ir.IntType(64), value)


def use_torch_threads() -> None:
    """As many threads as torch has, for the kernels that this thread calls."""
    if HAS_OPENMP:
        num_threads = torch.get_num_threads()
        numba.set_num_threads(min(num_threads, numba.config.NUMBA_NUM_THREADS))
        torch.set_num_threads(num_threads)  # the first time numba had told OpenMP to use all cores


use_torch_threads()


# ------------------------------------------------------------------ time
@intrinsic
def cycles(context: Any) -> Any:
    """Inside a kernel: the processor's counter of time. It goes on at one rate on all cores."""

    def generate(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        name = "llvm.readcyclecounter"
        function = builder.module.globals.get(name)
        return builder.call(function or ir.Function(builder.module, ir.FunctionType(ir.IntType(64), []), name), [])

    return types.int64(), generate


# ------------------------------------------------------------------ other processes
@intrinsic
def load_shared(context: Any, address: Any) -> Any:
    """The 64 bits at `address`, which another process may write; it is asked anew every time. What it had written
    before them can be read from then on."""

    def generate(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(args[0], ir.IntType(64).as_pointer()), "acquire", 8)

    return types.int64(types.intp), generate


@intrinsic
def store_shared(context: Any, address: Any, value: Any) -> Any:
    """Write 64 bits that another process reads by load_shared, behind all that was written before."""

    def generate(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store_atomic(args[1], builder.inttoptr(args[0], ir.IntType(64).as_pointer()), "release", 8)
        return ctx.get_dummy_value()

    return types.void(types.intp, types.int64), generate


@intrinsic
def pause(context: Any) -> Any:
    """In a loop that waits: some dozen cycles that leave the core to its other thread. Nothing but on x86."""

    def generate(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        name = "llvm.x86.sse2.pause"
        if binding.get_process_triple().startswith("x86_64"):
            function = builder.module.globals.get(name)
            builder.call(function or ir.Function(builder.module, ir.FunctionType(ir.VoidType(), []), name), [])
        return ctx.get_dummy_value()

    return types.void(), generate


@intrinsic
def call(context: Any, function: Any, value: Any) -> Any:
    """function(value): an address of C code that takes and gives 64 bits, such as a callback of ctypes."""

    def generate(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(64), [ir.IntType(64)])
        return builder.call(builder.inttoptr(args[0], kind.as_pointer()), [args[1]])

    return types.int64(types.intp, types.int64), generate


# ------------------------------------------------------------------ values
@intrinsic
def _bits_to_float(context: Any, bits: Any) -> Any:
    return types.float32(types.uint32), lambda ctx, builder, sig, args: builder.bitcast(args[0], ir.FloatType())


@intrinsic
def _float_to_bits(context: Any, value: Any) -> Any:
    return types.uint32(types.float32), lambda ctx, builder, sig, args: builder.bitcast(args[0], ir.IntType(32))


@intrinsic
def widen(context: Any, value: Any) -> Any:
    """A loaded value as float32. A bfloat16 is the upper half of one."""
    if isinstance(value, types.Float):
        return value(value), lambda ctx, builder, sig, args: args[0]

    def shift(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        word = ir.IntType(32)
        return builder.bitcast(builder.shl(builder.zext(args[0], word), word(16)), ir.FloatType())

    return types.float32(types.uint16), shift


@intrinsic
def widen_half(context: Any, bits: Any) -> Any:
    """The bits of an fp16 as float32."""
    return types.float32(types.uint16), lambda ctx, builder, sig, args: builder.fpext(
        builder.bitcast(args[0], ir.HalfType()), ir.FloatType()
    )


def narrow(value: Any, array: Any) -> Any:
    """A float32 as `array` stores it, rounded to the nearest, ties to even; NaN stays NaN."""
    raise NotImplementedError("only inside compiled kernels")


@overload(narrow)
def _narrow(value, array):  # type: ignore[no-untyped-def]
    if isinstance(array.dtype, types.Float):
        return lambda value, array: value

    def to_bfloat16(value, array):  # type: ignore[no-untyped-def]
        bits = _float_to_bits(value)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        return np.uint16(rounded if value == value else np.uint32(0x7FC0))

    return to_bfloat16


def rounded(value: Any, array: Any) -> Any:
    """widen(narrow(value)), by operations that the compiler makes wide vectors of. A NaN must be one that arithmetic
    gave."""
    raise NotImplementedError("only inside compiled kernels")


@overload(rounded)
def _rounded(value, array):  # type: ignore[no-untyped-def]
    if isinstance(array.dtype, types.Float):
        return lambda value, array: value

    def to_bfloat16(value, array):  # type: ignore[no-untyped-def]
        bits = _float_to_bits(value)
        up = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        return _bits_to_float((bits + up) & np.uint32(0xFFFF0000))

    return to_bfloat16


@jit(inline="always")
def largest_of(values: Any) -> Any:
    """The maximum of values [num_values] float32, NaN if there is a positive one, -infinity if there is nothing.

    By their bits: a float's order is that of its bits as an integer, the lower 31 turned around for negative ones. The
    compiler makes vectors of a maximum of integers, and no others while NaN counts.
    """
    largest = np.int32(-0x7F800001)  # -infinity's
    for i in range(len(values)):
        bits = np.int32(_float_to_bits(values[i]))
        bits ^= (bits >> np.int32(31)) & np.int32(0x7FFFFFFF)
        largest = max(largest, bits)
    return _bits_to_float(np.uint32(largest ^ ((largest >> np.int32(31)) & np.int32(0x7FFFFFFF))))


@jit(inline="always")
def exp(x: Any) -> Any:
    """e^x in float32, within 2 units in the last place; a polynomial, so that loops over it become vectors.

    x = n log 2 + f: 2^n goes into the exponent's bits, e^f is Cephes' polynomial (expf.c). Below -87 it gives e^-87.
    """
    x = np.float32(-87.0) if x < np.float32(-87.0) else x
    x = np.float32(89.0) if x > np.float32(89.0) else x  # infinity, by the exponent's bits
    n = np.floor(x * np.float32(1.44269504088896341) + np.float32(0.5))
    f = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * f + np.float32(1.3981999507e-3)
    p = p * f + np.float32(8.3334519073e-3)
    p = p * f + np.float32(4.1665795894e-2)
    p = p * f + np.float32(1.6666665459e-1)
    p = p * f + np.float32(5.0000001201e-1)
    p = p * f * f + f + np.float32(1.0)
    return p * _bits_to_float(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23))


@jit(inline="always")
def exp2(x: Any) -> Any:
    """2^x in float32 for x up to 0, within 2e-7 of it; below -126 it gives 2^-126. Half of exp's work.

    x = n + f: 2^n goes into the exponent's bits, 2^f is a polynomial through the Chebyshev nodes of [-0.5, 0.5].
    """
    x = np.float32(-126.0) if x < np.float32(-126.0) else x
    n = np.floor(x + np.float32(0.5))
    f = x - n
    p = np.float32(0.001339086336)
    p = p * f + np.float32(0.009676031918)
    p = p * f + np.float32(0.05550357114)
    p = p * f + np.float32(0.2402210749)
    p = p * f + np.float32(0.693147188)
    p = p * f + np.float32(1.000000075)
    return p * _bits_to_float(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23))


@jit(inline="always")
def tanh(x: Any) -> Any:
    """In float32, from exp."""
    return np.float32(1.0) - np.float32(2.0) / (exp(np.float32(2.0) * x) + np.float32(1.0))
