"""The start-up settings: every bound of every number, every choice, and what depends on each other."""

import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from minivllm.config import (
    DEFAULT_MAX_MODEL_LEN,
    CacheConfig,
    DeviceConfig,
    EngineConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    SpeculativeConfig,
    check_generation_config,
    check_quantization,
    choose_max_model_len,
)
from minivllm.errors import ConfigError, show

INT32, INT64 = 2**31 - 1, 2**63
HUGE = 10**5000  # more digits than Python prints


def model_config(**changes: Any) -> ModelConfig:
    return ModelConfig(**({"name": "tiny", "dtype": "float32", "max_model_len": 64, "vocab_size": 100} | changes))


def scheduler_config(**changes: Any) -> SchedulerConfig:
    return SchedulerConfig(**changes)


def cache_config(**changes: Any) -> CacheConfig:
    return CacheConfig(**changes)


def engine_config(**changes: Any) -> EngineConfig:
    return EngineConfig(model_config(), CacheConfig(), SchedulerConfig(), **changes)


Builder = Callable[..., Any]
BOUNDS: list[tuple[Builder, str, int, int]] = [
    (model_config, "max_model_len", 1, INT32),
    (model_config, "vocab_size", 1, INT32),
    (cache_config, "block_size", 1, 1024),
    (cache_config, "kv_cache_memory_bytes", 1, 2**60),
    (cache_config, "num_gpu_blocks_override", 2, INT32),  # block 0 is the null block
    (scheduler_config, "max_num_seqs", 1, 65536),
    (scheduler_config, "max_num_batched_tokens", 1, INT32),
    (scheduler_config, "max_model_len", 1, INT32),
    (scheduler_config, "long_prefill_token_threshold", 0, INT32),
    (engine_config, "seed", -INT64, INT64 - 1),
]
IDS = [f"{build.__name__.removesuffix('_config')}.{field}" for build, field, _, _ in BOUNDS]


def refused(build: Builder, field: str, value: Any, parameter: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        build(**{field: value})
    assert caught.value.parameter == (parameter or field)
    message = str(caught.value)
    assert message.startswith(f"{parameter or field} must be ") and len(message) < 400
    return message


@pytest.mark.parametrize(("build", "field", "low", "high"), BOUNDS, ids=IDS)
def test_a_number_is_accepted_at_both_bounds_and_refused_beyond_them(build: Builder, field: str, low: int, high: int):
    for value in (low, high):
        assert getattr(build(**{field: value}), field) == value
    for value in (low - 1, high + 1):
        assert refused(build, field, value) == f"{field} must be an integer in [{low}, {high}], got {value}."


@pytest.mark.parametrize("junk", [True, 16.0, math.nan, math.inf, "16", "", b"1", [16], {}, HUGE, -HUGE], ids=show)
@pytest.mark.parametrize(("build", "field"), [bound[:2] for bound in BOUNDS], ids=IDS)
def test_no_number_takes_junk(build: Builder, field: str, junk: Any):
    """An integer of 5000 digits was a ValueError of Python's: the message tried to print it."""
    refused(build, field, junk)


@pytest.mark.parametrize(("build", "field"), [bound[:2] for bound in BOUNDS], ids=IDS)
def test_none_is_a_value_only_for_the_two_sizes_of_the_cache(build: Builder, field: str):
    if field in ("kv_cache_memory_bytes", "num_gpu_blocks_override"):
        assert getattr(build(**{field: None}), field) is None
    else:
        refused(build, field, None)


@pytest.mark.parametrize("share", [1e-300, 0.25, 0.5, 1.0, 1])
def test_a_share_of_the_memory_is_above_0_and_at_most_1(share: float):
    assert CacheConfig(gpu_memory_utilization=share).gpu_memory_utilization == share


@pytest.mark.parametrize(
    "junk", [0, 0.0, -0.1, 1.0000001, 2, math.nan, math.inf, -math.inf, True, "0.5", None, [0.5], HUGE], ids=show
)
def test_another_share_of_the_memory_is_refused(junk: Any):
    assert "a share in (0, 1]" in refused(cache_config, "gpu_memory_utilization", junk)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_computes_in_float32_or_bfloat16(dtype: Any):
    assert model_config(dtype=dtype).dtype == dtype


@pytest.mark.parametrize("junk", ["float16", "int8", "auto", "Float32", "", None, 32, [], "x" * 10_000], ids=show)
def test_another_dtype_is_refused_with_the_choices(junk: Any):
    assert "float32, bfloat16, got " in refused(model_config, "dtype", junk)


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_the_policies(policy: str):
    assert SchedulerConfig(policy=policy).policy == policy


@pytest.mark.parametrize("junk", ["lifo", "FCFS", "", None, 0, ["fcfs"]], ids=show)
def test_another_policy_is_refused_under_the_name_of_its_flag(junk: Any):
    assert "fcfs, priority, got " in refused(scheduler_config, "policy", junk, parameter="scheduling_policy")


def test_without_chunks_the_budget_must_hold_the_longest_prompt():
    whole = {"enable_chunked_prefill": False, "max_model_len": 100}
    assert SchedulerConfig(**whole, max_num_batched_tokens=100).max_num_batched_tokens == 100
    with pytest.raises(
        ConfigError, match=r"at least max_model_len \(100\) when chunked.*got 99.*Raise it, lower"
    ) as caught:
        SchedulerConfig(**whole, max_num_batched_tokens=99)
    assert caught.value.parameter == "max_num_batched_tokens"
    assert SchedulerConfig(max_model_len=100, max_num_batched_tokens=1).enable_chunked_prefill


# ------------------------------------------------------------------ speculation
NGRAM = {"method": "ngram", "num_speculative_tokens": 4}
DRAFT_MODEL = {"method": "draft_model", "num_speculative_tokens": 4, "model": "org/small"}


@pytest.mark.parametrize(
    ("given", "lengths"),
    [
        ({}, (2, 4)),
        ({"prompt_lookup_max": 3}, (2, 3)),
        ({"prompt_lookup_max": 1}, (1, 1)),
        ({"prompt_lookup_min": 5}, (5, 5)),
        ({"prompt_lookup_min": 1, "prompt_lookup_max": 6}, (1, 6)),
    ],
    ids=str,
)
def test_the_runs_that_are_looked_up(given: dict[str, Any], lengths: tuple[int, int]):
    config = SpeculativeConfig.from_dict(NGRAM | given)
    assert config is not None and (config.shortest_lookup, config.longest_lookup) == lengths


def test_no_speculation_is_none_and_a_draft_model_is_a_name_or_a_path():
    assert SpeculativeConfig.from_dict(None) is None
    for model in ("org/small", Path("small.gguf")):
        config = SpeculativeConfig.from_dict(DRAFT_MODEL | {"model": model})
        assert config is not None and config.model == model and config.disable_by_batch_size == 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "must be a dict, got []"),
        ("ngram", "must be a dict, got 'ngram'"),
        ({}, "speculative_config.method is missing"),
        ({"method": "ngram"}, "speculative_config.num_speculative_tokens is missing"),
        (
            NGRAM | {"speculative_disable": 3},
            "has no field 'speculative_disable'; it has method, num_speculative_tokens",
        ),
        (NGRAM | {"method": "eagle"}, "speculative_config.method must be one of ngram, draft_model, got 'eagle'"),
        (NGRAM | {"num_speculative_tokens": 0}, "must be an integer in [1, 128], got 0"),
        (NGRAM | {"num_speculative_tokens": 129}, "must be an integer in [1, 128], got 129"),
        (NGRAM | {"num_speculative_tokens": True}, "must be an integer in [1, 128], got True"),
        (NGRAM | {"prompt_lookup_max": 0}, "prompt_lookup_max must be an integer in [1, 64], got 0"),
        (NGRAM | {"prompt_lookup_max": 2, "prompt_lookup_min": 3}, "must be at most prompt_lookup_max (2), got 3"),
        (NGRAM | {"model": "org/small"}, 'model belongs to method "draft_model" and must be left out with "ngram"'),
        (NGRAM | {"disable_by_batch_size": 0}, "disable_by_batch_size must be an integer in [1, "),
        (NGRAM | {"min_acceptance_rate": 1.5}, "min_acceptance_rate must be a share in [0, 1], got 1.5"),
        (NGRAM | {"min_acceptance_rate": math.nan}, "min_acceptance_rate must be a share in [0, 1], got nan"),
        (DRAFT_MODEL | {"model": None}, "must name a model"),
        (DRAFT_MODEL | {"model": 5}, "must name a model"),
        (DRAFT_MODEL | {"prompt_lookup_max": 3}, 'prompt_lookup_max belongs to method "ngram"'),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_wrong_field_of_speculation_is_refused_in_words(given: Any, message: str):
    with pytest.raises(ConfigError) as caught:
        SpeculativeConfig.from_dict(given)
    assert message in str(caught.value) and caught.value.parameter == "speculative_config"


@pytest.mark.parametrize("build", [model_config, cache_config, scheduler_config, engine_config])
def test_nothing_is_changed_after_construction(build: Builder):
    record = build()
    for name in record.__dataclass_fields__:
        with pytest.raises(FrozenInstanceError):
            setattr(record, name, None)


# ------------------------------------------------------------------ the context length
@pytest.mark.parametrize(
    ("requested", "limit", "chosen"),
    [
        (None, 2048, 2048),
        (None, 131_072, DEFAULT_MAX_MODEL_LEN),  # a long context is asked for, not stumbled into
        (None, None, DEFAULT_MAX_MODEL_LEN),
        (131_072, 131_072, 131_072),
        (1, 2048, 1),
        (10_000, None, 10_000),
    ],
)
def test_the_context_is_what_was_asked_for_within_what_the_model_knows(requested: Any, limit: Any, chosen: Any):
    assert choose_max_model_len(requested, limit) == chosen


@pytest.mark.parametrize(("requested", "limit"), [(2049, 2048), (INT32, 8192)])
def test_more_context_than_the_model_was_made_for_is_refused(requested: Any, limit: Any):
    with pytest.raises(
        ConfigError, match=f"at most {limit}, the context this model was made for, got {requested}"
    ) as caught:
        choose_max_model_len(requested, limit)
    assert caught.value.parameter == "max_model_len"


@pytest.mark.parametrize("junk", [0, -1, True, 1.5, "64", math.nan, INT32 + 1, HUGE], ids=show)
@pytest.mark.parametrize("limit", [None, 2048])
def test_a_context_that_is_no_count_is_refused(junk: Any, limit: Any):
    with pytest.raises(ConfigError, match="max_model_len must be an integer in"):
        choose_max_model_len(junk, limit)


# ------------------------------------------------------------------ the device
@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "cuda:0", "cuda:15"])
def test_names_of_devices(name: str):
    assert DeviceConfig(name, True) == DeviceConfig(device=name, enforce_eager=True)
    assert EngineConfig(model_config(), CacheConfig(), SchedulerConfig()).device == DeviceConfig("auto", False)


@pytest.mark.parametrize("junk", ["gpu", "cuda:", "cuda:-1", "cuda:x", "cuda:1 ", "cuda:1\n", "cpu:0", "CPU", "", 0])
def test_what_is_no_device_is_refused(junk: Any):
    with pytest.raises(ConfigError, match="device must be auto, cpu, cuda or cuda:NUMBER, got ") as caught:
        DeviceConfig(junk)
    assert caught.value.parameter == "device"


@pytest.mark.parametrize("junk", ["true", 0, 1, None])
def test_enforce_eager_is_yes_or_no(junk: Any):
    with pytest.raises(ConfigError, match="enforce_eager must be true or false, got ") as caught:
        DeviceConfig("cpu", junk)
    assert caught.value.parameter == "enforce_eager"


# ------------------------------------------------------------------ what is not built
@pytest.mark.parametrize("name", ["pipeline_parallel_size", "data_parallel_size"])
def test_one_device_only(name: str):
    assert getattr(ParallelConfig(**{name: 1}), name) == 1
    for value in (0, -1, 2, 4, True, 1.0, "1", None):
        with pytest.raises(ConfigError, match=f"{name} must be ") as caught:
            ParallelConfig(**{name: value})
        assert caught.value.parameter == name
    with pytest.raises(ConfigError, match="must be 1, got 2: more is not built.*tensor_parallel_size spreads"):
        ParallelConfig(**{name: 2})


def test_a_model_may_be_spread_over_several_devices_by_this_process_or_by_ray():
    assert ParallelConfig(4).tensor_parallel_size == 4 and ParallelConfig().distributed_executor_backend == "mp"
    assert ParallelConfig(2, distributed_executor_backend="ray").distributed_executor_backend == "ray"
    for value in (0, -1, 1025, True, 2.0, "2", None):
        with pytest.raises(ConfigError, match="tensor_parallel_size must be an integer in .1, 1024., got ") as caught:
            ParallelConfig(value)
        assert caught.value.parameter == "tensor_parallel_size"
    with pytest.raises(ConfigError, match="one of mp, ray, got 'uni'") as caught:
        ParallelConfig(2, distributed_executor_backend="uni")
    assert caught.value.parameter == "distributed_executor_backend"


def test_weights_are_quantised_as_asked_and_a_files_own_bits_are_a_gguf_files():
    for is_gguf in (False, True):
        assert check_quantization(None, is_gguf) is check_quantization("none", is_gguf) is None
        for name in ("int8", "int4", "int4+bf16"):
            assert check_quantization(name, is_gguf) == name
    for name in ("gguf", "gguf+bf16"):
        assert check_quantization(name, True) == name
        with pytest.raises(ConfigError, match=r"is for \.gguf files, and this model is none") as caught:
            check_quantization(name, False)
        assert caught.value.parameter == "quantization"
    for requested in ("awq", "fp8", "", "int8+bf16", 4):
        with pytest.raises(ConfigError, match="quantization must be one of int8, int4, gguf, ") as caught:
            check_quantization(requested, True)  # type: ignore[arg-type]
        assert caught.value.parameter == "quantization"


def test_the_models_own_defaults_or_none():
    check_generation_config("auto")
    check_generation_config("vllm")
    for value in ("", "AUTO", None, [], 5):
        with pytest.raises(ConfigError, match="generation_config must be one of auto, vllm"):
            check_generation_config(value)
