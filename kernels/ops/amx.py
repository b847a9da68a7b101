"""Intel's AMX from Python: eight tile registers of 16 rows of 64 bytes, and an instruction that multiplies two.

    tile_dot_bf16(c, a, b)     c[i, j] += sum over p of a[i, 2p] * b[p, 2j] + a[i, 2p + 1] * b[p, 2j + 1]

a holds 16 rows of 32 bfloat16; b holds 16 pairs of its rows, the two values of a pair side by side, 16 pairs wide; c is
16 x 16 float32. That is 8,192 multiplications, in 16 cycles by Intel's manual; the widest vector instruction does 32.

Numbers of tiles are part of the instruction, so they must be literals. On a CPU without AMX these functions compile to
nothing; ask `HAS_AMX` first. `load_tiles_shape` must come before any other in every thread, `release_tiles` behind.

Knows no operation. Called by: packed_matmul, decoder_step, paged_attention's cpu_rows_amx.py and cpu_prompts_amx.py.
Twin in vLLM: csrc/cpu/micro_gemm/cpu_micro_gemm_amx.hpp.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

__all__ = [
    "HAS_AMX",
    "TILE_SHAPE",
    "load_tiles_shape",
    "narrow_row",
    "on_stack",
    "prefetch",
    "release_tiles",
    "tile_dot_bf16",
    "tile_load",
    "tile_store",
    "tile_zero",
    "widen_codes",
]


def _has_amx() -> bool:
    """The CPU has it, the compiler knows it, and the kernel lets this process use it (a request, made once)."""
    features = binding.get_host_cpu_features()
    known = features.get("amx-tile", False) and features.get("amx-bf16", False)
    return known and torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()


HAS_AMX = bool(_has_amx())
CACHE_LINE = 64
# What load_tiles_shape reads: palette 1; bytes per row of each tile, in 16 bits, from byte 16 on; its rows from byte 48
# on. All eight have the full 16 x 64.
TILE_SHAPE = np.frombuffer(bytes([1, *[0] * 15, *[64, 0] * 8, *[0] * 16, *[16] * 8, *[0] * 8]), np.uint8)


class _BFloat16(ir.types.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat16)

    def __hash__(self) -> int:
        return hash(_BFloat16)


def _emit(builder: Any, name: str, arguments: list[Any]) -> None:
    if HAS_AMX:
        signature = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
        function = builder.module.globals.get(name) or ir.Function(builder.module, signature, name)
        builder.call(function, arguments)


def _tile(number: types.IntegerLiteral) -> ir.Constant:
    return ir.Constant(ir.IntType(8), number.literal_value)


def _pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, ir.IntType(8).as_pointer())


@intrinsic
def load_tiles_shape(context: Any, address: Any) -> Any:
    """address: of the 64 bytes of TILE_SHAPE."""

    def generate(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        _emit(builder, "llvm.x86.ldtilecfg", [_pointer(builder, args[0])])
        return ctx.get_dummy_value()

    return types.void(types.intp), generate


@intrinsic
def release_tiles(context: Any) -> Any:
    """The registers are empty again; else the operating system saves 8 KiB more whenever the thread is moved."""

    def generate(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        _emit(builder, "llvm.x86.tilerelease", [])
        return ctx.get_dummy_value()

    return types.void(), generate


@intrinsic(prefer_literal=True)
def tile_zero(context: Any, tile: Any) -> Any:
    """Zeros in all of the tile."""

    def generate(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        _emit(builder, "llvm.x86.tilezero", [_tile(tile)])
        return ctx.get_dummy_value()

    return types.void(tile), generate


@intrinsic(prefer_literal=True)
def tile_load(context: Any, tile: Any, address: Any, stride: Any) -> Any:
    """16 rows of 64 bytes, `stride` bytes apart."""

    def generate(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        _emit(builder, "llvm.x86.tileloadd64", [_tile(tile), _pointer(builder, args[1]), args[2]])
        return ctx.get_dummy_value()

    return types.void(tile, types.intp, types.intp), generate


@intrinsic(prefer_literal=True)
def tile_store(context: Any, tile: Any, address: Any, stride: Any) -> Any:
    """The reverse of tile_load."""

    def generate(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        _emit(builder, "llvm.x86.tilestored64", [_tile(tile), _pointer(builder, args[1]), args[2]])
        return ctx.get_dummy_value()

    return types.void(tile, types.intp, types.intp), generate


@intrinsic(prefer_literal=True)
def tile_dot_bf16(context: Any, c: Any, a: Any, b: Any) -> Any:
    """c += a . b as above."""

    def generate(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        _emit(builder, "llvm.x86.tdpbf16ps", [_tile(c), _tile(a), _tile(b)])
        return ctx.get_dummy_value()

    return types.void(c, a, b), generate


@intrinsic
def narrow_row(context: Any, source: Any, target: Any) -> Any:
    """16 float32 at `source` to 16 bfloat16 at `target`, rounded: one row of a tile of sums, in one instruction. In
    loops the compiler takes it for slower than it is. Numbers below 1.2e-38 become zero."""

    def generate(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        floats, halves, words = (ir.VectorType(kind, 16) for kind in (ir.FloatType(), _BFloat16(), ir.IntType(16)))
        row = builder.load(builder.inttoptr(args[0], floats.as_pointer()), align=4)
        rounded = builder.bitcast(builder.fptrunc(row, halves), words)
        builder.store(rounded, builder.inttoptr(args[1], words.as_pointer()), align=2)
        return ctx.get_dummy_value()

    return types.void(types.intp, types.intp), generate


@intrinsic
def widen_codes(context: Any, source: Any, scales: Any, minimums: Any, target: Any) -> Any:
    """16 bytes at `source`, two codes of 4 bits in each, to 16 pairs of bfloat16 at `target`: code * scale + minimum in
    float32, rounded once. scales, minimums: addresses of 16 float32. As a loop it takes 2.5 times as long."""

    def generate(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        byte, half, word = (ir.VectorType(ir.IntType(bits), 16) for bits in (8, 16, 32))
        real = ir.VectorType(ir.FloatType(), 16)

        def load(address: Any, kind: Any) -> Any:
            return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)

        def value(code: Any) -> Any:
            scaled = builder.fmul(builder.uitofp(code, real), load(args[1], real), flags=("contract",))
            weight = builder.fadd(scaled, load(args[2], real), flags=("contract",))
            return builder.zext(builder.bitcast(builder.fptrunc(weight, ir.VectorType(_BFloat16(), 16)), half), word)

        both = builder.zext(load(args[0], byte), word)
        lower = value(builder.and_(both, ir.Constant(word, [15] * 16)))
        upper = value(builder.lshr(both, ir.Constant(word, [4] * 16)))
        pair = builder.or_(lower, builder.shl(upper, ir.Constant(word, [16] * 16)))
        builder.store(pair, builder.inttoptr(args[3], word.as_pointer()), align=4)
        return ctx.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, types.intp), generate


@intrinsic(prefer_literal=True)
def on_stack(context: Any, num_bytes: Any) -> Any:
    """The address of `num_bytes` for as long as the kernel's call lasts, at the start of a cache line: half the time of
    a tile's load or store that begins elsewhere, as numpy's arrays do. Nothing has been written there."""

    def generate(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        space = ir.ArrayType(ir.IntType(8), num_bytes.literal_value)
        with builder.goto_entry_block():
            place = builder.alloca(space)
            place.align = CACHE_LINE
        return builder.ptrtoint(place, ctx.get_value_type(types.intp))

    return types.intp(num_bytes), generate


@intrinsic
def prefetch(context: Any, address: Any) -> Any:
    """Ask for the 64 bytes at `address`; nothing waits for them."""

    def generate(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        signature = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        function = builder.module.globals.get("llvm.prefetch.p0i8") or ir.Function(
            builder.module, signature, "llvm.prefetch.p0i8"
        )
        builder.call(function, [_pointer(builder, args[0]), number(0), number(3), number(1)])  # to read, keep, data
        return ctx.get_dummy_value()

    return types.void(types.intp), generate
