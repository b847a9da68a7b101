"""/metrics: vLLM's names and buckets, a valid exposition, and numbers that equal what clients were told."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families as parse_text

from minivllm import LLM, AsyncEngine
from minivllm.engine.stats import FINISH_REASONS
from minivllm.entrypoints.service import ServerConfig
from tests.engine.test_async_engine import Gate, settle
from tests.entrypoints.helpers import CHAT, COMPLETIONS, EMBEDDINGS, HELLO, PATIENCE, Reply, Web

SHORT = {"temperature": 0, "ignore_eos": True, "max_tokens": 4}
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]

# What vLLM's stock dashboard draws (examples/observability/prometheus_grafana/grafana.json).
DASHBOARD = (
    *("vllm:e2e_request_latency_seconds_bucket", "vllm:e2e_request_latency_seconds_sum"),
    *("vllm:e2e_request_latency_seconds_count", "vllm:prompt_tokens_total", "vllm:generation_tokens_total"),
    *("vllm:inter_token_latency_seconds_bucket", "vllm:inter_token_latency_seconds_sum"),
    *("vllm:inter_token_latency_seconds_count", "vllm:num_requests_running", "vllm:num_requests_waiting"),
    *("vllm:time_to_first_token_seconds_bucket", "vllm:time_to_first_token_seconds_sum"),
    *("vllm:time_to_first_token_seconds_count", "vllm:kv_cache_usage_perc", "vllm:request_prompt_tokens_bucket"),
    *("vllm:request_generation_tokens_bucket", "vllm:request_success_total", "vllm:request_queue_time_seconds_sum"),
    *("vllm:request_prefill_time_seconds_sum", "vllm:request_decode_time_seconds_sum"),
    "vllm:request_max_num_generation_tokens_sum",
)
SECONDS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
BETWEEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
FIRST = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160),
    *(640, 2560),
)
SIZES = (1, 2, 5, 10, 20, 50, 100)  # up to the tiny model's 128
# Type and buckets of everything that carries vLLM's name.
EXPECTED: Mapping[str, tuple[str, tuple[float, ...]]] = MappingProxyType(
    {
        **dict.fromkeys(("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"), ("gauge", ())),
        **dict.fromkeys(("num_requests_waiting_by_reason", "cache_config_info"), ("gauge", ())),
        **dict.fromkeys(("prompt_tokens", "generation_tokens", "prompt_tokens_cached"), ("counter", ())),
        **dict.fromkeys(("prefix_cache_queries", "prefix_cache_hits", "num_preemptions"), ("counter", ())),
        **dict.fromkeys(("request_success", "prompt_tokens_by_source", "admission_rejections"), ("counter", ())),
        "iteration_tokens_total": ("histogram", (1, *(2.0**power for power in range(3, 15)))),
        "time_to_first_token_seconds": ("histogram", FIRST),
        "inter_token_latency_seconds": ("histogram", BETWEEN),
        "request_time_per_output_token_seconds": ("histogram", BETWEEN),
        "e2e_request_latency_seconds": ("histogram", SECONDS),
        **{f"request_{part}_time_seconds": ("histogram", SECONDS) for part in ("queue", "inference")},
        **{f"request_{part}_time_seconds": ("histogram", SECONDS) for part in ("prefill", "decode")},
        **{f"request_{what}_tokens": ("histogram", SIZES) for what in ("prompt", "generation", "params_max")},
        **{f"request_{what}_tokens": ("histogram", SIZES) for what in ("max_num_generation", "prefill_kv_computed")},
        "request_params_n": ("histogram", (1, 2, 5, 10, 20)),
        "request_num_preemptions": ("histogram", (1, 2, 3, 4, 5, 10, 20)),
    }
)


def scrape(web: Web) -> Samples:
    """(name, labels) -> value."""
    families = parse_text(web.get("/metrics").text)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    """The sum of the samples that have these labels."""
    found = [v for (n, have), v in samples.items() if n == name and labels.items() <= dict(have).items()]
    assert found, name
    return sum(found)


# ------------------------------------------------------------------ the exposition
def test_names_types_labels_and_buckets_are_vllms(web: Web):
    web.complete(**SHORT)
    families = {family.name: family for family in parse_text(web.get("/metrics").text)}
    ours = {name.removeprefix("vllm:"): family for name, family in families.items() if name.startswith("vllm:")}
    ours = {name: family for name, family in ours.items() if not name.endswith("_created")}
    assert set(ours) == set(EXPECTED)
    for name, (kind, bounds) in EXPECTED.items():
        family = ours[name]
        assert family.type == kind, name
        for sample in family.samples:
            assert sample.labels["model_name"] == "tiny", name
            assert sample.labels.get("engine") == "0" or name == "admission_rejections"
        seen = [s.labels["le"] for s in family.samples if s.name.endswith("_bucket")]
        assert [float(bound) for bound in seen] == ([*map(float, bounds), float("inf")] if bounds else []), name


def test_every_panel_of_the_stock_dashboard_has_its_data(web: Web):
    web.complete(**SHORT)
    names = {name for name, labels in scrape(web) if ("model_name", "tiny") in labels}
    assert set(DASHBOARD) <= names


@pytest.mark.parametrize(
    "accept",
    [
        "",
        "text/plain;version=0.0.4",
        "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,text/plain;"
        "version=0.0.4;q=0.5,*/*;q=0.1",
    ],
    ids=["nothing", "text", "as Prometheus asks"],
)
def test_every_scraper_gets_vllms_names(web: Web, accept: str):
    web.complete(**SHORT)
    web.get("/nothing")
    reply = web.get("/metrics", headers={"Accept": accept})
    assert reply.status == 200 and reply.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    names = {sample.name for family in parse_text(reply.text) for sample in family.samples}
    assert {*DASHBOARD, "http_requests_total"} <= names


def test_a_histogram_counts_every_value_once(web: Web):
    web.complete(**SHORT)
    samples = scrape(web)
    for name, (kind, _) in EXPECTED.items():
        if kind == "histogram":
            buckets = [v for (n, _), v in samples.items() if n == f"vllm:{name}_bucket"]
            assert buckets == sorted(buckets) and buckets[-1] == value(samples, f"vllm:{name}_count"), name


def test_the_cache_config_says_what_tools_compute_the_capacity_from(web: Web):
    samples = scrape(web)
    (labels,) = [dict(labels) for name, labels in samples if name == "vllm:cache_config_info"]
    assert (labels["block_size"], labels["num_gpu_blocks"], labels["enable_prefix_caching"]) == ("16", "64", "True")
    assert labels["kv_cache_size_tokens"] == str(63 * 16)


def test_drafts_are_counted_under_vllms_names(tiny_model: Callable[[str], Path]):
    """Only where there are any; the tiny model drafts for itself and is always right."""
    folder = tiny_model("llama")
    config = {"method": "draft_model", "model": str(folder), "num_speculative_tokens": 3}
    llm = LLM(folder, dtype="float32", num_gpu_blocks_override=64, speculative_config=config)
    engine = AsyncEngine(llm.llm_engine)
    try:
        web = Web(engine)
        web.complete(**{**SHORT, "max_tokens": 9})
        samples = scrape(web)
    finally:
        engine.shutdown()
    names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    # 1 from the prompt, 1 + 3 twice.
    assert [value(samples, f"vllm:spec_decode_{name}_total", engine="0") for name in names] == [2, 6, 6]
    by_place = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    assert [value(samples, by_place, position=str(place)) for place in range(3)] == [2, 2, 2]


def test_two_applications_have_a_registry_each_and_the_global_one_is_left_alone(engine: AsyncEngine):
    first, second = Web(engine), Web(engine)
    first.get("/v1/models")
    assert value(scrape(first), "http_requests_total", handler="/v1/models") == 1
    assert not [name for name, labels in scrape(second) if dict(labels).get("handler") == "/v1/models"]
    assert not [family.name for family in REGISTRY.collect() if family.name.startswith(("vllm:", "http_"))]


# ------------------------------------------------------------------ keys
def test_metrics_are_open_unless_they_are_protected(engine: AsyncEngine):
    keyed = Web(engine, ServerConfig(api_keys=("secret",)))
    protected = Web(engine, ServerConfig(api_keys=("secret",), protect_metrics=True))
    assert keyed.get("/metrics").status == 200
    assert (protected.get("/metrics").status, protected.get("/metrics").error["code"]) == (401, "invalid_api_key")
    assert protected.get("/metrics", headers={"Authorization": "Bearer secret"}).status == 200
    assert keyed.get("/load").status == 401


# ------------------------------------------------------------------ numbers
def test_gauges_show_who_runs_and_who_waits(web: Web, engine: AsyncEngine, gate: Gate, llm: LLM):
    streams = [engine.submit("the value is") for _ in range(3)]  # two can run
    gate.wait()
    gate.steps(2)
    samples = scrape(web)
    assert (value(samples, "vllm:num_requests_running"), value(samples, "vllm:num_requests_waiting")) == (2, 1)
    assert value(samples, "vllm:num_requests_waiting_by_reason", reason="capacity") == 1
    pool = llm.llm_engine.scheduler.kv_cache.pool
    assert value(samples, "vllm:kv_cache_usage_perc") == pool.usage > 0
    assert web.get("/load").body == {"server_load": 3}
    gate.open()
    for stream in streams:
        list(stream)
    assert web.get("/load").body == {"server_load": 0}


def delta(before: Samples, after: Samples, name: str, **labels: str) -> float:
    return value(after, name, **labels) - value(before, name, **labels)


def usage_of(reply: Reply) -> dict[str, Any]:
    if reply.headers["Content-Type"].startswith("text/event-stream"):
        return next(event["usage"] for event in reply.events if isinstance(event, dict) and event.get("usage"))
    return reply.body["usage"]


def a_call(web: Web, rng: random.Random) -> Reply:
    """Anything that is answered in whole."""
    kind = rng.choice(["chat", "completion", "embedding", "bad", "unknown"])
    stream = {"stream": True, "stream_options": {"include_usage": True}} if rng.random() < 0.5 else {}
    fields = {"max_tokens": rng.randint(1, 12), "temperature": 1, "seed": rng.randint(0, 99), **stream}
    prompt = "the value is " * rng.randint(1, 4)
    if kind == "chat":
        return web.chat([{"role": "user", "content": prompt}], n=rng.randint(1, 3), **fields)
    if kind == "completion":
        return web.complete([prompt, "and"], stop=["e", "o"], n=rng.randint(1, 2), **fields)
    if kind == "embedding":
        return web.post(EMBEDDINGS, input=[prompt, "and"])
    if kind == "bad":
        return web.chat(temperature=9)
    return web.chat(model="other")


def test_after_a_history_of_many_callers_counters_equal_the_usage_that_they_were_told(web: Web):
    """Four callers at once, whole and streamed; nothing runs or waits afterwards."""
    before = scrape(web)
    replies: list[Reply] = []

    def caller(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(12):
            while (reply := a_call(web, rng)).status == 429:
                replies.append(reply)
                threading.Event().wait(0.01)
            replies.append(reply)

    threads = [threading.Thread(target=caller, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    after = scrape(web)
    assert len(replies) >= 48
    assert {reply.status for reply in replies} <= {200, 400, 404, 429} and sum(r.status == 200 for r in replies) > 16
    usages = [usage_of(reply) for reply in replies if reply.status == 200]
    told = {name: sum(usage.get(name) or 0 for usage in usages) for name in ("prompt_tokens", "completion_tokens")}
    told["cached"] = sum((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0 for usage in usages)
    assert {
        "prompt_tokens": delta(before, after, "vllm:prompt_tokens_total"),
        "completion_tokens": delta(before, after, "vllm:generation_tokens_total"),
    } == {name: told[name] for name in ("prompt_tokens", "completion_tokens")}
    assert delta(before, after, "vllm:prompt_tokens_by_source_total") == told["prompt_tokens"]
    cached = delta(before, after, "vllm:prompt_tokens_cached_total")
    embedded = [reply for reply in replies if reply.status == 200 and "embd" in reply.text[:20]]
    assert cached >= told["cached"] and (embedded or cached == told["cached"])  # embeddings do not tell
    assert (value(after, "vllm:num_requests_running"), value(after, "vllm:num_requests_waiting")) == (0, 0)
    assert value(after, "vllm:kv_cache_usage_perc") == 0
    rejected = delta(before, after, "vllm:admission_rejections_total", reason="max_num_queued_reqs")
    assert rejected == sum(reply.status == 429 for reply in replies)
    for status in (200, 400, 404, 429):
        got = sum(
            v
            for (n, have), v in after.items()
            if n == "http_requests_total" and dict(have)["status"] == f"{status // 100}xx"
        )
        assert got >= sum(reply.status == status for reply in replies)


def test_every_sequence_ends_in_one_reason(web: Web, engine: AsyncEngine, gate: Gate):
    before = scrape(web)
    stopped = engine.submit("the value is")
    gate.wait()
    gate.steps(3)
    stopped.close()
    waiting = engine.submit("the value is")
    waiting.close()
    gate.open()
    settle(engine)
    web.complete(**SHORT)
    web.complete(**SHORT, stop=list("aeio"))
    after = scrape(web)
    ended = {
        reason: delta(before, after, "vllm:request_success_total", finished_reason=reason) for reason in FINISH_REASONS
    }
    assert ended["abort"] in (1, 2) and ended["error"] == 0  # the second may have gone before it was added
    assert ended["length"] + ended["stop"] == 2
    assert delta(before, after, "vllm:e2e_request_latency_seconds_count") == 2  # aborted ones are not timed
    assert value(after, "vllm:num_requests_running") == value(after, "vllm:num_requests_waiting") == 0


def test_a_full_queue_counts_its_refusals(web: Web, engine: AsyncEngine, gate: Gate):
    streams = [engine.submit("the") for _ in range(engine.max_requests)]
    assert web.complete(**SHORT).status == 429
    assert value(scrape(web), "vllm:admission_rejections_total", reason="max_num_queued_reqs") == 1
    for stream in streams:
        stream.close()


# ------------------------------------------------------------------ HTTP
def test_calls_are_counted_by_route_and_not_by_what_clients_invent(web: Web):
    web.complete(**SHORT)
    web.complete(temperature=9)
    for path in ("/v1/models/tiny", "/v1/models/alias", "/v1/models/nobody", "/made/up", "/made/up/too"):
        web.get(path)
    web.call("FIND", "/v1/models")
    for _ in range(3):
        web.get("/health")
    samples = scrape(web)
    calls = {
        (dict(have)["handler"], dict(have)["method"], dict(have)["status"]): v
        for (name, have), v in samples.items()
        if name == "http_requests_total"
    }
    assert calls == {
        (COMPLETIONS, "POST", "2xx"): 1,
        (COMPLETIONS, "POST", "4xx"): 1,
        ("/v1/models/<path:name>", "GET", "2xx"): 2,
        ("/v1/models/<path:name>", "GET", "4xx"): 1,
        ("none", "GET", "4xx"): 2,
        ("none", "other", "4xx"): 1,
    }
    assert value(samples, "http_request_duration_seconds_count", handler=COMPLETIONS) == 2
    assert value(samples, "http_request_duration_highr_seconds_count") == 8
    assert value(samples, "http_request_size_bytes_sum", handler=COMPLETIONS) > 50
    assert value(samples, "http_response_size_bytes_sum", handler="/v1/models/<path:name>") > 100


def test_a_stream_is_counted_with_its_last_byte(web: Web, gate: Gate):
    response = web.streamed(CHAT, messages=HELLO, **SHORT)
    pieces: Iterator[bytes] = iter(response.response)
    first = next(pieces)
    assert not [1 for name, have in scrape(web) if name == "http_requests_total" and dict(have)["handler"] == CHAT]
    gate.open()
    rest = list(pieces)
    response.close()
    samples = scrape(web)
    assert value(samples, "http_requests_total", handler=CHAT, status="2xx") == 1
    assert value(samples, "http_response_size_bytes_sum", handler=CHAT) == len(first) + sum(map(len, rest))
