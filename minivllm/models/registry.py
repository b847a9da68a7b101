"""Which class serves which architecture: an explicit table.

The names are those of `architectures` in config.json. A name that is not here goes to hf_backend.py, which runs
transformers' own network over our cache, or refuses it with the reason.

Knows no weights and no files. Called by: models/loader.py. Twin in vLLM: vllm/model_executor/models/registry.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from minivllm.models.bert import BertModel
from minivllm.models.gemma import Gemma3ForCausalLM
from minivllm.models.llama import LlamaForCausalLM, MistralForCausalLM
from minivllm.models.qwen import Qwen2ForCausalLM, Qwen3ForCausalLM

MODELS: Mapping[str, type] = MappingProxyType(
    {
        "LlamaForCausalLM": LlamaForCausalLM,
        "MistralForCausalLM": MistralForCausalLM,
        "Qwen2ForCausalLM": Qwen2ForCausalLM,
        "Qwen3ForCausalLM": Qwen3ForCausalLM,
        "Gemma3ForCausalLM": Gemma3ForCausalLM,
        # The same networks saved without a head: embeddings from the last token
        "LlamaModel": LlamaForCausalLM,
        "MistralModel": MistralForCausalLM,
        "Qwen2Model": Qwen2ForCausalLM,
        "Qwen3Model": Qwen3ForCausalLM,
        # Encoders: embeddings only
        "BertModel": BertModel,
        "BertForMaskedLM": BertModel,
    }
)


def model_class(hf_config: Any) -> type:
    """The class that serves `hf_config.architectures`; transformers' own network where we have none."""
    for name in hf_config.architectures or []:
        if name in MODELS:
            return MODELS[name]
    from minivllm.models.hf_backend import TransformersForCausalLM  # transformers' models take a second to import

    return TransformersForCausalLM


def is_encoder(hf_config: Any) -> bool:
    """Whether every token sees the whole request, so that nothing is cached and nothing generated."""
    return model_class(hf_config) is BertModel


def generates_text(hf_config: Any) -> bool:
    """False for encoders and for decoders that were saved without a language-model head."""
    name = (hf_config.architectures or [""])[0]
    headless = name in MODELS and name.endswith("Model")  # not GPT2LMHeadModel, which hf_backend.py serves
    return not is_encoder(hf_config) and not headless
