"""What a product with quantised weights means: dequantise, then multiply. Called through `impl="reference"`, on CPUs,
and by tests.

Twin in vLLM: tests/kernels/quantization (the dequantised products that its kernels are compared with).
"""

import torch

from minivllm.kernels.quant_matmul.packing import unpack_int4


def quant_matmul(
    rows: torch.Tensor,  # [num_tokens, in_features]
    codes: torch.Tensor,  # [out_features, in_features] int8 or [out_features, in_features // 2] uint8
    scales: torch.Tensor,  # [out_features] or [out_features, num_groups]
    minimums: torch.Tensor | None,  # [out_features, num_groups]
) -> torch.Tensor:  # [num_tokens, out_features]
    """See the package's docstring. Weights are computed in float32 at least and rounded to the rows' type."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    return rows @ _dequantise(codes, scales, minimums, wide).to(rows.dtype).T


def _dequantise(
    codes: torch.Tensor,  # [out_features, in_features] int8 or [out_features, in_features // 2] uint8
    scales: torch.Tensor,  # [out_features] or [out_features, num_groups]
    minimums: torch.Tensor | None,  # [out_features, num_groups]
    dtype: torch.dtype,
) -> torch.Tensor:  # [out_features, in_features]
    if minimums is None:
        return codes.to(dtype) * scales.to(dtype)[:, None]
    num_groups = scales.shape[1]
    groups = unpack_int4(codes, 2 * codes.shape[1] // num_groups).to(dtype).unflatten(1, (num_groups, -1))
    return (groups * scales.to(dtype)[..., None] + minimums.to(dtype)[..., None]).flatten(1)
