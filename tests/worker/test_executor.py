"""Executor: the model and its cache behind two methods, and nothing of it before the cache is there."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch

from minivllm.config import CacheConfig
from minivllm.errors import ConfigError
from minivllm.kernels.paged_attention import KEYS_PER_ITEM
from minivllm.models.linear import weight_bytes
from minivllm.worker.executor import Executor, keep_freed_memory
from minivllm.worker.kv_cache import KVCachePlan, plan_kv_cache
from minivllm.worker.model_runner import ModelRunner
from tests.core.helpers import add, make_request, make_scheduler
from tests.models.tiny import ours_from, tiny_config, tiny_hf

BLOCK_SIZE = 4
NUM_BLOCKS = 11


@pytest.fixture(scope="module")
def model() -> Any:
    return ours_from(tiny_hf(tiny_config("LlamaConfig")))


def make_executor(model: Any, **options: Any) -> Executor:
    return Executor(model, torch.float32, 64, **options)


def make_plan(executor: Executor, num_blocks: int = NUM_BLOCKS) -> KVCachePlan:
    config = CacheConfig(block_size=BLOCK_SIZE, num_gpu_blocks_override=num_blocks)
    return plan_kv_cache(config, executor.kv_cache_specs, executor.dtype, executor.weight_bytes, max_tokens=640)


def runner_of(executor: Executor) -> ModelRunner:
    assert executor._runner is not None
    return executor._runner


def first_tokens(execute: Callable[..., Any], num_steps: int = 3) -> list[list[int]]:
    """What one request draws in its first steps."""
    scheduler = make_scheduler(NUM_BLOCKS, BLOCK_SIZE)
    add(scheduler, make_request("r", range(10, 19)))
    tokens = []
    for _ in range(num_steps):
        step = scheduler.schedule()
        result = execute(step)
        tokens.append(result.sampled_token_ids["r"])
        scheduler.update_from_output(step, result)
    return tokens


def test_a_step_before_the_cache_is_reserved_is_refused(model: Any):
    executor = make_executor(model)
    scheduler = make_scheduler()
    add(scheduler, make_request("r", [1, 2]))
    with pytest.raises(ConfigError, match="initialize_kv_cache comes before the first step"):
        executor.execute_model(scheduler.schedule())
    executor.initialize_kv_cache(make_plan(executor))
    assert len(first_tokens(executor.execute_model)) == 3  # and now it works


def test_the_cache_is_what_the_plan_says(model: Any):
    executor = make_executor(model)
    assert list(executor.kv_cache_specs) == model.kv_cache_specs
    plan = make_plan(executor)
    executor.initialize_kv_cache(plan)
    caches = runner_of(executor).kv_caches
    # three layers, two heads of size 8: head-major, blocks of four tokens
    assert [tuple(cache.shape) for pair in caches for cache in pair] == [(2, NUM_BLOCKS, BLOCK_SIZE, 8)] * 6
    assert {cache.dtype for pair in caches for cache in pair} == {torch.float32}
    assert sum(cache.nbytes for pair in caches for cache in pair) == plan.pool_bytes
    assert plan.weight_bytes == executor.weight_bytes


def test_keys_and_values_have_the_executors_dtype(model: Any):
    executor = Executor(model, torch.bfloat16, 64, impl="reference")  # whose kernels are not run beforehand
    executor.initialize_kv_cache(make_plan(executor))
    caches = runner_of(executor).kv_caches
    assert {cache.dtype for pair in caches for cache in pair} == {torch.bfloat16}
    assert sum(cache.nbytes for pair in caches for cache in pair) == 2 * 3 * 2 * NUM_BLOCKS * BLOCK_SIZE * 8 * 2


def test_weight_bytes_are_those_of_the_loaded_weights(model: Any):
    size = make_executor(model).weight_bytes
    assert size == weight_bytes(model)
    hidden, mlp, kv, vocab = 48, 56, 16, 97
    per_layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * mlp + 2 * hidden
    assert size >= 4 * (3 * per_layer + 2 * vocab * hidden + hidden)  # fp32; a packed weight is padded to whole tiles


def test_the_options_reach_the_runner(model: Any):
    options = {"pooling_type": "MEAN", "causal": False, "batch_invariant": True, "poison": True}
    executor = make_executor(model, **options)
    executor.initialize_kv_cache(make_plan(executor))
    runner = runner_of(executor)
    assert {name: getattr(runner, name) for name in options} == options
    assert (runner.block_size, runner.max_model_len, runner.model) == (BLOCK_SIZE, 64, model)
    assert all(cache.isnan().all() for pair in runner.kv_caches for cache in pair)

    plain = make_executor(model)
    plain.initialize_kv_cache(make_plan(plain))
    runner = runner_of(plain)
    assert (runner.pooling_type, runner.causal, runner.batch_invariant, runner.poison) == ("LAST", True, False, False)


def test_a_step_through_the_executor_is_the_runners_step(model: Any):
    executor = make_executor(model, poison=True)
    executor.initialize_kv_cache(make_plan(executor))
    through = first_tokens(executor.execute_model)
    executor.initialize_kv_cache(make_plan(executor))
    assert first_tokens(runner_of(executor).execute_model) == through


def test_reserving_again_starts_from_nothing(model: Any):
    executor = make_executor(model)
    executor.initialize_kv_cache(make_plan(executor))
    before = first_tokens(executor.execute_model)
    assert set(runner_of(executor).states) == {"r"}
    executor.initialize_kv_cache(make_plan(executor, num_blocks=23))
    assert runner_of(executor).states == {} and runner_of(executor).kv_caches[0][0].shape[1] == 23
    assert first_tokens(executor.execute_model) == before


def test_a_cache_too_large_for_the_machine_names_the_setting(model: Any, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:128] DefaultCPUAllocator: can't allocate memory")

    executor = make_executor(model)
    plan = make_plan(executor)
    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(ConfigError, match="could not reserve a key/value cache of 11 blocks. Lower gpu_mem") as caught:
        executor.initialize_kv_cache(plan)
    assert caught.value.parameter == "gpu_memory_utilization"


# ------------------------------------------------------------------ memory that stays
def test_freed_memory_can_be_kept_on_this_machine(model: Any):
    keep_freed_memory()
    keep_freed_memory()  # every executor calls it: twice is once
    executor = make_executor(model)
    executor.initialize_kv_cache(make_plan(executor))
    assert len(first_tokens(executor.execute_model)) == 3


def test_glibc_is_told_both_thresholds(monkeypatch: pytest.MonkeyPatch):
    """M_MMAP_THRESHOLD is -3 and M_TRIM_THRESHOLD -1 in malloc.h; one without the other changes nothing."""
    calls: list[tuple[int, int]] = []

    class Libc:
        @staticmethod
        def mallopt(parameter: int, value: int) -> int:
            calls.append((parameter, value))
            return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Libc)
    keep_freed_memory()
    assert dict(calls) == {-3: 1 << 30, -1: 2**31 - 1}


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    """musl has no mallopt, and find_library may not know its name at all."""
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    keep_freed_memory()


def test_the_kernels_are_ready_before_the_first_request(model: Any, monkeypatch: pytest.MonkeyPatch):
    """One row went through the network, wrote nothing, and met a context of two items."""
    calls = []
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda *arguments: calls.append(arguments) or forward(*arguments))
    executor = make_executor(model, poison=True)
    executor.initialize_kv_cache(make_plan(executor))
    ((_, input_ids, _, caches, metadata),) = calls
    assert input_ids.tolist() == [0] and metadata.slot_mapping.tolist() == [-1]
    assert metadata.seq_lens[0] > KEYS_PER_ITEM
    assert all(cache.isnan().all() for pair in caches for cache in pair)
