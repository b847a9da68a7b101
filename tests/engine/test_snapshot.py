"""What the engine shows of itself: all of it true, of one moment, and nothing that a client said."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minivllm import LLM, AsyncEngine, SamplingParams
from minivllm.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from minivllm.core.request import Request
from minivllm.core.scheduler import Scheduler
from minivllm.engine.llm_engine import LLMEngine
from minivllm.engine.snapshot import STATE_VERSION, take_snapshot
from minivllm.engine.throughput import Throughput
from tests.engine.test_async_engine import Gate, assert_idle, settle

LONG = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
PREFIX = list(range(3, 35))  # two full blocks
REQUEST_FIELDS = [
    *("request_id", "status", "num_prompt_tokens", "num_output_tokens", "max_tokens", "num_computed_tokens"),
    *("num_cached_tokens", "num_preemptions", "priority", "age_seconds", "block_ids"),
]


@pytest.fixture(scope="module")
def llm(tiny_model: Callable[[str], Path]) -> LLM:
    """Two requests run at a time."""
    return LLM(tiny_model("llama"), dtype="float32", num_gpu_blocks_override=64, max_num_seqs=2)


@pytest.fixture
def engine(llm: LLM) -> Any:
    """Nothing is cached, and nothing is left."""
    llm.reset_prefix_cache()
    yield llm.llm_engine
    for request_id in list(llm.llm_engine.output_processor._parents):
        llm.llm_engine.abort_request(request_id)
    llm.llm_engine.step()
    assert_idle(llm)


def add(engine: LLMEngine, *token_ids: int, params: SamplingParams = LONG, **options: Any) -> str:
    return engine.add_request({"prompt_token_ids": list(token_ids)}, params, **options)


def by_id(snapshot: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {request["request_id"]: request for request in snapshot["requests"]}


# ------------------------------------------------------------------ what it says
def test_an_engine_at_rest(engine: LLMEngine):
    snapshot = take_snapshot(engine)
    assert snapshot["version"] == STATE_VERSION == 1
    assert snapshot["model"]["name"] == engine.config.model.name
    assert snapshot["config"]["block_size"] == 16 and snapshot["config"]["num_blocks"] == 64
    assert snapshot["config"]["max_num_seqs"] == 2 and snapshot["config"]["scheduling_policy"] == "fcfs"
    assert snapshot["requests"] == []
    blocks = snapshot["blocks"]
    assert blocks["ref_counts"] == [1] + [0] * 63 and blocks["cached"] == [0] * 64  # the null block is never free
    assert (blocks["num_free"], blocks["num_held"], blocks["num_cached"], blocks["num_shared"]) == (63, 0, 0, 0)
    assert blocks["null_block_id"] == 0


def test_running_and_waiting_requests_with_their_counts(engine: LLMEngine):
    first = add(engine, *PREFIX, 40, 41)
    engine.step()
    second, third = add(engine, *PREFIX, 50, priority=3), add(engine, 7, 8, 9)
    engine.step()
    engine.step()
    snapshot = take_snapshot(engine)
    requests = by_id(snapshot)
    assert list(requests) == [first, second, third]
    assert [requests[name]["status"] for name in requests] == ["running", "running", "waiting"]
    assert all(list(request) == REQUEST_FIELDS for request in requests.values())
    one = requests[first]
    assert (one["num_prompt_tokens"], one["num_output_tokens"], one["max_tokens"]) == (34, 3, 94)  # of 128
    assert one["num_computed_tokens"] == 36  # the newest token is not computed yet
    assert requests[second]["num_cached_tokens"] == 32 and requests[second]["priority"] == 3
    assert requests[third]["num_computed_tokens"] == 0 and requests[third]["block_ids"] == []
    assert all(0 <= request["age_seconds"] < 60 for request in requests.values())
    assert requests[first]["age_seconds"] >= requests[third]["age_seconds"]
    assert (snapshot["num_running"], snapshot["num_waiting"], snapshot["num_preempted"]) == (2, 1, 0)


def test_the_last_steps_decisions_with_their_sentences(engine: LLMEngine):
    first, second = add(engine, 5, 6), add(engine, 5, 7)
    third = add(engine, 7, 8, 9)
    engine.step()
    snapshot = take_snapshot(engine)
    decisions = {decision["request_id"]: decision for decision in snapshot["decisions"]}
    assert list(decisions) == [first, second, third]
    assert decisions[first]["action"] == "prefill" and decisions[first]["num_scheduled_tokens"] == 2
    assert decisions[third] == {
        "request_id": third,
        "action": "wait_seqs",
        "num_scheduled_tokens": 0,
        "reason": "waits for a place: 2 of 2 sequences are running",
    }
    assert snapshot["step"] == engine.last_step.step and snapshot["num_scheduled_tokens"] == 4


def test_owners_ref_counts_and_cached_blocks_agree(engine: LLMEngine):
    first = add(engine, *PREFIX, 40)
    engine.step()
    second = add(engine, *PREFIX, 50)
    engine.step()
    snapshot = take_snapshot(engine)
    requests, blocks = by_id(snapshot), snapshot["blocks"]
    shared = requests[first]["block_ids"][:2]
    assert requests[second]["block_ids"][:2] == shared
    owners = Counter(block_id for request in requests.values() for block_id in request["block_ids"])
    assert blocks["ref_counts"] == [1] + [owners[block_id] for block_id in range(1, 64)]
    assert [blocks["ref_counts"][block_id] for block_id in shared] == [2, 2]
    assert [i for i, cached in enumerate(blocks["cached"]) if cached] == sorted(shared)
    assert (blocks["num_held"], blocks["num_shared"], blocks["num_cached"], blocks["num_cached_free"]) == (4, 2, 2, 0)
    for request_id in (first, second):
        engine.abort_request(request_id)
    blocks = take_snapshot(engine)["blocks"]
    assert (blocks["num_held"], blocks["num_shared"], blocks["num_cached"], blocks["num_cached_free"]) == (0, 0, 2, 2)
    assert blocks["num_free"] == 63 and blocks["ref_counts"] == [1] + [0] * 63


def test_a_preempted_request_says_so(tiny_model: Callable[[str], Path]):
    """Seven usable blocks, and two requests that want five each."""
    llm = LLM(tiny_model("llama"), dtype="float32", num_gpu_blocks_override=8, max_num_seqs=2)
    engine = llm.llm_engine
    params = SamplingParams(temperature=0, max_tokens=44, ignore_eos=True)
    ids = [add(engine, *range(start, start + 30), params=params) for start in (3, 40)]
    while not any(request["status"] == "preempted" for request in take_snapshot(engine)["requests"]):
        assert engine.has_unfinished_requests()
        engine.step()
    snapshot = take_snapshot(engine)
    victim = by_id(snapshot)[ids[1]]
    assert (victim["status"], victim["num_preemptions"], victim["block_ids"]) == ("preempted", 1, [])
    assert victim["num_computed_tokens"] == 0 and victim["num_output_tokens"] > 0
    assert (snapshot["num_preempted"], snapshot["num_waiting"], snapshot["num_running"]) == (1, 0, 1)
    (decision,) = [d for d in snapshot["decisions"] if d["request_id"] == ids[1]]
    assert decision["action"] == "preempt" and decision["reason"].startswith("preempted so that")


def test_nothing_that_a_client_said_is_in_it(llm: LLM, engine: LLMEngine):
    """No text, no token ids, no block hashes: sizes and ids of ours only."""
    text = "the value is"
    engine.add_request(text, LONG, cache_salt="saltysalt")
    for _ in range(3):
        engine.step()
    written = json.dumps(take_snapshot(engine))
    assert text not in written and "salt" not in written and "token_ids" not in written and "hash" not in written

    def numbers(value: Any) -> list[Any]:
        if isinstance(value, dict):
            return [number for member in value.values() for number in numbers(member)]
        return [n for member in value for n in numbers(member)] if isinstance(value, list) else [value]

    token_ids = engine.scheduler.running[0].all_token_ids
    rare = [token_id for token_id in token_ids if token_id > 128]
    assert rare and not set(rare) & set(numbers(take_snapshot(engine)["requests"]))


def test_it_is_plain_data_and_its_own(engine: LLMEngine):
    """What the engine does next changes no snapshot that was taken."""
    add(engine, *PREFIX)
    engine.step()
    snapshot = take_snapshot(engine)
    before = json.dumps(snapshot)
    for _ in range(20):
        engine.step()
    assert json.dumps(snapshot) == before


def test_a_pooling_request_has_no_output_limit(engine: LLMEngine):
    engine.add_request({"prompt_token_ids": [4, 5]}, embed=True)
    assert take_snapshot(engine)["requests"][0]["max_tokens"] == 0


# ------------------------------------------------------------------ tokens per second
def test_throughput_counts_the_last_seconds():
    now = [100.0]
    meter = Throughput(window_seconds=2.0, clock=lambda: now[0])
    assert meter.per_second() == (0.0, 0.0)
    for step in range(32):  # 4 s at 8 steps a second
        now[0] = 100.0 + step / 8
        meter.add(8, 2)
    assert meter.per_second() == (64.0, 16.0)
    assert (meter.num_computed_tokens, meter.num_output_tokens) == (256, 64)
    now[0] += 3.0
    assert meter.per_second() == (0.0, 0.0)
    assert meter.num_output_tokens == 64


def test_throughput_forgets_by_time_not_by_steps():
    now = [0.0]
    meter = Throughput(window_seconds=2.0, clock=lambda: now[0])
    for step in range(2**16):  # in 4 s: more steps than a list should hold
        now[0] = step / 2**14
        meter.add(1, 1)
    assert len(meter._buckets) == 8
    assert meter.per_second() == (2**14, 2**14)


def test_the_engine_counts_what_it_computes(engine: LLMEngine):
    before = take_snapshot(engine)["totals"]
    add(engine, *range(3, 13), params=SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
    while engine.has_unfinished_requests():
        engine.step()
    snapshot = take_snapshot(engine)
    assert snapshot["totals"]["num_output_tokens"] - before["num_output_tokens"] == 5
    assert snapshot["totals"]["num_computed_tokens"] - before["num_computed_tokens"] == 10 + 4
    assert snapshot["tokens_per_second"]["output"] > 0


# ------------------------------------------------------------------ between two steps of the engine thread
def test_a_call_runs_in_the_engine_thread_between_steps(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    llm.reset_prefix_cache()
    gate = Gate(llm, monkeypatch)
    with AsyncEngine(llm.llm_engine) as engine:
        names: list[str] = []
        engine.call_soon(lambda: names.append(threading.current_thread().name))  # at rest
        settle(engine)
        assert names == ["minivllm-engine"]
        stream = engine.submit("the", LONG)
        gate.wait()
        seen: list[int] = []
        engine.call_soon(lambda: seen.append(llm.llm_engine.last_step.step))  # a step is being made
        assert seen == []
        gate.steps(1)
        assert seen == [llm.llm_engine.last_step.step]
        gate.open()
        stream.close()
    assert_idle(llm)


def test_an_exception_of_a_call_is_logged_and_ends_nothing(llm: LLM, caplog: pytest.LogCaptureFixture):
    with AsyncEngine(llm.llm_engine) as engine:
        engine.call_soon(lambda: {}["mine"])
        settle(engine)
        assert engine.is_alive and "a call between two steps failed" in caplog.text
        assert list(engine.submit("the", SamplingParams(max_tokens=3, ignore_eos=True)))
    assert_idle(llm)


def test_the_revision_grows_with_what_happens_and_not_with_looking(llm: LLM):
    with AsyncEngine(llm.llm_engine) as engine:
        settle(engine)
        before = engine.revision
        for _ in range(5):
            engine.call_soon(lambda: None if take_snapshot(llm.llm_engine) else None)
        settle(engine)
        assert engine.revision == before
        list(engine.submit("the", SamplingParams(max_tokens=3, ignore_eos=True)))
        settle(engine)
        assert engine.revision >= before + 4  # one request and three steps
    assert_idle(llm)


# ------------------------------------------------------------------ what it costs
def test_a_thousand_blocks_and_64_requests_cost_less_than_a_millisecond():
    """The best of many, on a scheduler in the middle of its work: what is measured is ours, not the machine's rest."""
    engine = _Busy(num_blocks=1001, num_requests=64, num_prompt_tokens=240)
    snapshot = take_snapshot(engine)  # type: ignore[arg-type]
    assert len(snapshot["requests"]) == 64 and snapshot["blocks"]["num_held"] > 900
    times = []
    for _ in range(50):
        started = time.perf_counter()
        take_snapshot(engine)  # type: ignore[arg-type]
        times.append(time.perf_counter() - started)
    assert min(times) < 1e-3


class _Busy:
    """What take_snapshot reads of an LLMEngine, without a model."""

    def __init__(self, num_blocks: int, num_requests: int, num_prompt_tokens: int):
        scheduler = SchedulerConfig(max_num_seqs=num_requests, max_num_batched_tokens=100_000, max_model_len=1024)
        self.config = EngineConfig(ModelConfig("busy", "float32", 1024, 1000), CacheConfig(), scheduler)
        self.scheduler = Scheduler(scheduler, self.config.cache, num_blocks)
        for index in range(num_requests):
            prompt = [(index * 7 + position) % 1000 for position in range(num_prompt_tokens)]
            params = SamplingParams(max_tokens=9)
            self.scheduler.add_request(Request(f"{index}", prompt, params, max_tokens=9, arrival=index))
        self.last_step = self.scheduler.schedule()
        self.throughput = Throughput()
        self.output_processor = self

    def age_seconds(self, request_id: str) -> float:
        return 1.0

    def decisions(self) -> list[Any]:
        return list(self.last_step.decisions)
