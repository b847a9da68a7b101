"""rms_norm through torch's fused norm. Called by the package on CPU tensors."""

import torch
from torch.nn import functional as F


def rms_norm(
    x: torch.Tensor,  # [..., size]
    weight: torch.Tensor,  # [size]
    eps: float,
    residual: torch.Tensor | None,  # [..., size]
    add_one: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # out and s, both [..., size]
    """One call that widens, sums and scales; Gemma's 1 + weight needs fp32 of its own, because bf16 would lose w."""
    total = x if residual is None else x + residual
    if not add_one:
        return F.rms_norm(total, weight.shape, weight, eps), total
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(total.to(wide), weight.shape, weight.to(wide) + 1, eps).to(x.dtype), total
