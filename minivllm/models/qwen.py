"""Qwen2 / Qwen2.5 and Qwen3, as differences from Llama.

    Qwen2   biases on q, k and v; a sliding window in the layers that `layer_types` names
    Qwen3   a norm over each head of q and k, biases only where `attention_bias` says so; the same windows

Hugging Face name -> here: as in llama.py, and for Qwen3
    model.layers.N.self_attn.{q,k}_norm.weight            model.layers[N].self_attn.{q,k}_norm

Knows and is called as llama.py. Twin in vLLM: vllm/model_executor/models/qwen2.py and qwen3.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from minivllm.models.layers import Attention, AttentionConfig, ModelOptions, head_size_of
from minivllm.models.llama import LlamaDecoderLayer, LlamaForCausalLM


class Qwen3DecoderLayer(LlamaDecoderLayer):
    """Llama with normed heads of q and k, and a sliding window where `layer_types` says so."""

    @classmethod
    def attention_config(cls, hf_config: Any, layer_idx: int) -> AttentionConfig:
        slides = hf_config.layer_types[layer_idx] == "sliding_attention"
        window = hf_config.sliding_window if slides else None
        return replace(super().attention_config(hf_config, layer_idx), sliding_window=window)

    @classmethod
    def attention(cls, hf_config: Any, layer_idx: int, options: ModelOptions) -> Attention:
        q_norm, k_norm = (cls.norm(hf_config, head_size_of(hf_config), options) for _ in "qk")
        return Attention(cls.attention_config(hf_config, layer_idx), options, q_norm=q_norm, k_norm=k_norm)


class Qwen3ForCausalLM(LlamaForCausalLM):
    decoder_layer = Qwen3DecoderLayer


class Qwen2DecoderLayer(LlamaDecoderLayer):
    @classmethod
    def attention_config(cls, hf_config: Any, layer_idx: int) -> AttentionConfig:
        return replace(Qwen3DecoderLayer.attention_config(hf_config, layer_idx), qkv_bias=True, output_bias=False)


class Qwen2ForCausalLM(LlamaForCausalLM):
    decoder_layer = Qwen2DecoderLayer
