"""plan_engine(): before a weight is read it says what a loaded engine then really reserves."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from golden.tiny import TINY, tensor_shapes, write_tiny_model
from minivllm import LLM, ConfigError, ModelNotFoundError
from minivllm.engine.planning import EnginePlan, plan_engine
from minivllm.models import loader
from minivllm.worker.kv_cache import device_memory_bytes
from tests.models import checkpoints
from tests.tolerances import PLANNED_WEIGHTS_RTOL

# Widths that are multiples of 64, as real models have them: then no packed weight is padded.
WIDTHS = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 320,
}
BERT_WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 320}
GPT2_WIDTHS = {"n_embd": 64, "n_head": 4, "vocab_size": 320}
FAMILIES = {
    "llama": WIDTHS,  # a tied head
    "llama-rope-llama3": WIDTHS,  # a head of its own
    "qwen2": WIDTHS,  # biases
    "qwen3": WIDTHS,
    "mistral": WIDTHS,
    "gemma3": WIDTHS,
    "gpt2": GPT2_WIDTHS,  # through transformers' modules
    "bert-cls": BERT_WIDTHS,  # stores a pooler that nobody loads
}
POOL_BYTES = 1_000_000


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """The folder of a tiny model of the family with those widths."""

    def write(family: str) -> Path:
        model = TINY[family]
        monkeypatch.setitem(TINY, "planned", model._replace(config=model.config | FAMILIES[family]))
        return write_tiny_model("planned", tmp_path / family)

    return write


def engine_plan(model: Path, **settings: Any) -> Any:
    """What a loaded engine reserves."""
    return LLM(model, **settings).llm_engine.plan


def assert_same(plan: EnginePlan, engine: Any) -> None:
    """The pool to the last block; the weights but for the rotary frequencies and such."""
    cache = plan.cache
    assert (cache.num_blocks, cache.block_size, cache.bytes_per_token, cache.pool_bytes) == (
        engine.num_blocks,
        engine.block_size,
        engine.bytes_per_token,
        engine.pool_bytes,
    )
    assert (cache.rule, cache.pool_budget_bytes, cache.device_bytes) == (
        engine.rule,
        engine.pool_budget_bytes,
        engine.device_bytes,
    )
    assert abs(cache.weight_bytes - engine.weight_bytes) <= PLANNED_WEIGHTS_RTOL * engine.weight_bytes


# ------------------------------------------------------------------ the same as the engine
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_is_what_a_loaded_engine_reserves(folder: Callable[[str], Path], family: str, dtype: str):
    """Gemma-3 could not be planned at all: it computes a number of its own, which the meta device has not."""
    settings = {"dtype": dtype, "kv_cache_memory_bytes": POOL_BYTES}
    model = folder(family)
    assert_same(plan_engine(model, **settings), engine_plan(model, **settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_gpu_blocks_override": 37},
        {"num_gpu_blocks_override": 37, "kv_cache_memory_bytes": POOL_BYTES},  # the first one wins
        {"kv_cache_memory_bytes": POOL_BYTES, "block_size": 5},
        {"kv_cache_memory_bytes": POOL_BYTES, "max_model_len": 100, "max_num_seqs": 3},
    ],
    ids=str,
)
def test_every_way_to_size_the_pool_is_the_engines(folder: Callable[[str], Path], settings: dict[str, Any]):
    model = folder("llama")
    assert_same(plan_engine(model, **settings), engine_plan(model, **settings))


def test_a_share_of_the_memory_leaves_out_the_weights(folder: Callable[[str], Path]):
    model = folder("llama")
    share = 4e6 / device_memory_bytes()
    plan = plan_engine(model, gpu_memory_utilization=share).cache
    assert plan.pool_budget_bytes == int(share * plan.device_bytes) - plan.weight_bytes
    assert plan.num_blocks == plan.pool_budget_bytes // plan.bytes_per_block
    engine = engine_plan(model, gpu_memory_utilization=share)
    assert plan.num_blocks - engine.num_blocks in (0, 1)  # a few bytes of rotary frequencies may cost a block


def test_an_override_decides_alone(tiny_model: Callable[[str], Path]):
    cache = plan_engine(tiny_model("llama"), num_gpu_blocks_override=37).cache
    assert (cache.num_blocks, cache.rule, cache.pool_budget_bytes) == (37, "num_gpu_blocks_override", None)
    assert cache.num_tokens == 36 * 16  # block 0 is the null block


# ------------------------------------------------------------------ what counts as a weight
def num_stored(family: str, *, without: str = "-") -> int:
    """Numbers in the checkpoint, but for tensors whose names have a certain beginning."""
    return sum(math.prod(shape) for name, shape in tensor_shapes(family).items() if not name.startswith(without))


@pytest.mark.parametrize(
    ("family", "without"), [("llama", "-"), ("llama-rope-yarn", "-"), ("gpt2", "-"), ("bert-cls", "pooler")]
)
def test_every_number_that_stays_in_memory_is_counted_once(
    tiny_model: Callable[[str], Path], family: str, without: str
):
    plan = plan_engine(tiny_model(family), dtype="float32", kv_cache_memory_bytes=POOL_BYTES)
    assert plan.num_parameters == num_stored(family, without=without)
    assert plan.cache.weight_bytes == 4 * plan.num_parameters


@pytest.mark.parametrize("family", ["llama", "phi3"])  # ours, transformers'
@pytest.mark.parametrize(("scale", "num_heads"), [(1.0, 0), (2.0, 1)], ids=["a copy", "a head of its own"])
def test_a_stored_head_counts_only_where_it_differs_from_a_tied_embedding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, scale: float, num_heads: int
):
    """Some checkpoints store the tied head a second time, some say tied and mean it not."""
    config = TINY[family].config | {"tie_word_embeddings": True}
    monkeypatch.setitem(TINY, "tied", TINY[family]._replace(config=config))
    model = write_tiny_model("tied", tmp_path / "m")
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * scale
    save_file(weights, model / "model.safetensors")
    plan = plan_engine(model, kv_cache_memory_bytes=POOL_BYTES)
    assert plan.num_parameters == num_stored("tied") + num_heads * 320 * config["hidden_size"]


def test_a_gguf_file_is_planned_from_its_header(tmp_path: Path):
    weights = checkpoints.hf_weights("llama")
    model = checkpoints.write_gguf_model(tmp_path / "m.gguf", "llama", weights)
    plan = plan_engine(model, dtype="float32", kv_cache_memory_bytes=POOL_BYTES)
    assert plan.num_parameters == sum(weight.size for weight in weights.values())
    assert plan.cache.num_blocks == engine_plan(model, dtype="float32", kv_cache_memory_bytes=POOL_BYTES).num_blocks


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert-cls"])
def test_no_weight_is_read(tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, family: str):
    monkeypatch.setattr(loader, "_iterate_safetensors", lambda *_: pytest.fail("a weight is read"))
    assert plan_engine(tiny_model(family), kv_cache_memory_bytes=POOL_BYTES).num_parameters > 0


# ------------------------------------------------------------------ encoders
def test_an_encoder_keeps_nothing_and_has_room_for_all_that_may_run(tiny_model: Callable[[str], Path]):
    plan = plan_engine(tiny_model("bert-cls"), max_num_seqs=3)
    assert (plan.cache.bytes_per_token, plan.cache.pool_bytes) == (0, 0)
    assert plan.cache.num_blocks == 3 * 128 // 16 + 1  # so that the scheduler never waits for a block
    assert plan.as_dict()["concurrency"] == 3.0
    assert_readable(plan)


# ------------------------------------------------------------------ how it is told
def assert_readable(plan: EnginePlan) -> None:
    """Every row is three texts, and the products in them are right."""
    rows = {label: (value, arithmetic) for label, value, arithmetic in plan.rows()}
    size = getattr(torch, plan.dtype).itemsize
    parameters, factor = numbers(rows["weights"][1])
    assert (parameters, factor) == (plan.num_parameters, size)
    assert parameters * factor == plan.cache.weight_bytes
    assert math.prod(numbers(rows["per token"][1])) == plan.cache.bytes_per_token == numbers(rows["per token"][0])[0]
    assert numbers(rows["blocks"][0]) == [plan.cache.num_blocks]
    num_blocks, null_block, block_size = numbers(rows["tokens"][1])
    assert (num_blocks - null_block) * block_size == numbers(rows["tokens"][0])[0] == plan.cache.num_tokens


def numbers(text: str) -> list[int]:
    """Every integer of a text, without the commas between its digits."""
    return [int(found.replace(",", "")) for found in re.findall(r"\d[\d,]*", text)]


def test_the_table_shows_the_arithmetic(tiny_model: Callable[[str], Path]):
    plan = plan_engine(tiny_model("llama"), dtype="float32", num_gpu_blocks_override=37, max_num_seqs=2)
    assert_readable(plan)
    rows = {label: (value, arithmetic) for label, value, arithmetic in plan.rows()}
    assert rows["per token"] == ("384 bytes", "2 (key, value) x 3 layers x 1 heads x 16 x 4 bytes")
    assert rows["per block"] == ("6,144 bytes", "16 tokens")
    assert rows["tokens"] == ("576", "(37 - 1) x 16")
    value, arithmetic = rows["concurrency"]  # 36 blocks, 8 for a request of 128 tokens
    assert value == "4.50"
    assert arithmetic.endswith("max_model_len 128 that fit at once; at most 2 run, so 2 of full length")


def test_the_dict_is_json_with_the_same_numbers(tiny_model: Callable[[str], Path]):
    plan = plan_engine(tiny_model("llama"), dtype="float32", num_gpu_blocks_override=37)
    assert json.loads(json.dumps(plan.as_dict())) == {
        "model": "llama",
        "dtype": "float32",
        "quantization": None,
        "max_model_len": 128,
        "num_parameters": num_stored("llama"),
        "weight_bytes": 4 * num_stored("llama"),
        "kv_bytes_per_token": 384,
        "block_size": 16,
        "num_blocks": 37,
        "pool_bytes": 37 * 6144,
        "pool_tokens": 576,
        "concurrency": 4.5,
        "device_bytes": device_memory_bytes(),
        "rule": "num_gpu_blocks_override",
    }


# ------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "int3"},
        {"block_size": 0},
        {"max_model_len": 10**6},
        {"max_model_len": 0},
        {"max_num_seqs": 0},
        {"gpu_memory_utilization": 1.5},
        {"gpu_memory_utilization": math.nan},
        {"gpu_memory_utilization": 1e-9},
        {"kv_cache_memory_bytes": 10},
        {"num_gpu_blocks_override": 1},
    ],
    ids=str,
)
def test_what_an_engine_refuses_a_plan_refuses_in_the_same_words(
    tiny_model: Callable[[str], Path], settings: dict[str, Any]
):
    with pytest.raises(ConfigError) as planned:
        plan_engine(tiny_model("llama"), **settings)
    with pytest.raises(ConfigError) as started:
        LLM(tiny_model("llama"), **settings)
    assert planned.value.parameter == started.value.parameter

    def words(error: ConfigError) -> str:
        return re.sub(r"-?[\d,]+ bytes", "N bytes", str(error))  # the toy's packed weights are a little larger

    assert words(planned.value) == words(started.value)


def test_a_folder_that_an_engine_refuses_gives_no_numbers(tiny_model: Callable[[str], Path], tmp_path: Path):
    """Planned was what config.json said, whatever the weights were."""
    model = shutil.copytree(tiny_model("llama"), tmp_path / "m")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"hidden_size": 96}))
    for start in (plan_engine, LLM):
        with pytest.raises(ConfigError, match="hidden_size is 96, but no stored tensor has such a dimension"):
            start(model, num_gpu_blocks_override=37)


def test_a_model_that_is_not_there_is_named():
    with pytest.raises(ModelNotFoundError, match="/no/such/model"):
        plan_engine("/no/such/model")
