"""What decoder_step computes with: the weights of every layer and the numbers that the layers share.

Knows no step. Made by models/whole_step.py. Twin in vLLM: none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from minivllm.kernels.decoder_step.meeting import Meeting
from minivllm.kernels.paged_attention.metadata import HeadShares

# What the cycles of the layers are counted for, and its place in the count.
PARTS = ("norms", "products", "rotation", "attention", "sums")  # the last: over the ranks, waiting included
NORMS, PRODUCTS, ROTATION, ATTENTION, SUMS = range(len(PARTS))


@dataclass(frozen=True)
class DecoderShape:
    """Every width is a multiple of 32."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate_size: int
    eps: float  # of all norms
    scale: float  # of query . key
    sliding_window: int | None = None  # tokens, the current one included
    head_shares: HeadShares | None = None  # as paged_attention's

    @property
    def qkv_size(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_size


@dataclass(frozen=True)
class DecoderLayer:
    """bfloat16 or codes; matrices as strips (packed_matmul), and the layer's caches."""

    input_norm: torch.Tensor  # [hidden_size]
    post_norm: torch.Tensor  # [hidden_size]
    q_norm: torch.Tensor | None  # [head_size]
    k_norm: torch.Tensor | None  # [head_size]
    k_cache: torch.Tensor  # [num_kv_heads, num_blocks, block_size, head_size]
    v_cache: torch.Tensor  # [num_kv_heads, num_blocks, block_size, head_size]
    qkv: torch.Tensor  # strips of [qkv_size, hidden_size]
    o: torch.Tensor  # strips of [hidden_size, num_heads * head_size]
    gate_up: torch.Tensor  # strips of [2 * intermediate_size, hidden_size]
    down: torch.Tensor  # strips of [hidden_size, intermediate_size]
    qkv_bias: torch.Tensor | None = None  # [qkv_size]
    o_bias: torch.Tensor | None = None  # [hidden_size]
    gate_up_bias: torch.Tensor | None = None  # [2 * intermediate_size]
    down_bias: torch.Tensor | None = None  # [hidden_size]
    # for matrices in 4 bits, whose strips then are codes
    qkv_levels: torch.Tensor | None = None  # [qkv_size / 32, hidden_size / 32, 2, 32] fp16
    o_levels: torch.Tensor | None = None  # [hidden_size / 32, num_heads * head_size / 32, 2, 32]
    gate_up_levels: torch.Tensor | None = None  # [2 * intermediate_size / 32, hidden_size / 32, 2, 32]
    down_levels: torch.Tensor | None = None  # [hidden_size / 32, intermediate_size / 32, 2, 32]


@dataclass(frozen=True)
class DecoderWeights:
    """A model but for its embedding, its positions and its head."""

    layers: tuple[DecoderLayer, ...]
    last_norm: torch.Tensor  # [hidden_size]
    shape: DecoderShape
    meeting: Meeting | None = None  # with the other ranks, where each layer is a part of it; o and down are then summed
    cycles: np.ndarray = field(default_factory=lambda: np.zeros(len(PARTS), np.int64))  # [num_parts], so far

    @cached_property
    def addresses(self) -> np.ndarray:
        """[num_layers, 18] int64: where each tensor of a layer lies, in the order of its fields; 0 for None."""
        rows = [[getattr(layer, name) for name in layer.__dataclass_fields__] for layer in self.layers]
        return np.array([[0 if tensor is None else tensor.data_ptr() for tensor in row] for row in rows], np.int64)
