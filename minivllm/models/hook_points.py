"""Hook points: the places of a network where somebody may read or change values, under the names of transformers.

    "model.layers.3.self_attn"        what transformers' module of this name returns, one row per token
    "model.layers.3.self_attn.in"     what is given to it
    "layers.3.attn.out"               the first one's short name: no prefix, any attention is attn, .out may stay away
    "layers.*.mlp"                    one for each layer; * is one part of a name

Where our networks compute two of transformers' modules as one (q, k and v; a sum and the norm behind it), the point
knows which columns, or which argument of a neighbour, is the value that transformers would have there.

Knows no request and no step: a point reads [num_tokens, ...] and writes some rows of it. Called by worker/hooks.py.
Twin in vLLM: none; in TransformerLens HookPoint, in nnsight Envoy.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from minivllm.errors import InvalidRequestError
from minivllm.models.bert import BertModel
from minivllm.models.llama import LlamaForCausalLM

Changes = Sequence[tuple[slice, torch.Tensor]]  # rows, and what to put there: [num_rows, ...]

PREFIXES = frozenset({"model", "transformer", "gpt_neox", "decoder", "bert", "encoder"})
SHORT = MappingProxyType(
    {"self_attn": "attn", "attention": "attn", "h": "layers", "layer": "layers"}
    | {"embed_tokens": "embed", "wte": "embed", "embed_in": "embed", "word_embeddings": "embed"}
)


# ------------------------------------------------------------------ where the value is
class Rows:
    """The value is a tensor with a row per token: what a module returns, or its first argument."""

    def read(self, payload: Any, num_tokens: int) -> torch.Tensor:  # [num_tokens, ...]
        """payload: a tensor, or a tuple that starts with it. Raises ValueError: it has no row per token."""
        return _rows_of(_first(payload), num_tokens)

    def write(self, payload: Any, num_tokens: int, changes: Changes) -> Any:
        """The payload with some rows changed; the given one stays as it is, and so do all other rows."""
        changed = _first(payload).clone()
        for rows, values in changes:
            self._part(_rows_of(changed, num_tokens))[rows] = values
        return (changed, *payload[1:]) if isinstance(payload, tuple) else changed

    def _part(self, rows: torch.Tensor) -> torch.Tensor:  # [num_tokens, ...], a view of rows: the same shape here
        return rows


class Columns(Rows):
    """One of several outputs that are computed by one product."""

    def __init__(self, start: int, stop: int):
        self.columns = slice(start, stop)

    def read(self, payload: Any, num_tokens: int) -> torch.Tensor:  # [num_tokens, stop - start]
        return self._part(super().read(payload, num_tokens))

    def _part(self, rows: torch.Tensor) -> torch.Tensor:  # [num_tokens, all columns]
        return rows[:, self.columns]


class ResidualSum(Rows):
    """The residual stream: hidden_states + residual, which our layers hand on as two (models/llama.py)."""

    def read(self, payload: Any, num_tokens: int) -> torch.Tensor:  # [num_tokens, hidden_size]
        hidden_states, residual = payload[:2]
        return hidden_states if residual is None else hidden_states + residual

    def write(self, payload: Any, num_tokens: int, changes: Changes) -> Any:
        hidden_states, residual = payload[:2]
        hidden_states = hidden_states.clone()
        residual = None if residual is None else residual.clone()
        for rows, values in changes:
            hidden_states[rows] = values
            if residual is not None:
                residual[rows] = 0
        return (hidden_states, residual, *payload[2:])


def _first(payload: Any) -> torch.Tensor:  # any shape
    return payload[0] if isinstance(payload, tuple) and payload else payload


def _rows_of(tensor: Any, num_tokens: int) -> torch.Tensor:  # [num_tokens, ...], a view
    """transformers' modules see all tokens of a step as one sequence: [1, num_tokens, ...], or flat."""
    if isinstance(tensor, torch.Tensor):
        if tensor.ndim > 2 and tensor.shape[:2] == (1, num_tokens):
            return tensor[0]
        if tensor.ndim > 1 and tensor.shape[0] == num_tokens:
            return tensor
    got = list(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
    raise ValueError(f"there is no row for each of the {num_tokens} tokens here, but {got}")


@dataclass(frozen=True, slots=True)
class HookPoint:
    """name: as transformers has it, with `.in` behind it for what is given to the module."""

    name: str
    module: nn.Module  # of ours, whose call is watched
    is_input: bool  # its arguments, not what it returns
    view: Rows


# ------------------------------------------------------------------ the points of a network
def hook_points(model: nn.Module) -> dict[str, HookPoint]:
    """Every point of a network of models/registry.py, by its full name, in the order of computation."""
    if isinstance(model, LlamaForCausalLM):
        found = _decoder_points(model)
    elif isinstance(model, BertModel):
        found = _encoder_points(model)
    else:
        found = _foreign_points(model)
    return {point.name: point for point in found}


def _decoder_points(model: LlamaForCausalLM) -> Iterator[HookPoint]:
    prefix = "model." if model.has_head else ""
    yield HookPoint(f"{prefix}embed_tokens", model.model.layers[0], True, ResidualSum())  # with Gemma's factor
    for index, layer in enumerate(model.model.layers):
        yield from _layer_points(f"{prefix}layers.{index}", layer)
    yield HookPoint(f"{prefix}norm", model, False, Rows())


def _layer_points(name: str, layer: Any) -> Iterator[HookPoint]:
    """The norms in front of attention and MLP are fused with a sum; what they return is their neighbour's input."""
    attention, mlp, plain = layer.self_attn, layer.mlp, Rows()
    has_four_norms = hasattr(layer, "pre_feedforward_layernorm")
    yield HookPoint(f"{name}.in", layer, True, ResidualSum())
    yield HookPoint(f"{name}.input_layernorm", attention, True, plain)
    yield HookPoint(f"{name}.self_attn.in", attention, True, plain)
    yield from _shards(f"{name}.self_attn", attention.qkv_proj)
    for norm in ("q_norm", "k_norm"):
        if getattr(attention, norm) is not None:
            yield HookPoint(f"{name}.self_attn.{norm}", getattr(attention, norm), False, plain)
    yield HookPoint(f"{name}.self_attn.o_proj.in", attention.o_proj, True, plain)
    yield HookPoint(f"{name}.self_attn.o_proj", attention.o_proj, False, plain)
    yield HookPoint(f"{name}.self_attn", attention, False, plain)
    if has_four_norms:  # Gemma-3
        yield HookPoint(f"{name}.post_attention_layernorm", layer.post_attention_layernorm, False, plain)
    before_mlp = "pre_feedforward_layernorm" if has_four_norms else "post_attention_layernorm"
    yield HookPoint(f"{name}.{before_mlp}", mlp, True, plain)
    yield HookPoint(f"{name}.mlp.in", mlp, True, plain)
    yield from _shards(f"{name}.mlp", mlp.gate_up_proj)
    yield HookPoint(f"{name}.mlp.down_proj.in", mlp.down_proj, True, plain)
    yield HookPoint(f"{name}.mlp.down_proj", mlp.down_proj, False, plain)
    yield HookPoint(f"{name}.mlp", mlp, False, plain)
    if has_four_norms:
        yield HookPoint(f"{name}.post_feedforward_layernorm", layer.post_feedforward_layernorm, False, plain)
    yield HookPoint(name, layer, False, ResidualSum())


def _shards(name: str, linear: Any) -> Iterator[HookPoint]:
    start = 0
    for shard, width in linear.shards.items():
        yield HookPoint(f"{name}.{shard}", linear, False, Columns(start, start + width))
        start += width


def _encoder_points(model: BertModel) -> Iterator[HookPoint]:
    plain = Rows()
    yield HookPoint("embeddings", model.embeddings, False, plain)
    for index, layer in enumerate(model.encoder["layer"]):
        name = f"encoder.layer.{index}"
        attention, output = layer.attention["output"], layer.output
        yield HookPoint(f"{name}.in", layer, True, plain)
        yield from _shards(f"{name}.attention.self", layer.attention["self"]["qkv"])
        yield HookPoint(f"{name}.attention.self", attention, True, plain)
        yield HookPoint(f"{name}.attention.output.dense", attention.dense, False, plain)
        yield HookPoint(f"{name}.attention.output", attention, False, plain)
        yield HookPoint(f"{name}.attention", attention, False, plain)
        yield HookPoint(f"{name}.intermediate.dense", layer.intermediate["dense"], False, plain)
        yield HookPoint(f"{name}.intermediate", output, True, plain)
        yield HookPoint(f"{name}.output.dense", output.dense, False, plain)
        yield HookPoint(f"{name}.output", output, False, plain)
        yield HookPoint(name, layer, False, plain)


def _foreign_points(model: Any) -> Iterator[HookPoint]:
    """transformers' own network (models/hf_backend.py): each module has its own name already.

    Left out: what is never called (containers, some dropouts), rotary angles, token ids, the network itself, its head.
    """
    base = f"{model.network.base_model_prefix}."
    for name, module in model.network.named_modules():
        is_outside = isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Dropout) or "rotary_emb" in name
        if name.startswith(base) and not is_outside and name != f"{base}decoder":
            if not isinstance(module, nn.Embedding):
                yield HookPoint(f"{name}.in", module, True, Rows())
            yield HookPoint(name, module, False, Rows())


# ------------------------------------------------------------------ names
def short_name(name: str) -> str:
    """model.layers.3.self_attn.out -> layers.3.attn"""
    parts = name.removesuffix(".out").split(".")
    while len(parts) > 1 and parts[0] in PREFIXES:
        del parts[0]
    return ".".join(SHORT.get(part, part) for part in parts)


def find_points(points: Mapping[str, HookPoint], name: str) -> list[HookPoint]:
    """The points that a name, short or full, or a pattern stands for.

    Raises InvalidRequestError with the names that come near, when there is none.
    """
    if isinstance(name, str):
        pattern = re.compile(re.escape(short_name(name)).replace(r"\*", r"[^.]+"))
        found = [point for point in points.values() if pattern.fullmatch(short_name(point.name))]
        if found:
            return found
    raise InvalidRequestError(
        f"There is no hook point {name!r}. Near it: {', '.join(_near(points, str(name)))}. "
        f"llm.hook_points() lists all {len(points)}.",
        parameter="name",
    )


def _near(names: Iterable[str], wanted: str) -> list[str]:
    by_short = {short_name(name): name for name in names}
    close = difflib.get_close_matches(short_name(wanted), by_short, n=5, cutoff=0.0)
    return [by_short[short] for short in close]
