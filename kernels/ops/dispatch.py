"""Chooses the implementation of an operation.

Knows only names and devices, not what an operation does. Called by every `kernels/ops/<op>/__init__.py`.
A new implementation is one more name in IMPLS and one more line in `choose`. Twin in vLLM: platforms/interface.py.
"""

import os

import torch

IMPLS = ("auto", "reference", "cpu", "triton")


def choose(impl: str, tensor: torch.Tensor) -> str:
    """The implementation to run for `tensor` (any shape; only its device counts).

    "auto" is the fastest one for the tensor's device. Raises ValueError for an unknown name, for "cpu" with a tensor
    that lives elsewhere, and for "triton" with a tensor that it cannot take.
    """
    if impl == "auto":
        return {"cpu": "cpu", "cuda": "triton"}.get(tensor.device.type, "reference")  # AMD's GPUs are "cuda" too
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {', '.join(IMPLS)}, got {impl!r}")
    if impl == "cpu" and tensor.device.type != "cpu":
        raise ValueError(f"impl: 'cpu' needs tensors on the CPU, got a tensor on {tensor.device}; use 'auto'")
    if impl == "triton":
        _check_triton(tensor)
    return impl


def _check_triton(tensor: torch.Tensor) -> None:  # [...]
    """Triton's kernels compute in fp32; on a CPU they run only under Triton's interpreter, which is read at import."""
    if tensor.dtype == torch.float64:
        raise ValueError("impl: 'triton' computes in float32, got float64 tensors; use 'reference'")
    if tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("impl: 'triton' needs a GPU, or TRITON_INTERPRET=1 set before Python starts; use 'cpu'")


def warp_size(tensor: torch.Tensor) -> int:  # [...]
    """Threads that a GPU runs in step: 64 on AMD's, 32 on the others (and where none is asked)."""
    return 64 if tensor.device.type == "cuda" and torch.version.hip else 32
