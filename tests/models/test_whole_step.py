"""The whole step: which models have one, and that it computes what their modules compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minivllm.kernels.amx import HAS_AMX
from minivllm.models.layers import ModelOptions
from minivllm.models.whole_step import decoder_weights
from minivllm.worker.cpu import CPUPath
from tests.models.paged import PagedRun
from tests.models.tiny import ours_from, tiny_config, tiny_hf
from tests.tolerances import WHOLE_STEP

BF16 = torch.bfloat16
SIZES: dict[str, Any] = {"hidden_size": 384, "intermediate_size": 160, "head_dim": 64}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama with biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "mistral with a window": ("MistralConfig", {"sliding_window": 20}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
}


def build(family: str, *, kv_dtype: torch.dtype = BF16, **options: Any) -> tuple[Any, list[Any]]:
    """A tiny model and its caches."""
    config_class, changes = FAMILIES[family]
    model = ours_from(tiny_hf(tiny_config(config_class, **SIZES, **changes)), ModelOptions(dtype=BF16, **options))
    shapes = [(spec.num_kv_heads, 8, 16, spec.head_size) for spec in model.kv_cache_specs]
    return model, [tuple(torch.zeros(shape, dtype=kv_dtype) for _ in "kv") for shape in shapes]


class WholeStep:
    """Stands in for a model: its step is the whole step."""

    def __init__(self, model: Any, kv_caches: Any):
        self.model = model
        self.path = CPUPath(model, kv_caches)

    def __call__(self, input_ids: torch.Tensor, positions: torch.Tensor, caches: Any, metadata: Any) -> torch.Tensor:
        class Batch:
            attention = metadata

        Batch.input_ids, Batch.positions = input_ids, positions  # type: ignore[attr-defined]
        return self.path.forward(Batch())  # type: ignore[arg-type]


@pytest.mark.parametrize("quantization", [None, "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_what_the_modules_compute(family: str, quantization: str | None):
    """Prompts by the modules, then tokens of two requests, some of them several at a time, and a prompt."""
    model, _ = build(family, quantization=quantization)
    ways = [PagedRun(model, block_size=16, num_blocks=32) for _ in range(2)]
    prompts = {"a": list(range(3, 60)), "b": list(range(40, 63))}
    for way in ways:
        way.step(prompts)
    ways[1].model = whole = WholeStep(model, ways[1].kv_caches)
    assert (whole.path.decoder_weights is not None) == HAS_AMX
    for step in ({"a": [7], "b": [8, 9, 10]}, {"b": [11]}, {"a": [12], "b": [13]}, {"a": list(range(90)), "b": [4]}):
        modules, ours = (way.step(step) for way in ways)
        for name in step:
            difference = (modules[name].float() - ours[name].float()).abs().max()
            assert difference <= WHOLE_STEP * modules[name].float().abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_who_has_one_where_there_is_amx(family: str):
    assert (decoder_weights(*build(family)) is not None) == HAS_AMX


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {"batch_invariant": True}),
        ({}, {"impl": "reference"}),
        ({}, {"quantization": "int8"}),
        ({"head_dim": 32}, {}),
        ({"hidden_size": 390}, {}),
        ({"hidden_act": "gelu_pytorch_tanh"}, {}),
    ],
    ids=str,
)
def test_who_has_none(changes: dict[str, Any], options: dict[str, Any]):
    model = ours_from(tiny_hf(tiny_config("LlamaConfig", **{**SIZES, **changes})), ModelOptions(dtype=BF16, **options))
    caches = [
        tuple(torch.zeros(spec.num_kv_heads, 8, 16, spec.head_size, dtype=BF16) for _ in "kv")
        for spec in model.kv_cache_specs
    ]
    assert decoder_weights(model, caches) is None


def test_quantised_caches_and_other_networks_have_none():
    assert decoder_weights(*build("llama", kv_dtype=torch.int8)) is None
    model, _ = build("llama")
    assert decoder_weights(model, []) is None
    assert decoder_weights(torch.nn.Identity(), [(torch.zeros(1), torch.zeros(1))]) is None


def test_windows_that_alternate_have_none():
    config = tiny_config("Qwen3Config", **SIZES, use_sliding_window=True, sliding_window=20, max_window_layers=1)
    model = ours_from(tiny_hf(config), ModelOptions(dtype=BF16))
    windows = {spec.sliding_window for spec in model.kv_cache_specs}
    assert windows == {None, 20}
    caches = [tuple(torch.zeros(2, 8, 16, 64, dtype=BF16) for _ in "kv") for _ in model.kv_cache_specs]
    assert decoder_weights(model, caches) is None
