"""The engine's own counts: every token, every end, every second in exactly one place."""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minivllm import LLM, SamplingParams, ServerError
from minivllm.engine.stats import STEP_TOKENS, EngineStats, Histogram, SequenceStats, one_two_five

PROMPT = {"prompt_token_ids": list(range(10, 58))}  # three blocks


def total(histogram: Histogram) -> int:
    return sum(histogram.counts)


# ------------------------------------------------------------------ histograms
def test_bounds_are_vllms():
    assert one_two_five(128) == (1, 2, 5, 10, 20, 50, 100)
    assert one_two_five(1) == (1,) and one_two_five(2000)[-2:] == (1000, 2000)
    assert STEP_TOKENS == (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


@given(st.lists(st.one_of(st.sampled_from([0.0, 1.0, 2.0, 5.0]), st.floats(0, 10))))
def test_a_value_on_a_bound_belongs_to_it(values: list[float]):
    """Prometheus' buckets are "less or equal"."""
    histogram = Histogram((1.0, 2.0, 5.0))
    for value in values:
        histogram.observe(value)
    for number, bound in enumerate(histogram.bounds):
        assert sum(histogram.counts[: number + 1]) == sum(value <= bound for value in values)
    assert total(histogram) == len(values) and histogram.total == pytest.approx(sum(values))


# ------------------------------------------------------------------ times
def test_the_parts_of_a_request_add_up():
    """Arrives at 1, waits until 3, first token at 6, two more at 7 and 10, its end is known at 10."""
    stats = EngineStats(128)
    one = SequenceStats(1.0, num_prompt_tokens=48, max_tokens=3)
    stats.add_scheduled(one, 32, 3.0)
    stats.add_tokens(one, 1, 6.0)
    one.num_preemptions += 1
    stats.add_scheduled(one, 16, 6.5)  # again, after a preemption: the first time counts
    stats.add_tokens(one, 1, 7.0)
    stats.add_tokens(one, 1, 10.0)
    stats.add_finished(one, "length", 10.0)
    seconds = {
        name: getattr(stats, name).total
        for name in ("queue_time", "prefill_time", "decode_time", "inference_time", "e2e_time", "time_to_first_token")
    }
    assert seconds == {
        "queue_time": 2.0,
        "prefill_time": 3.0,
        "decode_time": 4.0,
        "inference_time": 7.0,
        "e2e_time": 9.0,
        "time_to_first_token": 5.0,
    }
    assert (total(stats.inter_token_latency), stats.inter_token_latency.total) == (2, 4.0)
    assert stats.time_per_output_token.total == 2.0
    assert (stats.prompt_tokens, stats.cached_prompt_tokens, stats.generation_tokens) == (48, 32, 3)
    assert (stats.prefill_computed_tokens.total, stats.max_tokens.total, stats.num_preemptions.total) == (16, 3, 1)
    assert stats.finished == {"stop": 0, "length": 1, "abort": 0, "error": 0}


def test_what_was_given_up_is_counted_and_not_timed():
    stats = EngineStats(128)
    stats.add_finished(SequenceStats(1.0, 48, 3), "abort", 9.0)
    assert stats.finished["abort"] == 1 and total(stats.e2e_time) == 0 and stats.prompt_tokens == 0


def test_an_embedding_has_no_decode():
    stats = EngineStats(128)
    one, bad = SequenceStats(1.0, 7), SequenceStats(1.0, 9)
    stats.add_scheduled(one, 0, 2.0)
    stats.add_embedding(one, "stop", 5.0)
    stats.add_embedding(bad, "error", 6.0)  # was never scheduled, brought nothing
    assert (stats.prompt_tokens, stats.generation_tokens, total(stats.max_tokens)) == (7, 0, 0)
    assert (stats.prefill_time.total, stats.decode_time.total) == (3.0, 0.0) and total(stats.prefill_time) == 1
    assert total(stats.time_to_first_token) == total(stats.time_per_output_token) == 0


# ------------------------------------------------------------------ in the engine
@pytest.fixture
def llm(tiny_model: Callable[[str], Path]) -> LLM:
    return LLM(tiny_model("llama"), dtype="float32", num_gpu_blocks_override=16, max_num_seqs=4)


def usage_of(outputs: list[Any]) -> tuple[int, int, int]:
    """What callers are told: prompt tokens, of these cached, generated tokens."""
    return (
        sum(len(output.prompt_token_ids) for output in outputs),
        sum(output.num_cached_tokens for output in outputs),
        sum(len(completion.token_ids) for output in outputs for completion in output.outputs),
    )


def test_counters_are_the_usage_that_callers_are_told(llm: LLM):
    params = [
        SamplingParams(temperature=0, max_tokens=5, ignore_eos=True),
        SamplingParams(temperature=1, seed=1, n=3, max_tokens=4, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, stop=["e", "a", "o"]),
        SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, prompt_logprobs=1),
    ]
    outputs = [llm.generate(PROMPT, one, use_tqdm=False)[0] for one in params for _ in range(2)]
    stats, scheduler = llm.llm_engine.stats, llm.llm_engine.scheduler
    assert (stats.prompt_tokens, stats.cached_prompt_tokens, stats.generation_tokens) == usage_of(outputs)
    assert stats.cached_prompt_tokens >= 4 * 32
    sequences = 2 * (1 + 3 + 1 + 1)
    assert sum(stats.finished.values()) == sequences == total(stats.e2e_time) == total(stats.queue_time)
    assert (total(stats.num_candidates), stats.num_candidates.total) == (8, 12)
    assert total(stats.inter_token_latency) == stats.generation_tokens - sequences
    # prompt logprobs need every position, so nothing is looked for
    assert scheduler.num_prefix_cache_queries == 48 * (sequences - 2)
    assert 0 < scheduler.num_prefix_cache_hits < scheduler.num_prefix_cache_queries
    computed = stats.iteration_tokens.total
    assert computed == 48 * sequences - scheduler.num_prefix_cache_hits + stats.generation_tokens - sequences


def test_preempted_sequences_keep_their_first_admission(llm: LLM):
    """15 blocks for four sequences of 7: somebody gives way, and nobody is counted twice."""
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    prompts = [{"prompt_token_ids": list(range(start, start + 48))} for start in (10, 60, 110, 160)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    stats, scheduler = llm.llm_engine.stats, llm.llm_engine.scheduler
    assert scheduler.num_preemptions == stats.num_preemptions.total > 0
    assert (stats.prompt_tokens, stats.cached_prompt_tokens, stats.generation_tokens) == usage_of(outputs)
    assert scheduler.num_prefix_cache_queries == 4 * 48 and total(stats.queue_time) == 4
    waited = stats.queue_time.total + stats.inference_time.total
    assert waited == pytest.approx(stats.e2e_time.total)


def test_requests_that_are_given_up_are_aborts(llm: LLM):
    engine = llm.llm_engine
    params = SamplingParams(temperature=1, n=2, max_tokens=9, ignore_eos=True)
    ids = [engine.add_request(PROMPT, params) for _ in range(2)]
    engine.step()
    for request_id in ids:
        engine.abort_request(request_id)
        engine.abort_request(request_id)
    assert engine.stats.finished == {"stop": 0, "length": 0, "abort": 4, "error": 0}
    assert engine.stats.prompt_tokens == 2 * 48 and total(engine.stats.num_candidates) == 0


def test_a_failed_step_counts_its_requests_as_errors(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any) -> None:
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as patch:
        patch.setattr(llm.llm_engine._executor, "execute_model", fail)
        with pytest.raises(ServerError):
            llm.generate(PROMPT, SamplingParams(max_tokens=2), use_tqdm=False)
    assert llm.llm_engine.stats.finished["error"] == 1
    assert llm.llm_engine.stats.prompt_tokens == 0 and total(llm.llm_engine.stats.e2e_time) == 1


# ------------------------------------------------------------------ what it costs
def test_a_token_costs_microseconds():
    """The engine thread pays for this at every token of every sequence. Measured against a bisection, which is most
    of it: a lock, a string or a dictionary of labels would be ten times that."""
    stats, one = EngineStats(), SequenceStats(0.0, 10)
    stats.add_tokens(one, 1, 0.1)
    bounds = stats.inter_token_latency.bounds

    def seconds(work: Callable[[], Any]) -> float:
        best = float("inf")
        for _ in range(7):
            started = time.thread_time()
            for _ in range(2000):
                work()
            best = min(best, time.thread_time() - started)
        return best

    token = seconds(lambda: stats.add_tokens(one, 1, 0.2))
    assert token < 12 * seconds(lambda: bisect.bisect_left(bounds, 0.1))
