"""What rms_norm means, in plain torch. Called through `impl="reference"` and by tests."""

import torch


def rms_norm(
    x: torch.Tensor,  # [..., size]
    weight: torch.Tensor,  # [size]
    eps: float,
    residual: torch.Tensor | None,  # [..., size]
    add_one: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # out and s, both [..., size]
    """See the package's docstring."""
    total = x if residual is None else x + residual
    wide = torch.promote_types(x.dtype, torch.float32)
    values, scale = total.to(wide), weight.to(wide)
    mean_square = (values * values).sum(dim=-1, keepdim=True) / x.shape[-1]  # [..., 1]
    normed = values / torch.sqrt(mean_square + eps)
    return (normed * (1 + scale if add_one else scale)).to(x.dtype), total
