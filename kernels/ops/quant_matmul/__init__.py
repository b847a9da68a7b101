"""Rows times a weight that is stored in 8 or 4 bits: weight-only quantisation, the rows keep their type.

    out[row, o] = sum over i of rows[row, i] * weight[o, i]
    8 bits:  weight[o, i] = scales[o] * codes[o, i]                                 one scale per output channel
    4 bits:  weight[o, i] = scales[o, g] * code(o, i) + minimums[o, g],  g = i // group_size,  code in 0 .. 15

codes of 4 bits lie two in a byte (packing.py draws it), as GGUF's Q4_0 and Q4_1 have them. Sums are formed in float32.

Knows no model. Only its packing is used yet (models/grouped.py), the product is not. Twin in vLLM: the
weight-only schemes in model_executor/layers/quantization (compressed_tensors, gguf.py) and their Marlin kernels.
"""

from types import ModuleType

import torch

from minivllm.kernels.dispatch import choose
from minivllm.kernels.quant_matmul import reference
from minivllm.kernels.quant_matmul.packing import (
    GROUP_SIZES,
    from_q4_0,
    from_q4_1,
    pack_int4,
    quantise_int4,
    quantise_int8,
    unpack_int4,
)

__all__ = [
    "GROUP_SIZES",
    "from_q4_0",
    "from_q4_1",
    "pack_int4",
    "quant_matmul",
    "quantise_int4",
    "quantise_int8",
    "unpack_int4",
]


def quant_matmul(
    rows: torch.Tensor,  # [num_tokens, in_features] bf16, fp16 or fp32
    codes: torch.Tensor,  # [out_features, in_features] int8, or [out_features, in_features // 2] uint8: 4 bits
    scales: torch.Tensor,  # [out_features], or with 4 bits [out_features, num_groups]; fp16 or fp32
    minimums: torch.Tensor | None = None,  # [out_features, num_groups] as scales, with 4 bits only
    *,
    impl: str = "auto",
) -> torch.Tensor:  # [num_tokens, out_features]
    """The product in the rows' type. With 4 bits in_features is a multiple of the group size, which is one of
    GROUP_SIZES. Raises ValueError naming both sides where arguments do not fit.

    On a CPU the reference is the only implementation: dequantise, then torch's product.
    """
    _check(rows, codes, scales, minimums)
    return _implementation(impl, rows).quant_matmul(rows, codes, scales, minimums)


def _check(
    rows: torch.Tensor,  # [num_tokens, in_features]
    codes: torch.Tensor,  # [out_features, in_features or in_features // 2]
    scales: torch.Tensor,  # [out_features] or [out_features, num_groups]
    minimums: torch.Tensor | None,  # [out_features, num_groups]
) -> None:
    if codes.dtype not in (torch.int8, torch.uint8) or codes.ndim != 2 or not codes.is_contiguous():
        raise ValueError(
            f"codes: expected contiguous [out_features, in_features] int8 or [out_features, in_features // 2] uint8, "
            f"got {list(codes.shape)} {codes.dtype}, contiguous {codes.is_contiguous()}"
        )
    has_groups = codes.dtype == torch.uint8
    in_features = codes.shape[1] * (2 if has_groups else 1)
    if rows.ndim != 2 or rows.shape[1] != in_features or not rows.is_floating_point():
        raise ValueError(
            f"rows: expected [num_tokens, {in_features}] of a floating-point type as codes {list(codes.shape)} "
            f"{codes.dtype}, got {list(rows.shape)} {rows.dtype}"
        )
    if has_groups:
        _check_groups(codes, scales, minimums)
    elif minimums is not None or scales.shape != codes.shape[:1]:
        raise ValueError(
            f"scales, minimums: expected [{codes.shape[0]}] and None for int8 codes {list(codes.shape)}, got "
            f"{list(scales.shape)} and {None if minimums is None else list(minimums.shape)}"
        )
    if scales.dtype not in (torch.float16, torch.float32):
        raise ValueError(f"scales: expected float16 or float32, got {scales.dtype}")


def _check_groups(
    codes: torch.Tensor,  # [out_features, in_features // 2]
    scales: torch.Tensor,  # [out_features, num_groups]
    minimums: torch.Tensor | None,  # [out_features, num_groups]
) -> None:
    shapes = [[codes.shape[0], 2 * codes.shape[1] // size] for size in GROUP_SIZES if 2 * codes.shape[1] % size == 0]
    if list(scales.shape) not in shapes:
        raise ValueError(
            f"scales: expected one of {shapes} for codes {list(codes.shape)} in groups of "
            f"{', '.join(map(str, GROUP_SIZES))}, got {list(scales.shape)}"
        )
    if minimums is None or minimums.shape != scales.shape or minimums.dtype != scales.dtype:
        got = "None" if minimums is None else f"{list(minimums.shape)} {minimums.dtype}"
        raise ValueError(f"minimums: expected {list(scales.shape)} {scales.dtype} as scales, got {got}")


def _implementation(impl: str, rows: torch.Tensor) -> ModuleType:  # [num_tokens, in_features]
    if choose(impl, rows) == "triton":
        from minivllm.kernels.quant_matmul import kernel  # only here: triton is not everywhere

        return kernel
    return reference
