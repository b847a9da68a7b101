"""Tiny networks from a configuration and a seed: transformers' and ours, from the same weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from minivllm.models.layers import ModelOptions
from minivllm.models.registry import model_class

VOCAB_SIZE = 97
FP32 = ModelOptions(dtype=torch.float32)
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def tiny_config(config_class: str, **changes: Any) -> Any:
    """A transformers configuration of the given class, small enough for milliseconds."""
    return getattr(transformers, config_class)(**{**SHAPE, **changes})


def tiny_hf(hf_config: Any, hf_class: str = "AutoModelForCausalLM", seed: int = 0) -> PreTrainedModel:
    """transformers' network with every weight random: fresh norms are all ones and fresh biases all zeros, and would
    hide a wrong wire."""
    torch.manual_seed(seed)
    network_class = getattr(transformers, hf_class)
    build = network_class.from_config if hf_class.startswith("Auto") else network_class._from_config
    network = build(hf_config, attn_implementation="eager", dtype=torch.float32).eval()
    network.requires_grad_(False)
    for name, parameter in network.named_parameters():
        scale = 0.3 if parameter.ndim > 1 and "embed" not in name else 0.5
        centre = parameter.clone() if parameter.ndim == 1 else torch.zeros(())
        parameter.copy_(centre + scale * torch.randn(parameter.shape) * (0.5 if parameter.ndim == 1 else 1.0))
    network.config.architectures = [type(network).__name__]
    return network


def weights_of(network: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights as a checkpoint stores them: a tied head is not stored twice."""
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    if network.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return state


def ours_from(network: PreTrainedModel, options: ModelOptions = FP32) -> Any:
    """Our network of the same architecture with the same weights."""
    model = model_class(network.config)(network.config, options)
    model.load_weights(weights_of(network).items())
    return model.eval()


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist()
