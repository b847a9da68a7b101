"""Quantised weights and rows for quant_matmul, in every way to store them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from minivllm.kernels.quant_matmul import quant_matmul, quantise_int4, quantise_int8
from tests.kernels.helpers import random_values

KINDS = ("int8", "int4 in 32", "int4 in 64", "int4 in 128")


class Product(NamedTuple):
    """The arguments of one call."""

    rows: torch.Tensor  # [num_tokens, in_features]
    codes: torch.Tensor  # [out_features, in_features] int8 or [out_features, in_features // 2] uint8
    scales: torch.Tensor  # [out_features] or [out_features, num_groups]
    minimums: torch.Tensor | None  # [out_features, num_groups]

    def run(self, impl: str) -> torch.Tensor:  # [num_tokens, out_features]
        """quant_matmul of these."""
        return quant_matmul(*self, impl=impl)

    def double(self) -> Product:
        """The same product with rows in float64, so that the reference computes exactly."""
        return self._replace(rows=self.rows.double())


def make_product(
    kind: str,
    num_tokens: int,
    in_features: int,
    out_features: int,
    dtype: torch.dtype = torch.float32,
    scale_dtype: torch.dtype = torch.float32,
) -> Product:
    """Normal rows and weights; every output channel has a size of its own."""
    rows = random_values(num_tokens, in_features, dtype=dtype, seed=1)
    weight = random_values(out_features, in_features, dtype=torch.float32, seed=2)
    weight *= torch.linspace(0.01, 2.0, out_features)[:, None]
    if kind == "int8":
        codes, scales = quantise_int8(weight)
        return Product(rows, codes, scales.to(scale_dtype), None)
    codes, scales, minimums = quantise_int4(weight, int(kind.rsplit(" ", 1)[1]))
    return Product(rows, codes, scales.to(scale_dtype), minimums.to(scale_dtype))
