"""Llama (2, 3, TinyLlama, CodeLlama, SmolLM2, Hermes-2-Pro) and Mistral; the frame of every other decoder here.

    hidden = embed(ids);  per layer: hidden += attention(norm(hidden)); hidden += mlp(norm(hidden));  norm(hidden)

The sums are kept apart as (hidden_states, residual) so that a sum and the norm after it are one kernel.

Hugging Face name                                      -> here
    model.embed_tokens.weight                             model.embed_tokens (TiedEmbedding when the head is tied)
    model.layers.N.input_layernorm.weight                 model.layers[N].input_layernorm
    model.layers.N.self_attn.{q,k,v}_proj.{weight,bias}   model.layers[N].self_attn.qkv_proj, rows in this order
    model.layers.N.self_attn.o_proj.{weight,bias}         model.layers[N].self_attn.o_proj
    model.layers.N.post_attention_layernorm.weight        model.layers[N].post_attention_layernorm
    model.layers.N.mlp.{gate,up}_proj.{weight,bias}       model.layers[N].mlp.gate_up_proj, rows in this order
    model.layers.N.mlp.down_proj.{weight,bias}            model.layers[N].mlp.down_proj
    model.norm.weight                                     model.norm
    lm_head.weight                                        lm_head; absent, or a copy, when tied

A checkpoint of the bare network (architecture `...Model`) has no `model.` prefix and no head.

Knows no scheduler, no sampling, no file. Called by: worker/model_runner.py, through models/registry.py. Twin in vLLM:
vllm/model_executor/models/llama.py and mistral.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from minivllm.errors import ConfigError
from minivllm.kernels.paged_attention import AttentionMetadata
from minivllm.models.layers import (
    Attention,
    AttentionConfig,
    Embedding,
    GatedMLP,
    KVCache,
    KVCacheSpec,
    ModelOptions,
    RMSNorm,
    Rope,
    RotaryEmbedding,
    TiedEmbedding,
    head_size_of,
)
from minivllm.models.linear import embedding, lm_head
from minivllm.models.weights import load_weights


class LlamaDecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm; the hooks below are what the families change."""

    rope_name = "default"  # which of the model's rotary embeddings this layer uses

    def __init__(self, hf_config: Any, layer_idx: int, options: ModelOptions):
        super().__init__()
        self.input_layernorm = self.norm(hf_config, hf_config.hidden_size, options)
        self.self_attn = self.attention(hf_config, layer_idx, options)
        self.post_attention_layernorm = self.norm(hf_config, hf_config.hidden_size, options)
        self.mlp = self.feed_forward(hf_config, options)

    def forward(
        self,
        hidden_states: torch.Tensor,  # [num_tokens, hidden_size]
        residual: torch.Tensor | None,  # [num_tokens, hidden_size], still to be added to hidden_states
        rope: Rope,
        kv_cache: KVCache,
        metadata: AttentionMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_states, residual = self.input_layernorm.add_and_norm(hidden_states, residual)
        hidden_states = self.self_attn(hidden_states, rope, kv_cache, metadata)
        hidden_states, residual = self.post_attention_layernorm.add_and_norm(hidden_states, residual)
        return self.mlp(hidden_states), residual

    # What the families change:
    @staticmethod
    def norm(hf_config: Any, size: int, options: ModelOptions) -> RMSNorm:
        return RMSNorm(size, hf_config.rms_norm_eps, options)

    @classmethod
    def attention(cls, hf_config: Any, layer_idx: int, options: ModelOptions) -> Attention:
        return Attention(cls.attention_config(hf_config, layer_idx), options)

    @classmethod
    def attention_config(cls, hf_config: Any, layer_idx: int) -> AttentionConfig:
        bias = getattr(hf_config, "attention_bias", False)
        head_size = head_size_of(hf_config)
        return AttentionConfig(
            hidden_size=hf_config.hidden_size,
            num_heads=hf_config.num_attention_heads,
            num_kv_heads=hf_config.num_key_value_heads,
            head_size=head_size,
            scale=head_size**-0.5,
            qkv_bias=bias,
            output_bias=bias,
        )

    @staticmethod
    def feed_forward(hf_config: Any, options: ModelOptions) -> GatedMLP:
        bias = getattr(hf_config, "mlp_bias", False)
        return GatedMLP(hf_config.hidden_size, hf_config.intermediate_size, hf_config.hidden_act, options, bias=bias)


class LlamaModel(nn.Module):
    """The network without its head, under the names of the checkpoint."""

    def __init__(self, embed_tokens: Embedding, layers: list[LlamaDecoderLayer], norm: RMSNorm):
        super().__init__()
        self.embed_tokens = embed_tokens
        self.layers: Any = nn.ModuleList(layers)
        self.norm = norm


class LlamaForCausalLM(nn.Module):
    """Embedding, layers, norm and head. A family names its layer class and overrides what differs."""

    decoder_layer: type[LlamaDecoderLayer] = LlamaDecoderLayer
    can_be_parallel = True  # over several ranks; its configuration has what models/parallel.py reads

    def __init__(self, hf_config: Any, options: ModelOptions):
        super().__init__()
        self.vocab_size: int = hf_config.vocab_size
        self.hidden_size: int = hf_config.hidden_size
        self.has_head = not (hf_config.architectures or [""])[0].endswith("Model")
        tied = self.has_head and hf_config.tie_word_embeddings
        embed_tokens = embedding(self.vocab_size, self.hidden_size, options, tied=tied)
        layers = [self.decoder_layer(hf_config, idx, options) for idx in range(hf_config.num_hidden_layers)]
        self.model = LlamaModel(embed_tokens, layers, self.decoder_layer.norm(hf_config, self.hidden_size, options))
        self.lm_head = lm_head(self.hidden_size, self.vocab_size, options) if self.has_head and not tied else None
        self.ropes = nn.ModuleDict(self.build_ropes(hf_config))
        self.kv_cache_specs: list[KVCacheSpec] = [layer.self_attn.kv_cache_spec for layer in layers]

    def build_ropes(self, hf_config: Any) -> dict[str, RotaryEmbedding]:
        head_size, max_len = head_size_of(hf_config), hf_config.max_position_embeddings
        return {"default": RotaryEmbedding(hf_config.rope_parameters, head_size, max_len)}

    def forward(
        self,
        input_ids: torch.Tensor,  # [num_tokens] int64
        positions: torch.Tensor,  # [num_tokens] int64
        kv_caches: list[KVCache],  # one per layer
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """One step. Returns the hidden states [num_tokens, hidden_size] and writes the keys and values of its tokens
        into the caches."""
        ropes = {name: rope(positions) for name, rope in self.ropes.items()}
        hidden_states, residual = self.embed(input_ids), None
        for layer, kv_cache in zip(self.model.layers, kv_caches, strict=True):
            hidden_states, residual = layer(hidden_states, residual, ropes[layer.rope_name], kv_cache, metadata)
        return self.model.norm.add_and_norm(hidden_states, residual)[0]

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:  # [num_tokens] -> [num_tokens, hidden_size]
        return self.model.embed_tokens(input_ids)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states: [num_rows, hidden_size] -> [num_rows, vocab_size] fp32. ConfigError without a head.

        On a rank that is not the first: the logits of its own tokens only.
        """
        if not self.has_head:
            raise ConfigError("This checkpoint has no language-model head: it gives embeddings, no tokens.")
        if isinstance(self.model.embed_tokens, TiedEmbedding):
            return self.model.embed_tokens.logits(hidden_states).float()
        assert self.lm_head is not None
        return self.lm_head(hidden_states).float()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """weights: (Hugging Face name, tensor). Raises ConfigError naming a missing, unexpected or misshapen one."""
        redundant = ["rotary_emb.inv_freq"] + (["lm_head.weight"] if self.lm_head is None else [])
        load_weights(self if self.has_head else self.model, weights, ignored=redundant)


class MistralDecoderLayer(LlamaDecoderLayer):
    """Llama with a sliding window in every layer, where the configuration has one."""

    @classmethod
    def attention_config(cls, hf_config: Any, layer_idx: int) -> AttentionConfig:
        return replace(super().attention_config(hf_config, layer_idx), sliding_window=hf_config.sliding_window)


class MistralForCausalLM(LlamaForCausalLM):
    decoder_layer = MistralDecoderLayer
