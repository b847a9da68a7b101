"""What decoder layers are made of: norms, rotary positions, the gated MLP, the attention block.

A forward step sees one flat row per token, whatever requests the tokens belong to. Only attention mixes rows; it
learns from its AttentionMetadata argument which rows belong together and where their keys and values are kept.

Knows no architecture, no scheduler, no sampling. Called by: models/llama.py, qwen.py, gemma.py, bert.py. Twin in
vLLM: vllm/model_executor/layers/{layernorm,activation,rotary_embedding}.py and vllm/attention/layer.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from minivllm.errors import ConfigError
from minivllm.kernels.paged_attention import AttentionMetadata, paged_attention
from minivllm.kernels.reshape_and_cache import reshape_and_cache
from minivllm.kernels.rms_norm import rms_norm
from minivllm.kernels.rotary_embedding import rotary_embedding
from minivllm.kernels.silu_and_mul import silu_and_mul
from minivllm.models.linear import Embedding, Linear, ModelOptions, TiedEmbedding, row_parallel
from minivllm.models.weights import WeightSlot

__all__ = [
    "Attention", "AttentionConfig", "Embedding", "GatedMLP", "KVCache", "KVCacheSpec", "LayerNorm", "Linear",
    "ModelOptions", "RMSNorm", "Rope", "RotaryEmbedding", "TiedEmbedding", "head_size_of", "soft_cap",
]  # fmt: skip

KVCache = tuple[torch.Tensor, torch.Tensor]  # k_cache, v_cache: [num_kv_heads, num_blocks, block_size, head_size]
Rope = tuple[torch.Tensor, torch.Tensor]  # cos, sin: [num_tokens, head_size] fp32, as rotary_embedding takes them


@dataclass(frozen=True)
class KVCacheSpec:
    """What one attention layer keeps per token: 2 x num_kv_heads x head_size values."""

    num_kv_heads: int
    head_size: int
    sliding_window: int | None = None  # tokens, the current one included; None: sees the whole context


# ------------------------------------------------------------------ norms
class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; add_one: Gemma's (1 + weight). Weights: `weight`."""

    weight: torch.Tensor  # [size]

    def __init__(self, size: int, eps: float, options: ModelOptions, *, add_one: bool = False):
        super().__init__()
        self.eps, self.options, self.add_one = eps, options, add_one
        self.register_buffer("weight", torch.empty(size, dtype=options.dtype))  # [size]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., size] -> [..., size]"""
        return rms_norm(x, self.weight, self.eps, add_one=self.add_one, impl=self.options.impl)

    def add_and_norm(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """norm(x + residual) and x + residual, both [..., size]. residual None counts as zero."""
        if residual is None:
            return self(x), x
        return rms_norm(x, self.weight, self.eps, residual=residual, add_one=self.add_one, impl=self.options.impl)

    def weight_slots(self, path: str) -> dict[str, WeightSlot]:
        return {f"{path}.weight": WeightSlot(tuple(self.weight.shape), self.weight.copy_)}


class LayerNorm(nn.Module):
    """(x - mean) / std * weight + bias over the last dimension. Weights: `weight`, `bias`."""

    weight: torch.Tensor  # [size]
    bias: torch.Tensor  # [size]

    def __init__(self, size: int, eps: float, options: ModelOptions):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.empty(size, dtype=options.dtype))  # [size]
        self.register_buffer("bias", torch.empty(size, dtype=options.dtype))  # [size]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [num_tokens, size] -> [num_tokens, size]"""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def weight_slots(self, path: str) -> dict[str, WeightSlot]:
        return {
            f"{path}.{name}": WeightSlot(tuple(tensor.shape), tensor.copy_)
            for name, tensor in (("weight", self.weight), ("bias", self.bias))
        }


# ------------------------------------------------------------------ positions
class RotaryEmbedding(nn.Module):
    """Turns positions into the angles by which queries and keys are rotated: once per step, for all layers.

    parameters: transformers' `rope_parameters` of one layer type: rope_theta, rope_type and what the type needs.
    Types: default, linear, llama3, yarn. Refused: dynamic and longrope, whose frequencies depend on the longest
    request in the step, so that keys already in the cache would have been rotated differently.
    """

    frequencies: torch.Tensor  # [head_size / 2] radians per token

    def __init__(self, parameters: Mapping[str, Any], head_size: int, max_position_embeddings: int):
        super().__init__()
        rope_type = parameters.get("rope_type", "default")
        scaled = {"default": _unscaled, "linear": _linear, "llama3": _llama3, "yarn": _yarn}.get(rope_type)
        if scaled is None:
            raise ConfigError(f"rope_type must be default, linear, llama3 or yarn, got {rope_type!r}.")
        if parameters.get("partial_rotary_factor") not in (None, 1.0):
            raise ConfigError(f"partial_rotary_factor must be 1, got {parameters['partial_rotary_factor']!r}.")
        _check_positive(parameters)
        exponents = torch.arange(0, head_size, 2, dtype=torch.float32) / head_size
        frequencies = 1.0 / (parameters["rope_theta"] ** exponents)
        frequencies, self.attention_factor = scaled(frequencies, parameters, max_position_embeddings)
        self.register_buffer("frequencies", frequencies, persistent=False)  # [head_size / 2] radians per token

    def forward(self, positions: torch.Tensor) -> Rope:
        """positions: [num_tokens] -> cos, sin: [num_tokens, head_size] fp32; sin carries the sign of the rotation."""
        angles = positions[:, None].float() * self.frequencies  # [num_tokens, head_size / 2]
        cos, sin = angles.cos() * self.attention_factor, angles.sin() * self.attention_factor
        return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def _check_positive(parameters: Mapping[str, Any]) -> None:
    """NaN frequencies would not show in the logits: torch's CPU attention returns 0 where every score is NaN."""
    for name in ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "attention_factor"):
        value = parameters.get(name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and 0 < value < math.inf):
            raise ConfigError(f"{name} of the rotary embedding must be a positive number, got {value!r}.")


def _unscaled(frequencies: torch.Tensor, parameters: Mapping[str, Any], max_len: int) -> tuple[torch.Tensor, float]:
    """frequencies: [head_size / 2] -> scaled ones, and a factor for cos and sin; so do the three below."""
    return frequencies, 1.0


def _linear(frequencies: torch.Tensor, parameters: Mapping[str, Any], max_len: int) -> tuple[torch.Tensor, float]:
    """frequencies: [head_size / 2]. Positions are divided by `factor`."""
    return frequencies / parameters["factor"], 1.0


def _llama3(frequencies: torch.Tensor, parameters: Mapping[str, Any], max_len: int) -> tuple[torch.Tensor, float]:
    """Llama-3.1: long waves are slowed by `factor`, short ones kept, those between blended.

    frequencies: [head_size / 2]
    """
    factor, low, high = (parameters[name] for name in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = parameters["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # in the original context
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies / factor * (1 - kept) + frequencies * kept, 1.0


def _yarn(frequencies: torch.Tensor, parameters: Mapping[str, Any], max_len: int) -> tuple[torch.Tensor, float]:
    """YaRN (arXiv 2309.00071): as llama3, blended by dimension instead of by turns; attention is sharpened.

    frequencies: [head_size / 2]
    """
    original_len = parameters["original_max_position_embeddings"]
    factor = parameters.get("factor") or max_len / original_len
    half, base = frequencies.numel(), parameters["rope_theta"]

    def dimension_of(num_turns: float) -> float:
        return half * math.log(original_len / (num_turns * 2 * math.pi)) / math.log(base)

    first = dimension_of(parameters.get("beta_fast") or 32)
    last = dimension_of(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    steps = torch.arange(half, dtype=torch.float32) - first
    slowed = (steps / (last - first if last != first else 0.001)).clamp(0, 1)
    return frequencies / factor * slowed + frequencies * (1 - slowed), _yarn_attention_factor(parameters, factor)


def _yarn_attention_factor(parameters: Mapping[str, Any], factor: float) -> float:
    def sharpness(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    given, mscale, mscale_all = (parameters.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is not None:
        return float(given)
    return sharpness(mscale) / sharpness(mscale_all) if mscale and mscale_all else sharpness(1.0)


# ------------------------------------------------------------------ the two halves of a layer
class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)). Weights: `gate_proj`, `up_proj`, `down_proj`.

    activation: transformers' name, silu or gelu_pytorch_tanh.
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, activation: str, options: ModelOptions, *, bias: bool = False
    ):
        super().__init__()
        known = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
        if activation not in known:
            raise ConfigError(f"hidden_act must be one of {', '.join(known)}, got {activation!r}.")
        self.activation, self.options = known[activation], options
        widths = {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        self.gate_up_proj = Linear(hidden_size, widths, options, bias=bias)
        self.down_proj = row_parallel(intermediate_size, hidden_size, options, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [num_tokens, hidden_size] -> [num_tokens, hidden_size]"""
        gated = silu_and_mul(self.gate_up_proj(x), activation=self.activation, impl=self.options.impl)
        return self.down_proj(gated)


@dataclass(frozen=True)
class AttentionConfig:
    """The numbers by which the attention blocks of the decoder families differ."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float  # of query . key
    qkv_bias: bool = False
    output_bias: bool = False
    sliding_window: int | None = None  # tokens, the current one included
    soft_cap: float | None = None  # scores become soft_cap * tanh(score / soft_cap)


class Attention(nn.Module):
    """Project, rotate, write this step's keys and values into the cache, attend over the cache, project back.

    Weights: `q_proj`, `k_proj`, `v_proj`, `o_proj`. q_norm and k_norm, where a family has them, work on each head.
    """

    def __init__(
        self,
        config: AttentionConfig,
        options: ModelOptions,
        *,
        q_norm: RMSNorm | None = None,
        k_norm: RMSNorm | None = None,
    ):
        super().__init__()
        self.config, self.options = config, options
        query_size, kv_size = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
        self.widths = {"q_proj": query_size, "k_proj": kv_size, "v_proj": kv_size}
        self.num_heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]  # of query, key, value
        self.qkv_proj = Linear(config.hidden_size, self.widths, options, bias=config.qkv_bias)
        self.o_proj = row_parallel(query_size, config.hidden_size, options, bias=config.output_bias)
        self.q_norm, self.k_norm = q_norm, k_norm
        self.head_shares = None if options.parallel is None else options.parallel.head_shares

    def forward(
        self, hidden_states: torch.Tensor, rope: Rope, kv_cache: KVCache, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """hidden_states: [num_tokens, hidden_size] -> [num_tokens, hidden_size]"""
        config, impl = self.config, self.options.impl
        heads = self.qkv_proj(hidden_states).view(len(hidden_states), -1, config.head_size)
        query, key, value = heads.split(self.num_heads, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotary_embedding(query, key, *rope, impl=impl)
        reshape_and_cache(key, value, *kv_cache, metadata.slot_mapping, impl=impl)
        output = paged_attention(
            query,
            *kv_cache,
            metadata,
            scale=config.scale,
            sliding_window=config.sliding_window,
            soft_cap=config.soft_cap,
            head_shares=self.head_shares,
            impl=impl,
        )
        return self.o_proj(output.flatten(1))

    @property
    def kv_cache_spec(self) -> KVCacheSpec:
        return KVCacheSpec(self.config.num_kv_heads, self.config.head_size, self.config.sliding_window)


# ------------------------------------------------------------------ small helpers
def head_size_of(hf_config: Any) -> int:
    """head_dim where the configuration has one, else the hidden size cut into heads."""
    return getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads


def soft_cap(x: torch.Tensor, cap: float | None) -> torch.Tensor:
    """cap * tanh(x / cap): x (any shape) kept within +-cap. None: x itself."""
    return x if cap is None else torch.tanh(x / cap) * cap
