"""Rotary positions: every pair of values of a head is turned by an angle that grows with the token's position.

    out[i] = x[i] * cos[i] + x[(i + head_size/2) mod head_size] * sin[i]

The pair of value i is half a head away (the GPT-NeoX layout, which Hugging Face checkpoints use). `sin` carries the
sign of the rotation: minus in the first half. Computed in fp32 (fp64 for fp64), rounded once.
Called by models/layers.py, whose RotaryEmbedding makes the angles. Twin in vLLM: model_executor/layers/
rotary_embedding/ and csrc/pos_encoding_kernels.cu.
"""

from types import ModuleType

import torch

from minivllm.kernels.dispatch import choose
from minivllm.kernels.jit import supports
from minivllm.kernels.rotary_embedding import cpu, reference

__all__ = ["rotary_embedding"]


def rotary_embedding(
    query: torch.Tensor,  # [num_tokens, num_heads, head_size]
    key: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
    cos: torch.Tensor,  # [num_tokens, head_size] fp32 or fp64: both halves equal
    sin: torch.Tensor,  # [num_tokens, head_size] as cos: the first half is minus the second
    *,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:  # as query, as key
    """The rotated queries and keys; the arguments stay as they are. ValueError naming both sides for bad shapes."""
    num_tokens, _, head_size = query.shape
    if key.shape[0] != num_tokens or key.shape[2] != head_size or head_size % 2:
        raise ValueError(
            f"query, key: expected [num_tokens, heads, head_size] with equal num_tokens and even head_size, "
            f"got {list(query.shape)} and {list(key.shape)}"
        )
    if cos.shape != (num_tokens, head_size) or sin.shape != cos.shape:
        raise ValueError(
            f"cos, sin: expected [{num_tokens}, {head_size}] as query {list(query.shape)}, "
            f"got {list(cos.shape)} and {list(sin.shape)}"
        )
    rotate = _implementation(impl, query).rotate
    return rotate(query, cos, sin), rotate(key, cos, sin)


def _implementation(impl: str, x: torch.Tensor) -> ModuleType:  # [...]
    chosen = choose(impl, x)
    if chosen == "triton":
        from minivllm.kernels.rotary_embedding import kernel  # only here: triton is not everywhere

        return kernel
    return cpu if chosen == "cpu" and supports(x) else reference
