"""BERT as an encoder (bge-*, all-MiniLM-*): every token sees the whole request, nothing is cached, no logits.

    hidden = norm(word + token_type + position);  per layer: hidden = norm(hidden + attention(hidden));
    hidden = norm(hidden + mlp(hidden))

Pooling (CLS, mean) is worker/pooling.py's; the checkpoint's own pooler and heads are left out.

Hugging Face name                                           -> here (without the `bert.` of checkpoints with a head)
    embeddings.{word,position,token_type}_embeddings.weight    embeddings.*
    embeddings.LayerNorm.{weight,bias}                         embeddings.LayerNorm
    encoder.layer.N.attention.self.{query,key,value}.*         encoder.layer[N].attention.self.qkv, rows in this order
    encoder.layer.N.attention.output.{dense,LayerNorm}.*       encoder.layer[N].attention.output
    encoder.layer.N.intermediate.dense.*                       encoder.layer[N].intermediate.dense
    encoder.layer.N.output.{dense,LayerNorm}.*                 encoder.layer[N].output

Knows no scheduler and no pooling. Called by: worker/model_runner.py, through models/registry.py. Twin in vLLM:
vllm/model_executor/models/bert.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from minivllm.errors import ConfigError
from minivllm.kernels.paged_attention import AttentionMetadata, encoder_attention
from minivllm.models.layers import Embedding, KVCache, KVCacheSpec, LayerNorm, Linear, ModelOptions
from minivllm.models.weights import load_weights


class BertEmbeddings(nn.Module):
    """Word, position and token-type rows, added and normed."""

    def __init__(self, hf_config: Any, options: ModelOptions):
        super().__init__()
        size = hf_config.hidden_size
        self.word_embeddings = Embedding(hf_config.vocab_size, size, options)
        self.position_embeddings = Embedding(hf_config.max_position_embeddings, size, options)
        self.token_type_embeddings = Embedding(hf_config.type_vocab_size, size, options)
        self.LayerNorm = LayerNorm(size, hf_config.layer_norm_eps, options)

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, token_type_ids: torch.Tensor | None
    ) -> torch.Tensor:
        """All arguments [num_tokens] int64 -> [num_tokens, hidden_size]. token_type_ids None: all zero."""
        token_types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        rows = self.word_embeddings(input_ids) + self.token_type_embeddings(token_types)
        return self.LayerNorm(rows.add_(self.position_embeddings(positions)))


class BertOutput(nn.Module):
    """norm(dense(x) + residual). Weights: `dense`, `LayerNorm`."""

    def __init__(self, in_features: int, hf_config: Any, options: ModelOptions):
        super().__init__()
        self.dense = Linear(in_features, hf_config.hidden_size, options, bias=True)
        self.LayerNorm = LayerNorm(hf_config.hidden_size, hf_config.layer_norm_eps, options)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """x: [num_tokens, in_features], residual: [num_tokens, hidden_size] -> as residual"""
        return self.LayerNorm(self.dense(x).add_(residual))


class BertLayer(nn.Module):
    """Attention over the whole request, then the MLP, each with its residual sum and norm."""

    def __init__(self, hf_config: Any, options: ModelOptions):
        super().__init__()
        size = hf_config.hidden_size
        self.options = options
        self.head_size = size // hf_config.num_attention_heads
        qkv = Linear(size, {"query": size, "key": size, "value": size}, options, bias=True)
        self.attention: Any = nn.ModuleDict(
            {"self": nn.ModuleDict({"qkv": qkv}), "output": BertOutput(size, hf_config, options)}
        )
        self.intermediate = nn.ModuleDict({"dense": Linear(size, hf_config.intermediate_size, options, bias=True)})
        self.output = BertOutput(hf_config.intermediate_size, hf_config, options)

    def forward(self, hidden_states: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        """hidden_states: [num_tokens, hidden_size] -> [num_tokens, hidden_size]"""
        qkv = self.attention["self"]["qkv"](hidden_states).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (-1, self.head_size)) for part in qkv)
        attended = encoder_attention(
            query,
            key,
            value,
            metadata.query_start_loc,
            scale=self.head_size**-0.5,
            batch_invariant=self.options.batch_invariant,
            impl=self.options.impl,
        )
        hidden_states = self.attention["output"](attended.flatten(1), hidden_states)
        return self.output(F.gelu(self.intermediate["dense"](hidden_states)), hidden_states)


class BertModel(nn.Module):
    """The encoder: whole requests in, hidden states out, no cache and no logits."""

    def __init__(self, hf_config: Any, options: ModelOptions):
        super().__init__()
        _refuse_unsupported(hf_config)
        self.vocab_size: int = hf_config.vocab_size
        self.hidden_size: int = hf_config.hidden_size
        self.kv_cache_specs: list[KVCacheSpec] = []
        self.embeddings = BertEmbeddings(hf_config, options)
        layers = [BertLayer(hf_config, options) for _ in range(hf_config.num_hidden_layers)]
        self.encoder: Any = nn.ModuleDict({"layer": nn.ModuleList(layers)})

    def forward(
        self,
        input_ids: torch.Tensor,  # [num_tokens] int64
        positions: torch.Tensor,  # [num_tokens] int64
        kv_caches: list[KVCache],  # empty
        metadata: AttentionMetadata,  # query_start_loc says which rows are one request
        token_type_ids: torch.Tensor | None = None,  # [num_tokens] int64; None: all zero
    ) -> torch.Tensor:
        """Whole requests in, hidden states [num_tokens, hidden_size] out."""
        hidden_states = self.embeddings(input_ids, positions, token_type_ids)
        for layer in self.encoder["layer"]:
            hidden_states = layer(hidden_states, metadata)
        return hidden_states

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Always a ConfigError. hidden_states: [num_rows, hidden_size]"""
        raise ConfigError("BERT is an encoder: it gives embeddings, no tokens.")

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """weights: (Hugging Face name, tensor). Raises ConfigError naming a missing, unexpected or misshapen one."""
        heads = ("pooler.", "cls.", "classifier.", "embeddings.position_ids")
        load_weights(self, weights, optional_prefix="bert.", ignored=heads)


def _refuse_unsupported(hf_config: Any) -> None:
    expected = {"position_embedding_type": "absolute", "hidden_act": "gelu", "is_decoder": False}
    for name, value in expected.items():
        actual = getattr(hf_config, name, value)
        if actual != value:
            raise ConfigError(f"BERT with {name} {actual!r} is not supported, only {value!r}.")
