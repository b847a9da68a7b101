"""What decoder_step means: the references of its operations, one after the other. Called through `impl="reference"` and
by tests. Twin in vLLM: none."""

from __future__ import annotations

import torch

from minivllm.kernels.decoder_step.weights import DecoderWeights
from minivllm.kernels.packed_matmul.reference import packed_matmul
from minivllm.kernels.paged_attention.metadata import AttentionMetadata
from minivllm.kernels.paged_attention.reference import paged_attention
from minivllm.kernels.reshape_and_cache.reference import write
from minivllm.kernels.rms_norm.reference import rms_norm
from minivllm.kernels.rotary_embedding.reference import rotate
from minivllm.kernels.silu_and_mul.reference import silu_and_mul


def decoder_step(
    hidden_states: torch.Tensor,  # [num_tokens, hidden_size]
    cos: torch.Tensor,  # [num_tokens, head_size]
    sin: torch.Tensor,  # [num_tokens, head_size]
    weights: DecoderWeights,
    metadata: AttentionMetadata,
) -> torch.Tensor:  # [num_tokens, hidden_size]
    """See the package's docstring. Any dtype up to float64."""
    shape = weights.shape
    widths = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    qkv_size = sum(widths) * shape.head_size
    all_reduce = (lambda part: part) if weights.meeting is None else weights.meeting.all_reduce
    residual = None
    for layer in weights.layers:
        normed, residual = rms_norm(hidden_states, layer.input_norm, shape.eps, residual, False)
        qkv = packed_matmul(normed, layer.qkv, layer.qkv_bias, qkv_size, layer.qkv_levels)  # [num_tokens, qkv_size]
        query, key, value = qkv.view(len(qkv), -1, shape.head_size).split(widths, dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            query, _ = rms_norm(query, layer.q_norm, shape.eps, None, False)
            key, _ = rms_norm(key, layer.k_norm, shape.eps, None, False)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        write(key, value, layer.k_cache, layer.v_cache, metadata.slot_mapping, None, None)
        attended = paged_attention(
            query,
            layer.k_cache,
            layer.v_cache,
            metadata,
            scale=shape.scale,
            sliding_window=shape.sliding_window,
            soft_cap=None,
            alibi_slopes=None,
            head_shares=shape.head_shares,
        )
        own = packed_matmul(attended.flatten(1), layer.o, layer.o_bias, shape.hidden_size, layer.o_levels)
        normed, residual = rms_norm(all_reduce(own), layer.post_norm, shape.eps, residual, False)
        gate_up = packed_matmul(
            normed, layer.gate_up, layer.gate_up_bias, 2 * shape.intermediate_size, layer.gate_up_levels
        )
        gated = silu_and_mul(gate_up, "silu")
        own = packed_matmul(gated, layer.down, layer.down_bias, shape.hidden_size, layer.down_levels)
        hidden_states = all_reduce(own)
    return rms_norm(hidden_states, weights.last_norm, shape.eps, residual, False)[0]
