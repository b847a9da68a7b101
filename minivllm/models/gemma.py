"""Gemma-3 (text), as differences from Llama.

    layers      local (sliding window) and global ones alternate as `layer_types` says, each kind with its own rope
    norms       (1 + weight); four per layer: the outputs of attention and MLP are normed before they are added
    attention   a norm over each head of q and k; scores scaled by query_pre_attn_scalar ** -0.5
    embedding   times sqrt(hidden_size), rounded to the model's dtype first, as it was trained
    MLP         gelu (tanh form) instead of silu
    soft caps   on scores and logits: off in Gemma-3, applied where the configuration sets them

Hugging Face name -> here: as in llama.py, and
    model.layers.N.self_attn.{q,k}_norm.weight            model.layers[N].self_attn.{q,k}_norm
    model.layers.N.{pre,post}_feedforward_layernorm.weight   the same

Knows and is called as llama.py. Twin in vLLM: vllm/model_executor/models/gemma3.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from minivllm.errors import ConfigError
from minivllm.kernels.paged_attention import AttentionMetadata
from minivllm.models.layers import (
    AttentionConfig,
    GatedMLP,
    KVCache,
    ModelOptions,
    RMSNorm,
    Rope,
    RotaryEmbedding,
    head_size_of,
    soft_cap,
)
from minivllm.models.llama import LlamaForCausalLM
from minivllm.models.qwen import Qwen3DecoderLayer


class Gemma3DecoderLayer(Qwen3DecoderLayer):
    """Shares with Qwen3 the q/k norms and the windows by layer type."""

    def __init__(self, hf_config: Any, layer_idx: int, options: ModelOptions):
        super().__init__(hf_config, layer_idx, options)
        self.rope_name = hf_config.layer_types[layer_idx]
        self.pre_feedforward_layernorm = self.norm(hf_config, hf_config.hidden_size, options)
        self.post_feedforward_layernorm = self.norm(hf_config, hf_config.hidden_size, options)

    def forward(
        self,
        hidden_states: torch.Tensor,  # [num_tokens, hidden_size]
        residual: torch.Tensor | None,  # [num_tokens, hidden_size], still to be added to hidden_states
        rope: Rope,
        kv_cache: KVCache,
        metadata: AttentionMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_states, residual = self.input_layernorm.add_and_norm(hidden_states, residual)
        hidden_states = self.post_attention_layernorm(self.self_attn(hidden_states, rope, kv_cache, metadata))
        hidden_states, residual = self.pre_feedforward_layernorm.add_and_norm(hidden_states, residual)
        return self.post_feedforward_layernorm(self.mlp(hidden_states)), residual

    @staticmethod
    def norm(hf_config: Any, size: int, options: ModelOptions) -> RMSNorm:
        return RMSNorm(size, hf_config.rms_norm_eps, options, add_one=True)

    @classmethod
    def attention_config(cls, hf_config: Any, layer_idx: int) -> AttentionConfig:
        return replace(
            super().attention_config(hf_config, layer_idx),
            scale=hf_config.query_pre_attn_scalar**-0.5,
            soft_cap=hf_config.attn_logit_softcapping,
        )

    @staticmethod
    def feed_forward(hf_config: Any, options: ModelOptions) -> GatedMLP:
        return GatedMLP(hf_config.hidden_size, hf_config.intermediate_size, hf_config.hidden_activation, options)


class Gemma3ForCausalLM(LlamaForCausalLM):
    """Llama's frame with two ropes, scaled embeddings and capped logits."""

    decoder_layer = Gemma3DecoderLayer

    def __init__(self, hf_config: Any, options: ModelOptions):
        if hf_config.use_bidirectional_attention:
            raise ConfigError("Gemma-3 with use_bidirectional_attention (an encoder) is not supported.")
        super().__init__(hf_config, options)
        self.embed_scale = float(torch.tensor(hf_config.hidden_size**0.5, dtype=options.dtype))
        self.logits_soft_cap: float | None = hf_config.final_logit_softcapping

    def build_ropes(self, hf_config: Any) -> dict[str, RotaryEmbedding]:
        head_size, max_len = head_size_of(hf_config), hf_config.max_position_embeddings
        return {
            layer_type: RotaryEmbedding(hf_config.rope_parameters[layer_type], head_size, max_len)
            for layer_type in sorted(set(hf_config.layer_types))
        }

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:  # [num_tokens] -> [num_tokens, hidden_size]
        return super().embed(input_ids) * self.embed_scale

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:  # as in llama.py
        return soft_cap(super().compute_logits(hidden_states), self.logits_soft_cap)
