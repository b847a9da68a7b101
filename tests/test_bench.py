"""minivllm bench: counts that are exact, parts that add up, and functions that are back in their places afterwards."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from minivllm import LLM, ConfigError, InvalidRequestError, SamplingParams
from minivllm.bench.measure import Result, Round, measure, percentile
from minivllm.bench.profile import Stopwatch, profile
from minivllm.bench.workloads import WORKLOADS, Workload, jobs_of
from minivllm.kernels.decoder_step import PARTS
from minivllm.models import layers
from minivllm.worker.input_batch import InputBatch
from tests.command import Run

SMALL = Workload("small", 3, (5, 30), (2, 20))
NETWORK = {"embedding", "norms", "rotation", "gate", "cache write", "attention", "products", "logits", "forward"}
OUTSIDE = {"scheduler", "batch", "sampler", "engine"}


@pytest.fixture(scope="module")
def llm(tiny_model: Callable[[str], Path]) -> LLM:
    return LLM(tiny_model("llama"), kv_cache_memory_bytes=4 << 20)


def test_rounds_have_the_same_lengths_and_other_prompts():
    first, again, second = (jobs_of(WORKLOADS["w32"], index, 300, 8192) for index in (0, 0, 1))
    assert first == again and len(first) == 32
    assert [len(a.prompt_token_ids) for a in first] == [len(b.prompt_token_ids) for b in second]
    assert all(a.prompt_token_ids != b.prompt_token_ids for a, b in zip(first, second, strict=True))
    assert all(16 <= len(job.prompt_token_ids) <= 256 and 32 <= job.num_output_tokens <= 128 for job in first)


def test_a_short_context_cuts_the_lengths():
    assert {len(job.prompt_token_ids) for job in jobs_of(WORKLOADS["w32"], 0, 300, 64)} <= set(range(16, 33))


def test_percentiles_are_of_the_nearest_rank():
    assert [percentile(list(range(1, 101)), percent) for percent in (50, 90, 99)] == [50, 90, 99]
    assert percentile([7.0], 50) == percentile([7.0], 99) == 7.0
    result = Result(SMALL, 10, 20, [Round(2.0, [0.5], []), Round(1.0, [0.25], []), Round(4.0, [1.0], [])])
    values = result.as_dict()
    assert (values["seconds"], values["fastest_seconds"], values["slowest_seconds"]) == (2.0, 1.0, 4.0)
    assert (values["output_tokens_per_second"], values["tokens_per_second"]) == (10.0, 15.0)
    assert values["time_to_first_token_ms"] == {"p50": 500.0, "p90": 1000.0, "p99": 1000.0}
    assert values["time_per_output_token_ms"] == {}


def test_a_measured_run_draws_every_token_and_reports_each(llm: LLM):
    jobs, told = jobs_of(SMALL, 0, 320, 128), list[int]()
    result = measure(llm.llm_engine, SMALL, num_rounds=2, advance=told.append)
    assert result.num_output_tokens == sum(job.num_output_tokens for job in jobs)
    assert result.num_prompt_tokens == sum(len(job.prompt_token_ids) for job in jobs)
    assert sum(told) == 3 * result.num_output_tokens, "two rounds and the one before them"
    assert len(result.rounds) == 2
    for one in result.rounds:
        assert len(one.first_token_seconds) == len(one.per_token_seconds) == 3
        assert 0 < max(one.first_token_seconds) < one.seconds


def test_a_stopwatch_gives_each_part_its_own_time():
    watch = Stopwatch()
    inner = watch.around("inner", lambda: time.sleep(0.02))

    def outer_call() -> None:
        time.sleep(0.01)
        inner()
        inner()

    started = time.perf_counter()
    watch.around("outer", outer_call)()
    elapsed = time.perf_counter() - started
    assert watch.calls == {"outer": 1, "inner": 2} and watch.inside == []
    assert watch.seconds["inner"] >= 0.04 and watch.seconds["outer"] >= 0.01
    assert sum(watch.seconds.values()) <= elapsed
    with pytest.raises(ZeroDivisionError):
        watch.around("outer", lambda: 1 / 0)()
    assert watch.inside == [] and watch.calls["outer"] == 2


def test_a_whole_step_counts_for_itself():
    cycles = np.array([5, 0, 7, 0, 0])

    def step(seconds: float) -> str:
        time.sleep(seconds)
        cycles[:] += [10, 70, 0, 20, 0]
        return "done"

    watch = Stopwatch()
    assert watch.around("forward", watch.around_parts(step, cycles))(0.05) == "done"
    parts = [part for part in PARTS if part not in ("rotation", "sums")]  # these took nothing
    whole = sum(watch.seconds[part] for part in parts)
    assert whole >= 0.05 and watch.seconds["forward"] < 0.02
    assert [round(watch.seconds[part] / whole, 6) for part in parts] == [0.1, 0.7, 0.2]
    assert watch.calls == {"forward": 1, **dict.fromkeys(parts, 1)}


def test_a_profile_names_every_part_and_leaves_everything_as_it_was(llm: LLM):
    engine = llm.llm_engine
    params = SamplingParams(temperature=0.0, max_tokens=4)
    before = llm.generate("The fox", params, use_tqdm=False)[0].outputs[0].token_ids
    functions = [getattr(layers, name) for name in ("rms_norm", "paged_attention")]
    build = vars(InputBatch)["build"]
    found = profile(engine, SMALL, num_steps=3)
    assert found.num_requests == 3 and 1 <= found.num_steps <= 3
    calls = {part.name: part.calls for part in found.parts}
    assert calls.keys() == NETWORK | OUTSIDE
    assert (calls["attention"], calls["gate"], calls["products"]) == (3, 3, 12), "three layers of four products"
    assert (calls["norms"], calls["sampler"], calls["scheduler"]) == (7, 1, 2)
    assert math.isclose(found.milliseconds, sum(part.milliseconds for part in found.parts))
    assert all(part.milliseconds > 0 for part in found.parts) and found.plain_milliseconds > 0
    assert [getattr(layers, name) for name in ("rms_norm", "paged_attention")] == functions
    assert vars(InputBatch)["build"] is build and "forward" not in vars(engine.model_runner.path)
    assert all("forward" not in vars(module) for module in engine.model_runner.model.modules())
    assert not engine.has_unfinished_requests()
    assert llm.generate("The fox", params, use_tqdm=False)[0].outputs[0].token_ids == before


def test_transformers_own_networks_are_profiled_too(tiny_model: Callable[[str], Path]):
    engine = LLM(tiny_model("gpt2"), kv_cache_memory_bytes=4 << 20).llm_engine
    calls = {part.name: part.calls for part in profile(engine, SMALL, num_steps=2).parts}
    assert calls["attention"] == calls["cache write"] > 0 and calls["products"] == 4 * calls["attention"]
    assert calls.keys() == OUTSIDE | {"attention", "cache write", "products", "logits", "forward"}


def test_what_cannot_be_measured_is_refused(tiny_model: Callable[[str], Path]):
    vectors = LLM(tiny_model("bert-cls")).llm_engine
    for refused in (measure, profile):
        with pytest.raises(InvalidRequestError, match="measures generating models"):
            refused(vectors, SMALL)
    short = LLM(tiny_model("llama"), max_model_len=4)
    with pytest.raises(ConfigError, match="no room for a decode step"):
        profile(short.llm_engine, SMALL)
    drafting = LLM(tiny_model("llama"), speculative_config={"method": "ngram", "num_speculative_tokens": 2})
    with pytest.raises(ConfigError, match="plain decode steps"):
        profile(drafting.llm_engine, SMALL)


def test_the_command_prints_tables_or_json(minivllm: Run, tiny_model: Callable[[str], Path]):
    arguments = ("bench", "-m", tiny_model("llama"), "--kv-cache-memory-bytes", "8000000", "--rounds", "1", "--profile")
    found = json.loads(minivllm(*arguments, "--json").out)
    assert [one["workload"] for one in found["workloads"]] == ["single", "w32"]
    assert found["profiles"].keys() == {"single", "w32"} and found["profiles"]["w32"]["num_requests"] > 1
    shown = minivllm(*arguments, "-w", "single")
    assert shown.code == 0 and "attention" in shown.out and "w32" not in shown.out
    assert minivllm("bench", "-w", "double").code == 2
