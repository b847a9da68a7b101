"""Chooses the implementation of an operation.

Knows only names and devices, not what an operation does. Called by every `kernels/ops/<op>/__init__.py`.
A new implementation is one more name in IMPLS and one more line in `choose`. Twin in vLLM: platforms/interface.py.
"""

import torch

IMPLS = ("auto", "reference", "cpu")


def choose(impl: str, tensor: torch.Tensor) -> str:
    """The implementation to run for `tensor` (any shape; only its device counts).

    "auto" is the fastest one for the tensor's device. Raises ValueError for an unknown name, and for "cpu" with a
    tensor that lives elsewhere.
    """
    if impl == "auto":
        return "cpu" if tensor.device.type == "cpu" else "reference"
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {', '.join(IMPLS)}, got {impl!r}")
    if impl == "cpu" and tensor.device.type != "cpu":
        raise ValueError(f"impl: 'cpu' needs tensors on the CPU, got a tensor on {tensor.device}; use 'auto'")
    return impl
