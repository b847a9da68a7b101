"""A model's step as one call: from its modules to the table of weights that kernels/ops/decoder_step takes.

The modules stay what the model is: they load the weights, serve hooks, and say here what they hold. The call is for
speed, most of all where starting an operation takes as long as the operation. Its numbers are theirs.

Only for what it knows: decoders of llama.py's shape whose layers are all alike, in bfloat16, on a CPU with AMX. There
is none for any other, nor with batch invariance, weights in 8 bits or quantised caches. Several ranks have one where
they share memory, and where all of them can.

Called by worker/cpu.py. Twin in vLLM: none; on a GPU its CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from minivllm.kernels.decoder_step import DecoderLayer, DecoderShape, DecoderWeights, is_fast_for
from minivllm.models import onednn
from minivllm.models.layers import Attention, GatedMLP, KVCache, RMSNorm
from minivllm.models.linear import FORMATS, Linear
from minivllm.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from minivllm.models.parallel import TensorParallel
from minivllm.models.quantised import IN_STRIPS

WIDTH = 32  # every width is a multiple


def decoder_weights(model: torch.nn.Module, kv_caches: Sequence[KVCache]) -> DecoderWeights | None:
    """The table, or None where the modules must compute every step. Every rank of a model must call this."""
    weights = _own_weights(model, kv_caches)
    parallel = model.model.norm.options.parallel if isinstance(model, LlamaForCausalLM) else None
    if parallel is None or parallel.collectives.meeting is None:
        return weights
    votes = torch.tensor([float(weights is not None)])  # [1]; a rank's widths are its own
    return weights if parallel.collectives.all_reduce(votes) == parallel.size else None


def _own_weights(model: torch.nn.Module, kv_caches: Sequence[KVCache]) -> DecoderWeights | None:
    """Of this rank."""
    if not isinstance(model, LlamaForCausalLM) or not kv_caches:
        return None
    layers: list[Any] = list(model.model.layers)
    shapes = {_shape_of(layer) for layer in layers}
    shape = shapes.pop()
    if shape is None or shapes or list(model.ropes) != ["default"] or not _is_usual(model, kv_caches):
        return None
    packed = [linear for layer in layers for linear in _linears(layer)]
    sizes = {(linear.out_features, linear.in_features) for linear in packed if linear._format is FORMATS["packed"]}
    if not all(onednn.is_in_strips(size) for size in sizes):
        return None
    table = tuple(_layer(layer, cache) for layer, cache in zip(layers, kv_caches, strict=True))
    parallel = model.model.norm.options.parallel
    return DecoderWeights(table, model.model.norm.weight, shape, parallel and parallel.collectives.meeting)


def _linears(layer: Any) -> tuple[Linear, ...]:
    return layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj


def _shape_of(layer: Any) -> DecoderShape | None:
    """None for a layer that computes anything else than Llama's."""
    is_llama = type(layer).forward is LlamaDecoderLayer.forward
    if not is_llama or type(layer.self_attn) is not Attention or type(layer.mlp) is not GatedMLP:
        return None
    attention, mlp = layer.self_attn, layer.mlp
    config = attention.config
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [norm for norm in (attention.q_norm, attention.k_norm) if norm is not None]
    if any(type(norm) is not RMSNorm or norm.add_one or norm.eps != norms[0].eps for norm in norms):
        return None
    if mlp.activation != "silu" or config.soft_cap is not None:
        return None
    return DecoderShape(
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_size=config.head_size,
        intermediate_size=mlp.down_proj.in_features,
        eps=norms[0].eps,
        scale=config.scale,
        sliding_window=config.sliding_window,
        head_shares=attention.head_shares,
    )


def _is_usual(model: LlamaForCausalLM, kv_caches: Sequence[KVCache]) -> bool:
    options = model.model.norm.options
    return (
        options.dtype == torch.bfloat16
        and options.device.type == "cpu"
        and options.impl in ("auto", "cpu")
        and (options.parallel is None or _can_meet(options.parallel, model.model.norm.weight.numel()))
        and not options.batch_invariant
        and all(is_fast_for(cache) for caches in kv_caches for cache in caches)
        and type(model.model.norm) is RMSNorm
        and all(_is_in_strips(linear) for layer in model.model.layers for linear in _linears(layer))
    )


def _can_meet(parallel: TensorParallel, hidden_size: int) -> bool:
    meeting = parallel.collectives.meeting
    return meeting is not None and meeting.fits(hidden_size)


def _is_in_strips(linear: Linear) -> bool:
    """Or oneDNN's packed weight, that may be."""
    fits = linear.in_features % WIDTH == 0 and linear.out_features % WIDTH == 0
    return fits and linear._format in (FORMATS["packed"], FORMATS[IN_STRIPS])


def _layer(layer: Any, kv_cache: KVCache) -> DecoderLayer:
    attention = layer.self_attn
    linears = dict(zip(("qkv", "o", "gate_up", "down"), _linears(layer), strict=True))
    return DecoderLayer(
        input_norm=layer.input_layernorm.weight,
        post_norm=layer.post_attention_layernorm.weight,
        q_norm=None if attention.q_norm is None else attention.q_norm.weight,
        k_norm=None if attention.k_norm is None else attention.k_norm.weight,
        k_cache=kv_cache[0],
        v_cache=kv_cache[1],
        **{name: _strips(linear) for name, linear in linears.items()},
        **{f"{name}_levels": linear.weight.levels for name, linear in linears.items() if _is_int4(linear)},
        **{f"{name}_bias": linear.bias for name, linear in linears.items()},
    )


def _is_int4(linear: Linear) -> bool:
    return linear._format is FORMATS[IN_STRIPS]


def _strips(linear: Linear) -> torch.Tensor:  # [out_features / 32, in_features / 2, 32, 2], or without the 2
    return linear.weight.codes if _is_int4(linear) else onednn.strips(linear.weight)
