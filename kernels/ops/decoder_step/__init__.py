"""All layers of a Llama-shaped decoder for the rows of a step, in one call.

    per layer: residual += hidden; hidden = attention(norm(residual)); residual += hidden; hidden = mlp(norm(residual))
    out        norm(residual + hidden)

with the attention and MLP of models/llama.py: qkv in one product; biases, and norms on the heads of q and k, or not;
rotary positions; the paged cache; a silu gate. The values are those of the single operations, rounded where they round.

Called by worker/cpu.py, with the weights from models/whole_step.py. Twin in vLLM: none; on a GPU its CUDA graphs.
"""

from __future__ import annotations

from types import ModuleType

import torch

from minivllm.kernels.decoder_step import cpu, reference
from minivllm.kernels.decoder_step.meeting import COUNTER_BYTES, Meeting
from minivllm.kernels.decoder_step.weights import PARTS, DecoderLayer, DecoderShape, DecoderWeights
from minivllm.kernels.dispatch import choose
from minivllm.kernels.paged_attention.cpu_rows_amx import can_use_amx
from minivllm.kernels.paged_attention.metadata import AttentionMetadata, validate_metadata

__all__ = [
    "COUNTER_BYTES",
    "PARTS",
    "DecoderLayer",
    "DecoderShape",
    "DecoderWeights",
    "Meeting",
    "decoder_step",
    "is_fast_for",
]


def is_fast_for(cache: torch.Tensor) -> bool:  # [num_kv_heads, num_blocks, block_size, head_size]
    """Whether there is more than the reference: on a CPU with AMX, for a model whose caches are like this."""
    return can_use_amx(cache.dtype, cache.shape[-1])


def decoder_step(
    hidden_states: torch.Tensor,  # [num_tokens, hidden_size] bfloat16, the embedding; spent
    cos: torch.Tensor,  # [num_tokens, head_size] fp32
    sin: torch.Tensor,  # [num_tokens, head_size] fp32
    weights: DecoderWeights,
    metadata: AttentionMetadata,
    *,
    impl: str = "auto",
) -> torch.Tensor:  # [num_tokens, hidden_size]
    """Returns the normed hidden states and writes the tokens' keys and values into the caches of the layers.

    Raises ValueError naming both sides where arguments do not fit, before anything is written; with a meeting, what its
    `wait` raises.
    """
    shape, num_tokens = weights.shape, metadata.query_start_loc[-1]
    sizes = {"hidden_states": shape.hidden_size, "cos": shape.head_size, "sin": shape.head_size}
    for (name, size), tensor in zip(sizes.items(), (hidden_states, cos, sin), strict=True):
        if tuple(tensor.shape) != (num_tokens, size):
            raise ValueError(f"{name}: expected {[num_tokens, size]}, got {list(tensor.shape)}")
    _, num_blocks, block_size, _ = weights.layers[0].k_cache.shape
    if metadata.plan is None:
        validate_metadata(metadata, num_blocks=num_blocks)
    lowest, highest = (int(bound) for bound in torch.aminmax(metadata.slot_mapping))
    if lowest < -1 or highest >= num_blocks * block_size:
        wrong = lowest if lowest < -1 else highest
        raise ValueError(f"slot_mapping: expected slots in [-1, {num_blocks * block_size}), got {wrong}")
    module: ModuleType = (
        cpu if is_fast_for(weights.layers[0].k_cache) and choose(impl, hidden_states) == "cpu" else reference
    )
    out: torch.Tensor = module.decoder_step(hidden_states, cos, sin, weights, metadata)
    return out
