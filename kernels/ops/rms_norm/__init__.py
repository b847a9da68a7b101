"""Root-mean-square norm over the last dimension, with the residual addition that precedes it in every decoder layer.

    s   = x + residual                                   (s = x without a residual), rounded to x's dtype
    out = s / sqrt(mean(s * s) + eps) * w,   w = weight, or 1 + weight (Gemma)

All of `out` is computed in fp32 (fp64 for fp64) and rounded once. Each row depends on itself alone, bit for bit.
Called by models/layers.py. Twin in vLLM: model_executor/layers/layernorm.py and csrc/layernorm_kernels.cu.
"""

from types import ModuleType
from typing import overload

import torch

from minivllm.kernels.dispatch import choose
from minivllm.kernels.jit import supports
from minivllm.kernels.rms_norm import cpu, reference

__all__ = ["rms_norm"]


@overload
def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, add_one: bool = False, impl: str = "auto"
) -> torch.Tensor: ...


@overload
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor,
    add_one: bool = False,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]: ...


def rms_norm(
    x: torch.Tensor,  # [..., size]
    weight: torch.Tensor,  # [size]
    eps: float,
    *,
    residual: torch.Tensor | None = None,  # as x
    add_one: bool = False,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Returns `out` [..., size]; with a residual (out, s), both [..., size]. Changes no argument.

    Raises ValueError naming both sides where shapes or dtypes do not fit.
    """
    if weight.shape != x.shape[-1:] or weight.dtype != x.dtype:
        raise ValueError(
            f"weight: expected [{x.shape[-1]}] {x.dtype} as x {list(x.shape)}, got {list(weight.shape)} {weight.dtype}"
        )
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual: expected {list(x.shape)} {x.dtype} as x, got {list(residual.shape)} {residual.dtype}"
        )
    out, total = _implementation(impl, x).rms_norm(x, weight, eps, residual, add_one)
    return out if residual is None else (out, total)


def _implementation(impl: str, x: torch.Tensor) -> ModuleType:  # [...]
    chosen = choose(impl, x)
    if chosen == "triton":
        from minivllm.kernels.rms_norm import kernel  # only here: triton is not everywhere

        return kernel
    return cpu if chosen == "cpu" and supports(x) else reference
