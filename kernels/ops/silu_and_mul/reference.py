"""What silu_and_mul means, in plain torch. Called through `impl="reference"` and by tests."""

import math

import torch


def silu_and_mul(
    x: torch.Tensor,  # [..., 2 * size]
    activation: str,
) -> torch.Tensor:  # [..., size]
    """See the package's docstring. Computes in fp32 (fp64 for fp64), rounds once."""
    gate, up = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    if activation == "silu":
        gated = gate / (1 + torch.exp(-gate))
    else:
        gated = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    return (gated * up).to(x.dtype)
