"""The whole step: which models have one, and that it computes what their modules compute."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from minivllm.errors import EngineDeadError
from minivllm.kernels.amx import HAS_AMX
from minivllm.models.layers import ModelOptions
from minivllm.models.parallel import TensorParallel
from minivllm.models.registry import model_class
from minivllm.models.whole_step import decoder_weights
from minivllm.worker import collectives as collectives_module
from minivllm.worker.collectives import SharedMemoryCollectives
from minivllm.worker.cpu import CPUPath
from tests.models.paged import PagedRun
from tests.models.tiny import ours_from, tiny_config, tiny_hf, weights_of
from tests.tolerances import KERNEL_ERROR_FACTOR, WHOLE_STEP
from tests.worker.rank_threads import on_ranks

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


# ------------------------------------------------------------------ several ranks
WIDE = {**SIZES, "intermediate_size": 448}  # every rank's part is a multiple of 32
STEPS: list[dict[str, list[int]]] = [
    {"a": list(range(3, 60)), "b": list(range(40, 63))},
    {"a": [7], "b": [8, 9, 10], "c": list(range(95))},
    {"b": [11]},
    {"a": [12], "b": [13], "c": [14]},
]


def rank_model(network: Any, rank: int, size: int, collectives: Any) -> Any:
    """One rank's part of a network, in bfloat16."""
    parallel = TensorParallel.of(network.config, rank, size, collectives, share_heads=True)
    model = model_class(network.config)(parallel.narrow(network.config), ModelOptions(BF16, parallel=parallel))
    model.load_weights((name, x[parallel.part_of(name) or ...]) for name, x in weights_of(network).items())
    return model.eval()


def steps_of(model: Any, steps: list[dict[str, list[int]]]) -> list[torch.Tensor]:
    """Every step's hidden states, by the whole step. # [num_tokens, hidden_size] each"""
    run = PagedRun(model, block_size=16, num_blocks=32)
    run.model = whole = WholeStep(model, run.kv_caches)
    assert (whole.path.decoder_weights is not None) == HAS_AMX
    return [torch.cat(list(run.step(step).values())) for step in steps]


def steps_of_ranks(network: Any, size: int, steps: list[dict[str, list[int]]] = STEPS) -> list[list[torch.Tensor]]:
    return on_ranks(size, lambda rank, found: steps_of(rank_model(network, rank, size, found), steps))


@pytest.mark.parametrize("has_cores", [True, False])
@pytest.mark.parametrize(("size", "num_kv_heads"), [(2, 2), (3, 2), (2, 3)])
def test_ranks_compute_what_one_computes_all_the_same_bits(
    size: int, num_kv_heads: int, has_cores: bool, monkeypatch: pytest.MonkeyPatch
):
    """With biases, which must be in the sum once; three heads of two ranks have one that both share. Right is the
    network in float32, of weights in bfloat16."""
    monkeypatch.setattr(collectives_module.os, "sched_getaffinity", lambda _: range(size if has_cores else 1))
    biases = {"attention_bias": True, "mlp_bias": True}
    network = tiny_hf(tiny_config("LlamaConfig", **WIDE, **biases, num_key_value_heads=num_kv_heads))
    for parameter in network.parameters():
        parameter.copy_(parameter.bfloat16())
    exact_run = PagedRun(ours_from(network), block_size=16, num_blocks=32)
    one_rank = steps_of(ours_from(network, ModelOptions(BF16)), STEPS)
    first, *others = steps_of_ranks(network, size)
    for step, ours, usual in zip(STEPS, first, one_rank, strict=True):
        exact = torch.cat(list(exact_run.step(step).values()))  # [num_tokens, hidden_size]
        error, usual_error = ((found.float() - exact).square().mean().sqrt() for found in (ours, usual))
        assert 0 < error <= KERNEL_ERROR_FACTOR * usual_error
    for other in others:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, other, strict=True))


def test_rows_that_do_not_fit_a_slot_go_in_pieces(monkeypatch: pytest.MonkeyPatch):
    network = tiny_hf(tiny_config("LlamaConfig", **WIDE))
    expected = steps_of_ranks(network, 2)
    monkeypatch.setattr(collectives_module, "SLOT_BYTES", 40 * 384 * 2)  # 32 rows at once
    found = steps_of_ranks(network, 2)
    for ours, whole in zip(found[0], expected[0], strict=True):
        assert torch.equal(ours, whole)


def test_slots_of_less_than_a_piece_leave_it_to_the_modules(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(collectives_module, "SLOT_BYTES", 31 * 384 * 2)
    assert tables_of(tiny_hf(tiny_config("LlamaConfig", **WIDE)), 2) == [False, False]


def tables_of(network: Any, size: int, *, cannot: int | None = None) -> list[bool]:
    """Which ranks have a table. cannot: a rank with caches that no table takes."""

    def has_one(rank: int, collectives: SharedMemoryCollectives) -> bool:
        model = rank_model(network, rank, size, collectives)
        caches = PagedRun(model, block_size=16).kv_caches
        if rank == cannot:
            caches = [tuple(cache.to(torch.int8) for cache in layer) for layer in caches]
        return decoder_weights(model, caches) is not None

    return on_ranks(size, has_one)


def test_all_ranks_have_one_or_none_has():
    network = tiny_hf(tiny_config("LlamaConfig", **WIDE))
    assert tables_of(network, 2) == [HAS_AMX] * 2
    assert tables_of(network, 3, cannot=1) == [False] * 3


def test_a_rank_that_stops_in_the_middle_of_a_step_is_named():
    network = tiny_hf(tiny_config("LlamaConfig", **WIDE))

    def stop_early(rank: int, collectives: SharedMemoryCollectives) -> None:
        model = rank_model(network, rank, 2, collectives)
        if rank == 1:  # the sum behind the embedding, and no step
            decoder_weights(model, PagedRun(model, block_size=16).kv_caches)
            model.embed(torch.tensor([7]))
            collectives.close()
        else:
            with pytest.raises(EngineDeadError, match="rank 1 of this model has ended"):
                steps_of(model, [{"a": [7]}])

    on_ranks(2, stop_early)


def test_a_rank_that_is_stuck_in_a_step_is_not_waited_for_forever(monkeypatch: pytest.MonkeyPatch):
    network = tiny_hf(tiny_config("LlamaConfig", **WIDE))
    is_over = threading.Event()

    def hang(rank: int, collectives: SharedMemoryCollectives) -> None:
        model = rank_model(network, rank, 2, collectives)
        if rank == 1:
            decoder_weights(model, PagedRun(model, block_size=16).kv_caches)
            model.embed(torch.tensor([7]))
            is_over.wait(60)
        else:
            monkeypatch.setattr(collectives_module, "PATIENCE_SECONDS", 0.05)
            with pytest.raises(EngineDeadError, match="rank 1 has not answered for 0.05 seconds"):
                steps_of(model, [{"a": [7]}])
            is_over.set()

    on_ranks(2, hang)
