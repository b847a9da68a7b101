"""The truth: the same checkpoint as transformers computes it, in float32, with eager attention and no cache.

    reference = Reference.load(source, hf_config)
    reference.trace(token_ids)                    what every module puts out, in the order of computation
    reference.trace(token_ids, layer_inputs)      the same, but every layer is fed what OUR layer was fed

The second form is how a fault is localised: a layer that starts from our own input can differ from ours only by its own
fault, however wrong the layers before it are. The first form says how far the faults have added up.

A GGUF file is read by transformers' own dequantiser where `accelerate` is installed, else by ours, which is then said.
Knows no engine. Called by verify.py, remote.py. Twin in vLLM: HfRunner of tests/conftest.py.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.utils import logging as transformers_logging

from minivllm.hub import ModelSource
from minivllm.models import loader

ATTENTION = "minivllm_verify"
RECORDER = "minivllm_recorder"  # attribute of a transformers attention module while it is watched

Values = dict[str, torch.Tensor]  # point -> [num_tokens, width] float32


def _watched_attention(
    module: nn.Module,
    query: torch.Tensor,  # [1, num_heads, num_tokens, head_size], rotated
    key: torch.Tensor,  # [1, num_kv_heads, num_tokens, head_size], rotated
    value: torch.Tensor,  # [1, num_kv_heads, num_tokens, head_size]
    attention_mask: torch.Tensor | None,  # [1, 1, num_tokens, num_tokens], 0 or the lowest number
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The family's own eager attention; what goes in and comes out is written down."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    output, weights = eager(module, query, key, value, attention_mask, **options)
    recorder = getattr(module, RECORDER, None)
    if recorder is not None:
        scale = options.get("scaling") or query.shape[-1] ** -0.5
        recorder(query[0], key[0], value[0], output[0], scale)
    return output, weights


AttentionInterface.register(ATTENTION, _watched_attention)
AttentionMaskInterface.register(ATTENTION, eager_mask)


class Reference:
    """Args:
    network: transformers' model, float32.
    weights_by: who read the checkpoint, in words.
    """

    def __init__(self, network: Any, weights_by: str):
        self.network = network.requires_grad_(False).eval()
        self.network.set_attn_implementation(ATTENTION)
        self.weights_by = weights_by
        self.layers_path, self.layers = find_layers(network.base_model, network.config.get_text_config())

    @classmethod
    def load(cls, source: ModelSource, hf_config: Any) -> Reference:
        """Raises what transformers raises where it cannot read the checkpoint."""
        transformers_logging.disable_progress_bar()
        options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
        if source.kind == "folder":
            network = AutoModelForCausalLM.from_pretrained(source.path, **options)
            return cls(network, "transformers")
        if importlib.util.find_spec("accelerate") is not None:
            with contextlib.redirect_stderr(io.StringIO()):  # its progress bar cannot be switched off
                network = AutoModelForCausalLM.from_pretrained(
                    source.path.parent, gguf_file=source.path.name, **options
                )
            return cls(network, "transformers' GGUF reader")
        network = AutoModelForCausalLM.from_config(hf_config, **options)
        weights = loader.iterate_weights(source, hf_config)
        state = {name: tensor.clone() for name, tensor in weights if isinstance(tensor, torch.Tensor)}
        network.load_state_dict(state, strict=not hf_config.tie_word_embeddings)
        return cls(network, "minivllm's GGUF reader, as accelerate is not installed: weights are not verified")

    # ------------------------------------------------------------------ numbers
    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """What follows each position. # [num_tokens, vocab_size]"""
        logits: torch.Tensor = self.network(torch.tensor([token_ids]), use_cache=False).logits[0].float()
        return logits

    @torch.inference_mode()
    def trace(self, token_ids: list[int], layer_inputs: Mapping[int, torch.Tensor] | None = None) -> ReferenceTrace:
        """Every intermediate value of one forward.

        layer_inputs: layer -> [rows, hidden_size], put in place of the last `rows` positions of its input. What the
        layer would have been given stays on record as the point `layers.N.input`.
        """
        trace = ReferenceTrace(len(token_ids))
        base = self.network.base_model
        with ExitStack() as hooks:
            for path, module in base.named_modules():
                if path and not isinstance(module, nn.ModuleList):
                    hooks.enter_context(_Removing(module.register_forward_hook(trace.output_hook(path))))
                if path.endswith(("mlp.down_proj",)):
                    hook = module.register_forward_pre_hook(trace.input_hook(f"{path.rpartition('.')[0]}.activation"))
                    hooks.enter_context(_Removing(hook))
                if getattr(module, "is_causal", None) is not None or path.endswith(("attn", "attention")):
                    setattr(module, RECORDER, trace.attention_recorder(path))
                    hooks.callback(delattr, module, RECORDER)
            for index, layer in enumerate(self.layers):
                given = None if layer_inputs is None else layer_inputs.get(index)
                hook = trace.replace_hook(f"{self.layers_path}.{index}.input", given)
                hooks.enter_context(_Removing(layer.register_forward_pre_hook(hook, with_kwargs=True)))
            output = self.network(torch.tensor([token_ids]), use_cache=False)
        trace.values["logits"] = output.logits[0].float()
        return trace


class ReferenceTrace:
    """values: in the order of computation. attention: path -> query, key, value and scale, for the hypotheses."""

    def __init__(self, num_tokens: int):
        self.num_tokens = num_tokens
        self.values: Values = {}
        self.attention: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]] = {}

    def add(self, point: str, value: Any) -> None:
        """Keep it if it is a tensor with a row for each token."""
        value = value[0] if isinstance(value, tuple) else value
        if isinstance(value, torch.Tensor) and value.dim() >= 3 and value.shape[:2] == (1, self.num_tokens):
            self.values[point] = value[0].flatten(1).float().clone()
        elif isinstance(value, torch.Tensor) and value.dim() == 4 and value.shape[::2] == (1, self.num_tokens):
            self.values[point] = value[0].transpose(0, 1).flatten(1).float().clone()  # heads in front: Gemma's norms

    def output_hook(self, point: str) -> Any:
        return lambda module, args, output: self.add(point, output)

    def input_hook(self, point: str) -> Any:
        return lambda module, args: self.add(point, args[0])

    def replace_hook(self, point: str, given: torch.Tensor | None) -> Any:
        """given: [rows, hidden_size] for the last rows, or None."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            self.add(point, hidden)
            if given is None:
                return None
            hidden = hidden.clone()
            hidden[0, -len(given) :] = given
            return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

        return hook

    def attention_recorder(self, path: str) -> Any:
        """Points `key` and `value` as the cache should hold them, and `context`, what the output projection reads."""

        def record(
            query: torch.Tensor,  # [num_heads, num_tokens, head_size]
            key: torch.Tensor,  # [num_kv_heads, num_tokens, head_size]
            value: torch.Tensor,  # [num_kv_heads, num_tokens, head_size]
            output: torch.Tensor,  # [num_tokens, num_heads, head_size]
            scale: float,
        ) -> None:
            self.attention[path] = (query.clone(), key.clone(), value.clone(), scale)
            self.values[f"{path}.key"] = key.transpose(0, 1).flatten(1).clone()
            self.values[f"{path}.value"] = value.transpose(0, 1).flatten(1).clone()
            self.values[f"{path}.context"] = output.flatten(1).clone()

        return record


class _Removing:
    """A hook's handle as a context manager that removes it."""

    def __init__(self, handle: Any):
        self.handle = handle

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        self.handle.remove()


def find_layers(base: nn.Module, config: Any) -> tuple[str, nn.ModuleList]:
    """The decoder's list of layers and its path (`layers`, `h`, `decoder.layers`, ...)."""
    for path, module in base.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers:
            return path, module
    raise ValueError(f"{type(base).__name__} has no list of {config.num_hidden_layers} layers")
