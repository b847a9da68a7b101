"""quant_matmul in Triton: a program per tile of the output walks along in_features, one tile of codes after the other.

    8 bits:  acc += rows · codes               and at the end  out = acc * scales: codes are exact in the rows' type
    4 bits:  acc += rows_low · low + rows_high · high          low, high = code * scale + minimum, rounded once

                    in_features
                 ┌───┬───┬───┬──▶ BLOCK_K                 codes [out_features, in_features], a byte or half a byte each
    BLOCK_N      │▓▓▓│   │   │     out_features
    of them      └───┴───┴───┴──
    rows BLOCK_M ┌───┬───┬───┬──
                 │▓▓▓│   │   │     ──▶ acc [BLOCK_M, BLOCK_N] fp32

No split along in_features: every sum has one order, whatever the batch. Called by the package on GPU tensors. Twin in
vLLM: model_executor/layers/quantization/awq_triton.py and csrc/quantization/marlin.
"""

import os

import torch
import triton
import triton.language as tl

from minivllm.kernels.quant_matmul.tiles import Tile, choose_tile


@triton.jit
def int8_matmul_kernel(
    rows_ptr,  # [num_tokens, in_features]
    codes_ptr,  # [out_features, in_features] int8
    scales_ptr,  # [out_features]
    out_ptr,  # [num_tokens, out_features]
    num_tokens,
    out_features,
    in_features,
    rows_stride,
    UPCAST: tl.constexpr,  # widen what tl.dot multiplies: the interpreter computes bf16 products wrongly
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of the output. Programs that share weights are neighbours, so these are read from memory once."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    output = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_token = token < num_tokens
    is_output = output < out_features
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, in_features, BLOCK_K):
        column = first + tl.arange(0, BLOCK_K)
        is_column = column < in_features
        rows = tl.load(
            rows_ptr + token[:, None] * rows_stride + column[None, :],
            mask=is_token[:, None] & is_column[None, :],
            other=0.0,
        )  # [BLOCK_M, BLOCK_K]
        codes = tl.load(
            codes_ptr + output[None, :] * in_features + column[:, None],
            mask=is_column[:, None] & is_output[None, :],
            other=0,
        )  # [BLOCK_K, BLOCK_N]
        if UPCAST:
            rows = rows.to(tl.float32)
        acc = tl.dot(rows, codes.to(rows.dtype), acc, input_precision="ieee")
    acc *= tl.load(scales_ptr + output, mask=is_output, other=0.0).to(tl.float32)[None, :]
    target = token[:, None] * out_features + output[None, :]
    tl.store(out_ptr + target, acc.to(out_ptr.dtype.element_ty), mask=is_token[:, None] & is_output[None, :])


@triton.jit
def _values(
    codes,  # [GROUPS, HALF, BLOCK_N], 0 .. 15
    scales,  # [GROUPS, 1, BLOCK_N]
    minimums,
    dtype: tl.constexpr,
):
    """The weights [GROUPS * HALF, BLOCK_N] of one half of the bytes."""
    values = (codes.to(tl.float32) * scales + minimums).to(dtype)
    return tl.reshape(values, [values.shape[0] * values.shape[1], values.shape[2]])


@triton.jit
def int4_matmul_kernel(
    rows_ptr,  # [num_tokens, in_features]
    codes_ptr,  # [out_features, in_features // 2] uint8
    scales_ptr,  # [out_features, num_groups]
    minimums_ptr,
    out_ptr,  # [num_tokens, out_features]
    num_tokens,
    out_features,
    in_features,
    rows_stride,
    UPCAST: tl.constexpr,
    HALF: tl.constexpr,  # half a group: the bytes that hold it
    GROUPS: tl.constexpr,  # of one tile; BLOCK_K = 2 * HALF * GROUPS
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of the output, see int8_matmul_kernel. A tile holds whole groups, so a column never meets the scale of
    another group."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    output = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_token = token < num_tokens
    is_output = output < out_features
    num_groups = in_features // (2 * HALF)
    num_bytes = in_features // 2
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, num_groups, GROUPS):
        byte = first * HALF + tl.arange(0, GROUPS * HALF)
        is_byte = byte < num_bytes
        low_column = byte // HALF * (2 * HALF) + byte % HALF
        rows_at = rows_ptr + token[:, None] * rows_stride + low_column[None, :]
        is_row = is_token[:, None] & is_byte[None, :]
        low_rows = tl.load(rows_at, mask=is_row, other=0.0)  # [BLOCK_M, GROUPS * HALF]
        high_rows = tl.load(rows_at + HALF, mask=is_row, other=0.0)
        codes = tl.load(
            codes_ptr + output[None, :] * num_bytes + byte[:, None],
            mask=is_byte[:, None] & is_output[None, :],
            other=0,
        )  # [GROUPS * HALF, BLOCK_N]
        group = first + tl.arange(0, GROUPS)
        scale_at = output[None, :] * num_groups + group[:, None]
        is_scale = (group < num_groups)[:, None] & is_output[None, :]
        scales = tl.load(scales_ptr + scale_at, mask=is_scale, other=0.0).to(tl.float32)[:, None, :]
        minimums = tl.load(minimums_ptr + scale_at, mask=is_scale, other=0.0).to(tl.float32)[:, None, :]
        if UPCAST:
            low_rows = low_rows.to(tl.float32)
            high_rows = high_rows.to(tl.float32)
        codes = tl.reshape(codes, [GROUPS, HALF, BLOCK_N])
        acc = tl.dot(low_rows, _values(codes & 15, scales, minimums, low_rows.dtype), acc, input_precision="ieee")
        acc = tl.dot(high_rows, _values(codes >> 4, scales, minimums, low_rows.dtype), acc, input_precision="ieee")
    target = token[:, None] * out_features + output[None, :]
    tl.store(out_ptr + target, acc.to(out_ptr.dtype.element_ty), mask=is_token[:, None] & is_output[None, :])


def quant_matmul(
    rows: torch.Tensor,  # [num_tokens, in_features]
    codes: torch.Tensor,  # [out_features, in_features] int8 or [out_features, in_features // 2] uint8
    scales: torch.Tensor,  # [out_features] or [out_features, num_groups]
    minimums: torch.Tensor | None,  # [out_features, num_groups]
    tile: Tile | None = None,
) -> torch.Tensor:  # [num_tokens, out_features]
    """See the package's docstring. tile: None chooses one."""
    num_tokens, in_features = rows.shape
    out_features = codes.shape[0]
    out = torch.empty(num_tokens, out_features, dtype=rows.dtype, device=rows.device)
    if not out.numel():
        return out
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    tile = tile or choose_tile(num_tokens, is_int4=minimums is not None)
    sizes = (num_tokens, out_features, in_features, rows.stride(0))
    grid = (triton.cdiv(num_tokens, tile.block_m), triton.cdiv(out_features, tile.block_n))
    options = {
        "UPCAST": rows.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1",
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    scales = scales.contiguous()
    if minimums is None:
        int8_matmul_kernel[grid](rows, codes, scales, out, *sizes, BLOCK_K=tile.block_k, **options)
        return out
    half = codes.shape[1] // scales.shape[1]
    groups = tile.block_k // (2 * half)
    minimums = minimums.contiguous()
    int4_matmul_kernel[grid](rows, codes, scales, minimums, out, *sizes, HALF=half, GROUPS=groups, **options)
    return out
