"""GET /metrics: Prometheus, with vLLM's names, labels and buckets, so that its dashboards and scalers work unchanged.

    engine.stats, engine.scheduler ──read when asked──▶ _EngineCollector ─┐
    every call that ends ──────────▶ http_* ──────────────────────────────┴▶ one registry for one application

The engine knows nothing of this; a scrape reads its numbers and walks over no request. Prompt tokens count once per
request (vLLM: once per candidate), so that counters equal the usage that clients are told; every beam of a beam search
is a request of its own.

Called by app.py and front.py. Twin in vLLM: vllm/v1/metrics/loggers.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

from flask import Response
from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    Summary,
)
from prometheus_client import Histogram as PrometheusHistogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from minivllm.engine.llm_engine import LLMEngine
from minivllm.engine.stats import Histogram
from minivllm.entrypoints.service import Service

LABELS = ("model_name", "engine")
ENGINE = "0"  # one engine per model
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})  # others are one label together
FINE_SECONDS = (*(0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 7.5, 10, 30, 60),)

Read = Callable[[LLMEngine], float]
GAUGES: tuple[tuple[str, str, Read], ...] = (
    ("num_requests_running", "Sequences that are computed.", lambda engine: len(engine.scheduler.running)),
    ("num_requests_waiting", "Sequences that wait for it.", lambda engine: len(engine.scheduler.waiting)),
    ("kv_cache_usage_perc", "Share of the blocks in use, 0 to 1.", lambda engine: engine.scheduler.kv_cache.pool.usage),
)
COUNTERS: tuple[tuple[str, str, Read], ...] = (
    ("prompt_tokens", "Prompt tokens.", lambda engine: engine.stats.prompt_tokens),
    ("prompt_tokens_cached", "Those that were cached.", lambda engine: engine.stats.cached_prompt_tokens),
    ("generation_tokens", "Tokens that were drawn.", lambda engine: engine.stats.generation_tokens),
    ("prefix_cache_queries", "Tokens looked for.", lambda engine: engine.scheduler.num_prefix_cache_queries),
    ("prefix_cache_hits", "Tokens found.", lambda engine: engine.scheduler.num_prefix_cache_hits),
    ("num_preemptions", "Times a sequence gave its blocks away.", lambda engine: engine.scheduler.num_preemptions),
)
# Name and help; also the attribute of SpecDecodeStats. Only where speculative decoding is on, as in vLLM.
SPEC_DECODE: tuple[tuple[str, str], ...] = (
    ("num_drafts", "Verifications of a sequence's drafts."),
    ("num_draft_tokens", "Drafts."),
    ("num_accepted_tokens", "Drafts that came true."),
)
# Name, help, attribute of EngineStats.
HISTOGRAMS: tuple[tuple[str, str, str], ...] = (
    ("iteration_tokens_total", "Tokens that one step computes.", "iteration_tokens"),
    ("time_to_first_token_seconds", "From arrival to the first token.", "time_to_first_token"),
    ("inter_token_latency_seconds", "From token to token.", "inter_token_latency"),
    ("request_time_per_output_token_seconds", "Mean of it, by sequence.", "time_per_output_token"),
    ("e2e_request_latency_seconds", "From arrival to the end.", "e2e_time"),
    ("request_queue_time_seconds", "From arrival to the first step.", "queue_time"),
    ("request_prefill_time_seconds", "From the first step to the first token.", "prefill_time"),
    ("request_decode_time_seconds", "From the first token to the last.", "decode_time"),
    ("request_inference_time_seconds", "From the first step to the last token.", "inference_time"),
    ("request_prompt_tokens", "Tokens of a prompt.", "num_prompt_tokens"),
    ("request_generation_tokens", "Tokens of a sequence.", "num_generation_tokens"),
    ("request_max_num_generation_tokens", "Of a request's longest sequence.", "max_num_generation_tokens"),
    ("request_prefill_kv_computed_tokens", "Of a prompt, those not cached.", "prefill_computed_tokens"),
    ("request_params_max_tokens", "max_tokens, or the room that was left.", "max_tokens"),
    ("request_params_n", "n of a request.", "num_candidates"),
    ("request_num_preemptions", "Preemptions of a sequence.", "num_preemptions"),
)
# Name, the label by which it is split, help, the values.
BY_LABEL: tuple[tuple[str, str, str, Callable[[LLMEngine], dict[str, int]]], ...] = (
    ("request_success", "finished_reason", "Sequences that ended.", lambda engine: dict(engine.stats.finished)),
    ("num_requests_waiting_by_reason", "reason", "Sequences that wait.", lambda engine: _waiting(engine)),
    ("prompt_tokens_by_source", "source", "Prompt tokens by where they came from.", lambda engine: _sources(engine)),
)
BY_LABEL_GAUGES = frozenset({"num_requests_waiting_by_reason"})
CACHE_FACTS = (
    *("block_size", "cache_dtype", "enable_prefix_caching", "gpu_memory_utilization", "kv_cache_memory_bytes"),
    *("kv_cache_size_tokens", "num_gpu_blocks", "num_gpu_blocks_override"),
)


def _waiting(engine: LLMEngine) -> dict[str, int]:
    """Nothing here waits for anything but room."""
    return {"capacity": len(engine.scheduler.waiting), "deferred": 0}


def _sources(engine: LLMEngine) -> dict[str, int]:
    num_cached = engine.stats.cached_prompt_tokens
    return {"local_compute": max(0, engine.stats.prompt_tokens - num_cached), "local_cache_hit": num_cached}


class Metrics:
    """All metrics of one application."""

    def __init__(self, service: Service):
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(service))
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._model_name = service.model_names[0]
        self._rejections = Counter(
            "vllm:admission_rejections",
            "Requests that the full queue refused.",
            ("model_name", "reason"),
            registry=self.registry,
        )
        self._rejections.labels(self._model_name, "max_num_queued_reqs")
        by_route = ("handler", "method")
        self._calls = Counter("http_requests", "Calls by route.", (*by_route, "status"), registry=self.registry)
        self._received = Summary("http_request_size_bytes", "Bodies in.", ("handler",), registry=self.registry)
        self._sent = Summary("http_response_size_bytes", "Bodies out.", ("handler",), registry=self.registry)
        self._seconds = PrometheusHistogram(
            "http_request_duration_seconds",
            "Until the last byte, by route.",
            by_route,
            buckets=(0.1, 0.5, 1),
            registry=self.registry,
        )
        self._fine_seconds = PrometheusHistogram(
            "http_request_duration_highr_seconds",
            "Until the last byte, of all routes.",
            buckets=FINE_SECONDS,
            registry=self.registry,
        )

    def observe_call(
        self, handler: str, method: str, status: int, seconds: float, num_received: int, num_sent: int
    ) -> None:
        """A call has ended. handler: the route's rule."""
        method = method if method in METHODS else "other"
        self._calls.labels(handler, method, f"{status // 100}xx").inc()
        self._received.labels(handler).observe(num_received)
        self._sent.labels(handler).observe(num_sent)
        self._seconds.labels(handler, method).observe(seconds)
        self._fine_seconds.observe(seconds)

    def count_rejection(self) -> None:
        """The queue was full."""
        self._rejections.labels(self._model_name, "max_num_queued_reqs").inc()

    def show(self) -> Response:
        """The page, as text whatever the scraper prefers: in the OpenMetrics format prometheus_client writes
        vllm_x for vllm:x, and no dashboard of vLLM's finds its numbers."""
        return Response(generate_latest(self.registry), content_type=CONTENT_TYPE_PLAIN_0_0_4)


class _EngineCollector(Collector):
    """Turns the engine's numbers into metrics, whenever somebody asks."""

    def __init__(self, service: Service):
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """Everything named vllm: but what the HTTP side counts."""
        engines = [((self._service.names_of(engine)[0], ENGINE), engine.engine) for engine in self._service.engines]
        for name, help_text, read in GAUGES:
            gauge = GaugeMetricFamily(f"vllm:{name}", help_text, labels=LABELS)
            for labels, engine in engines:
                gauge.add_metric(labels, read(engine))
            yield gauge
        for name, help_text, read in COUNTERS:
            counter = CounterMetricFamily(f"vllm:{name}", help_text, labels=LABELS)
            for labels, engine in engines:
                counter.add_metric(labels, read(engine))
            yield counter
        for name, help_text, attribute in HISTOGRAMS:
            histogram = HistogramMetricFamily(f"vllm:{name}", help_text, labels=LABELS)
            for labels, engine in engines:
                values: Histogram = getattr(engine.stats, attribute)
                histogram.add_metric(labels, _buckets(values), values.total)
            yield histogram
        for name, label, help_text, read_all in BY_LABEL:
            family = GaugeMetricFamily if name in BY_LABEL_GAUGES else CounterMetricFamily
            labelled = family(f"vllm:{name}", help_text, labels=(*LABELS, label))
            for labels, engine in engines:
                for value, count in read_all(engine).items():
                    labelled.add_metric((*labels, value), count)
            yield labelled
        yield from _spec_decode(engines)
        info = GaugeMetricFamily("vllm:cache_config_info", "The cache's settings.", labels=(*LABELS, *CACHE_FACTS))
        for labels, engine in engines:
            facts = _cache_facts(engine)
            info.add_metric((*labels, *(str(facts[name]) for name in CACHE_FACTS)), 1)
        yield info


def _spec_decode(engines: list[tuple[tuple[str, str], LLMEngine]]) -> Iterator[Metric]:
    """Nothing when no engine guesses."""
    drafting = [(labels, engine.stats.spec_decode) for labels, engine in engines if engine.stats.spec_decode]
    if not drafting:
        return
    for name, help_text in SPEC_DECODE:
        counter = CounterMetricFamily(f"vllm:spec_decode_{name}", help_text, labels=LABELS)
        for labels, stats in drafting:
            counter.add_metric(labels, getattr(stats, name))
        yield counter
    name, help_text = "vllm:spec_decode_num_accepted_tokens_per_pos", "Drafts that came true, by their place."
    by_place = CounterMetricFamily(name, help_text, labels=(*LABELS, "position"))
    for labels, stats in drafting:
        for position, count in enumerate(stats.num_accepted_tokens_per_pos):
            by_place.add_metric((*labels, str(position)), count)
    yield by_place


def _buckets(values: Histogram) -> list[tuple[str, float]]:
    """Cumulative, as Prometheus has them. Counts are copied in one go: the engine goes on meanwhile."""
    bounds = [*(str(bound) for bound in values.bounds), "+Inf"]
    return list(zip(bounds, accumulate(list(values.counts)), strict=True))


def _cache_facts(engine: LLMEngine) -> dict[str, Any]:
    """Settings as labels, by vLLM's names. Block 0 is nobody's, in vLLM too, and counted in num_gpu_blocks."""
    config, plan = engine.config.cache, engine.plan
    return {
        "block_size": plan.block_size,
        "cache_dtype": engine.config.model.dtype,
        "enable_prefix_caching": config.enable_prefix_caching,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "kv_cache_memory_bytes": config.kv_cache_memory_bytes,
        "kv_cache_size_tokens": (plan.num_blocks - 1) * plan.block_size,
        "num_gpu_blocks": plan.num_blocks,
        "num_gpu_blocks_override": config.num_gpu_blocks_override,
    }
