"""silu_and_mul with torch's fused activations. Called by the package on CPU tensors."""

import torch
from torch.nn import functional as F


def silu_and_mul(
    x: torch.Tensor,  # [..., 2 * size]
    activation: str,
) -> torch.Tensor:  # [..., size]
    """The halves are views; the product is written over the activated gate. In bf16 the gate is rounded in between,
    as transformers does."""
    gate, up = x.chunk(2, dim=-1)
    gated = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return gated.mul_(up)
