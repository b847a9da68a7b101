"""Bugs as people make them when they port a network, each planted into the engine for one test.

A bug changes the code or the loaded network of OUR side only; component and layers are what must be named.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch

from minivllm.core import block_hash
from minivllm.models import layers, loader
from minivllm.models.linear import FORMATS
from minivllm.worker.input_batch import InputBatch

Plant = Callable[[pytest.MonkeyPatch], None]


class Bug(NamedTuple):
    model: str
    plant: Plant
    kind: str
    component: str
    layers: tuple[int, ...]
    options: Mapping[str, Any] = MappingProxyType({})
    arithmetic: str = "float32"


def in_network(change: Callable[[Any], None]) -> Plant:
    """Change the loaded network."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        load = loader.load_model

        def load_and_spoil(*args: Any, **options: Any) -> Any:
            model = load(*args, **options)
            change(model)
            return model

        patch.setattr(loader, "load_model", load_and_spoil)

    return plant


def in_layer(index: int, change: Callable[[Any], None]) -> Plant:
    """Change one layer of the loaded network."""
    return in_network(lambda model: change(model.model.layers[index]))


def attention(**changes: Any) -> Callable[[Any], None]:
    def change(layer: Any) -> None:
        layer.self_attn.config = dataclasses.replace(layer.self_attn.config, **changes)

    return change


# ------------------------------------------------------------------ rotary positions
def rope_theta(model: Any) -> None:
    model.ropes["default"].frequencies *= torch.linspace(1.0, 0.9, model.ropes["default"].frequencies.numel())


def rope_pairing(patch: pytest.MonkeyPatch) -> None:
    def neighbours(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, **_: Any) -> Any:
        """All arguments [num_tokens, ...]: pairs (2i, 2i + 1), as GPT-J has them."""
        half = cos.shape[-1] // 2
        cos, sin = cos[:, None, :half], sin[:, None, half:]
        turned = []
        for x in (query, key):
            even, odd = x[..., ::2], x[..., 1::2]
            turned.append(torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2))
        return turned

    patch.setattr(layers, "rotary_embedding", neighbours)


def rope_positions(patch: pytest.MonkeyPatch) -> None:
    forward = layers.RotaryEmbedding.forward
    patch.setattr(layers.RotaryEmbedding, "forward", lambda self, positions: forward(self, positions + positions // 8))


# ------------------------------------------------------------------ norms and sums
def norm_epsilon(layer: Any) -> None:
    layer.input_layernorm.eps = 1e-6  # the usual other one


def no_sum_before_mlp(layer: Any) -> None:
    norm = layer.post_attention_layernorm
    norm.add_and_norm = lambda x, residual: (norm(x), x + residual)


def no_sum_after_attention(layer: Any) -> None:
    norm = layer.post_attention_layernorm
    norm.add_and_norm = lambda x, residual: (type(norm).add_and_norm(norm, x, residual)[0], x)


def gemma_norm(layer: Any) -> None:
    layer.pre_feedforward_layernorm.add_one = False


# ------------------------------------------------------------------ products
def gate_and_up(patch: pytest.MonkeyPatch) -> None:
    silu_and_mul = layers.silu_and_mul
    patch.setattr(layers, "silu_and_mul", lambda x, **options: silu_and_mul(x.roll(x.shape[-1] // 2, -1), **options))


def key_and_value(patch: pytest.MonkeyPatch) -> None:
    iterate = loader.iterate_weights

    def exchanged(*args: Any, **options: Any) -> Any:
        names = {"layers.1.self_attn.k_proj": "layers.1.self_attn.v_proj"}
        names |= {value: key for key, value in names.items()}
        for name, tensor in iterate(*args, **options):
            path = name.removeprefix("model.").removesuffix(".weight")
            yield name.replace(path, names.get(path, path)), tensor

    patch.setattr(loader, "iterate_weights", exchanged)


def no_bias(layer: Any) -> None:
    layer.self_attn.qkv_proj.bias = None


def weight_scale(layer: Any) -> None:
    """As a group of 32 columns whose scale was read wrongly."""
    linear = layer.mlp.down_proj
    weight = linear._format.product(torch.eye(linear.in_features), linear.weight, None).t().contiguous()
    weight[:, 32:64] *= 1.5
    linear._set_weight(weight, FORMATS["plain"])


def int8_scale(layer: Any) -> None:
    scales = [buffer for name, buffer in layer.mlp.down_proj.weight.named_buffers() if "scale" in name]
    assert scales
    for scale in scales:
        scale *= 1.5


# ------------------------------------------------------------------ cache
def slot(patch: pytest.MonkeyPatch) -> None:
    build = InputBatch.build.__func__  # type: ignore[attr-defined]

    def shifted(cls: type, *args: Any, **options: Any) -> InputBatch:
        batch = build(cls, *args, **options)
        batch.attention.slot_mapping += 1
        return batch

    patch.setattr(InputBatch, "build", classmethod(shifted))


def stale_prefix(patch: pytest.MonkeyPatch) -> None:
    hash_block = block_hash.hash_block
    patch.setattr(block_hash, "hash_block", lambda parent, ids, key=None: hash_block(block_hash.ROOT_HASH, ids, key))


# ------------------------------------------------------------------ attention
def head_grouping(patch: pytest.MonkeyPatch) -> None:
    """Query head h reads key head h % num_kv_heads."""
    paged_attention = layers.paged_attention

    def interleaved(query: torch.Tensor, k_cache: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        """query: [num_tokens, num_heads, head_size], k_cache: [num_kv_heads, ...]"""
        order = torch.arange(query.shape[1]).view(-1, k_cache.shape[0]).t().flatten()
        output = torch.empty_like(query)
        output[:, order] = paged_attention(query[:, order].contiguous(), k_cache, *args, **options)
        return output

    patch.setattr(layers, "paged_attention", interleaved)


def embedding_scale(model: Any) -> None:
    model.embed_scale = 1.0


def final_norm(model: Any) -> None:
    model.model.norm.weight *= torch.linspace(0.8, 1.2, model.hidden_size)


def head_scale(model: Any) -> None:
    logits = model.compute_logits
    model.compute_logits = lambda hidden_states: 1.1 * logits(hidden_states)


def activation(layer: Any) -> None:
    layer.mlp.activation = "gelu_tanh"


ALL3 = (0, 1, 2)
BUGS: Mapping[str, Bug] = MappingProxyType(
    {
        "rope theta": Bug("llama", in_network(rope_theta), "wrong rotary angle", "self_attn.key", ALL3),
        "rope pairing": Bug("qwen3", rope_pairing, "wrong rotary pairing", "self_attn.key", ALL3),
        "rope positions": Bug("llama-rope-yarn", rope_positions, "wrong rotary angle", "self_attn.key", (0, 1)),
        "norm epsilon": Bug("llama", in_layer(0, norm_epsilon), "wrong norm epsilon", "input_layernorm", (0,)),
        "missing residual before the MLP": Bug(
            "llama", in_layer(1, no_sum_before_mlp), "missing residual", "post_attention_layernorm", (1,)
        ),
        "missing residual of the layer": Bug(
            "qwen2", in_layer(2, no_sum_after_attention), "missing residual", "output (residual sum)", (2,)
        ),
        "gate and up swapped": Bug("llama", gate_and_up, "gate and up swapped", "mlp.activation", ALL3),
        "key and value swapped": Bug("qwen3", key_and_value, "k_proj and v_proj swapped", "self_attn.k_proj", (1,)),
        "off-by-one slot": Bug("llama", slot, "off-by-one slot", "self_attn.key", (0,)),
        "stale prefix block": Bug("llama", stale_prefix, "stale prefix block", "self_attn.key", (1, 2)),
        "wrong attention scale": Bug(
            "llama", in_layer(1, attention(scale=48**-0.5)), "wrong attention scale", "self_attn.context", (1,)
        ),
        "wrong head grouping": Bug(
            "llama-rope-llama3", head_grouping, "wrong head grouping", "self_attn.context", (0, 1)
        ),
        "wrong sliding window": Bug(
            "mistral", in_layer(2, attention(sliding_window=23)), "wrong sliding window", "self_attn.context", (2,)
        ),
        "no sliding window": Bug(
            "gemma3", in_layer(1, attention(sliding_window=None)), "wrong sliding window", "self_attn.context", (1,)
        ),
        "dropped bias": Bug("qwen2", in_layer(1, no_bias), "dropped bias", "self_attn.q_proj", (1,)),
        "scale of a group of weights": Bug(
            "llama", in_layer(2, weight_scale), "wrong scale of the weight", "mlp.down_proj", (2,)
        ),
        "scale of int8 weights": Bug(
            "llama", in_layer(2, int8_scale), "wrong scale of the weight", "mlp.down_proj", (2,),
            {"quantization": "int8"}, "int8",
        ),
        "wrong activation": Bug("mistral", in_layer(0, activation), "wrong activation", "mlp.activation", (0,)),
        "embedding scale": Bug("gemma3", in_network(embedding_scale), "wrong scale", "embedding", (0,)),
        "final norm": Bug("qwen3", in_network(final_norm), "wrong norm weight", "norm", ()),
        "scale of the head": Bug("mistral", in_network(head_scale), "wrong scale", "logits", ()),
        "norm without its one": Bug(
            "gemma3", in_layer(3, gemma_norm), "wrong norm weight", "pre_feedforward_layernorm", (3,)
        ),
    }
)  # fmt: skip
