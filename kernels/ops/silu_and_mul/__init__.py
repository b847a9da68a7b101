"""The gate of a gated MLP: activation(gate) * up, where gate and up are the two halves of one row.

    out[i] = activation(x[i]) * x[size + i]          silu(g) = g / (1 + exp(-g));  gelu in its tanh form

gate_proj and up_proj are one matrix product, so their outputs lie side by side. Every value depends on two values.
Called by models/layers.py. Twin in vLLM: model_executor/layers/activation.py and csrc/activation_kernels.cu.
"""

from types import ModuleType

import torch

from minivllm.kernels.dispatch import choose
from minivllm.kernels.jit import supports
from minivllm.kernels.silu_and_mul import cpu, reference

__all__ = ["ACTIVATIONS", "silu_and_mul"]

ACTIVATIONS = ("silu", "gelu_tanh")


def silu_and_mul(
    x: torch.Tensor,  # [..., 2 * size]: gate, then up
    *,
    activation: str = "silu",
    impl: str = "auto",
) -> torch.Tensor:  # [..., size]
    """Raises ValueError for an odd width or an unknown activation."""
    if x.shape[-1] % 2:
        raise ValueError(f"x: expected an even last dimension (gate and up side by side), got {list(x.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    return _implementation(impl, x).silu_and_mul(x, activation)


def _implementation(impl: str, x: torch.Tensor) -> ModuleType:  # [...]
    chosen = choose(impl, x)
    if chosen == "triton":
        from minivllm.kernels.silu_and_mul import kernel  # only here: triton is not everywhere

        return kernel
    return cpu if chosen == "cpu" and supports(x) else reference
