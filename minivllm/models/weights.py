"""How weights come into a model: every module says which tensors it wants, one function hands them out.

The module tree of a model has the names of the Hugging Face checkpoint, so a module's path is the tensor's name:
`model.layers.3.mlp.down_proj` wants `model.layers.3.mlp.down_proj.weight`. A fused module (`qkv_proj`) wants the
tensors of its shards, which are its siblings (`q_proj`, `k_proj`, `v_proj`).

Knows no architecture, no file format and no arithmetic. Called by: the `load_weights` of every model. Twin in vLLM:
vllm/model_executor/models/utils.py (AutoWeightsLoader), and the `weight_loader` attribute of its parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from minivllm.errors import ConfigError
from minivllm.models.grouped import GroupedWeight


@dataclass(frozen=True)
class WeightSlot:
    """One tensor that a module waits for. `put` copies it: the tensor may be a view of a file."""

    shape: tuple[int, ...]
    put: Callable[[Any], object]  # a tensor; a slot of a matrix takes a GroupedWeight as well


@runtime_checkable
class TakesWeights(Protocol):
    """A module that owns weights."""

    def weight_slots(self, path: str) -> dict[str, WeightSlot]:
        """Hugging Face name -> slot, for the module that stands at `path` in the model."""
        ...


def weight_slots(model: nn.Module) -> dict[str, WeightSlot]:
    """Every tensor that the model needs, by its Hugging Face name."""
    slots: dict[str, WeightSlot] = {}
    for path, module in model.named_modules():
        if isinstance(module, TakesWeights):
            slots.update(module.weight_slots(path))
    return slots


def load_weights(
    model: nn.Module,
    weights: Iterable[tuple[str, torch.Tensor | GroupedWeight]],
    *,
    optional_prefix: str = "",
    ignored: Collection[str] = (),
) -> None:
    """Give every tensor to its slot.

    optional_prefix: cut from the front of a name that has it (checkpoints of BERT with a head say `bert.`).
    ignored: a name that starts or ends with one of these is skipped when no slot wants it.
    Raises ConfigError naming the tensor that is missing, unexpected, given twice, of a wrong shape, or not
    floating-point.
    """
    slots = weight_slots(model)
    waiting = dict(slots)
    for full_name, tensor in weights:
        name = full_name.removeprefix(optional_prefix)
        slot = waiting.pop(name, None)
        if slot is not None:
            _check_tensor(full_name, tensor, slot)
            slot.put(tensor)
        elif name in slots:
            raise _error(f"tensor {full_name!r} comes twice")
        elif not any(name.startswith(part) or name.endswith(part) for part in ignored):
            raise _error(f"unexpected tensor {full_name[:200]!r} of shape {list(tensor.shape)}")
    if waiting:
        first = next(iter(waiting))
        others = f" and {len(waiting) - 1} others" if len(waiting) > 1 else ""
        raise _error(f"missing tensor {first!r} of shape {list(waiting[first].shape)}{others}")


def _check_tensor(
    name: str,
    tensor: torch.Tensor | GroupedWeight,  # any shape: that is the question
    slot: WeightSlot,
) -> None:
    if tuple(tensor.shape) != slot.shape:
        raise _error(f"tensor {name!r} must have shape {list(slot.shape)}, got {list(tensor.shape)}")
    if isinstance(tensor, torch.Tensor) and not tensor.is_floating_point():
        raise _error(f"tensor {name!r} must be floating-point, got {tensor.dtype}")


def _error(what: str) -> ConfigError:
    return ConfigError(
        f"The weights do not fit the model: {what}. Do config.json and the weights come from the same place?",
        parameter="model",
    )
