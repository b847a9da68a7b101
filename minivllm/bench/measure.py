"""How fast: a workload through the engine, several rounds, and what the middle one of them was.

    output tokens per second    of all requests together, from the first step to the last
    time to first token         from a request's arrival, waiting included
    time per output token       of one request, behind its first token

A round before the first one is not counted: it compiles, and fills the caches of the CPU.
Knows no terminal. Called by cli/bench.py. Twin in vLLM: vllm/benchmarks/throughput.py.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from minivllm.bench.workloads import Job, Workload, jobs_of
from minivllm.engine.llm_engine import LLMEngine
from minivllm.errors import InvalidRequestError, ServerError
from minivllm.outputs import RequestOutput
from minivllm.sampling_params import SamplingParams

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Round:
    """What one round took."""

    seconds: float
    first_token_seconds: list[float]  # of each request
    per_token_seconds: list[float]  # of each request with more than one token


@dataclass(frozen=True, slots=True)
class Result:
    """A workload's rounds."""

    workload: Workload
    num_prompt_tokens: int
    num_output_tokens: int
    rounds: list[Round]

    @property
    def seconds(self) -> float:
        """Of the middle round."""
        return statistics.median(one.seconds for one in self.rounds)

    def percentiles(self, of: Callable[[Round], list[float]]) -> dict[str, float]:
        """Nearest rank, over the requests of all rounds, in milliseconds."""
        values = [value for one in self.rounds for value in of(one)]
        return {f"p{percent}": 1000 * percentile(values, percent) for percent in PERCENTILES} if values else {}

    def as_dict(self) -> dict[str, Any]:
        """What --json prints."""
        fastest, slowest = min(one.seconds for one in self.rounds), max(one.seconds for one in self.rounds)
        return {
            "workload": self.workload.name,
            "num_requests": self.workload.num_requests,
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_output_tokens": self.num_output_tokens,
            "seconds": self.seconds,
            "fastest_seconds": fastest,
            "slowest_seconds": slowest,
            "num_rounds": len(self.rounds),
            "output_tokens_per_second": self.num_output_tokens / self.seconds,
            "tokens_per_second": (self.num_prompt_tokens + self.num_output_tokens) / self.seconds,
            "time_to_first_token_ms": self.percentiles(lambda one: one.first_token_seconds),
            "time_per_output_token_ms": self.percentiles(lambda one: one.per_token_seconds),
        }


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that so many per cent of them do not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def measure(
    engine: LLMEngine, workload: Workload, num_rounds: int = 3, advance: Callable[[int], None] = lambda tokens: None
) -> Result:
    """Run a workload's rounds, and one before them that is not counted. advance: hears of output tokens as they come.

    Raises InvalidRequestError: the model draws no tokens. ServerError: a request failed.
    """
    check_generates(engine)
    model = engine.config.model
    rounds, jobs = [], []
    for index in range(num_rounds + 1):
        jobs = jobs_of(workload, index, model.vocab_size, model.max_model_len)
        rounds.append(_run(engine, jobs, advance))
    return Result(
        workload,
        sum(len(job.prompt_token_ids) for job in jobs),
        sum(job.num_output_tokens for job in jobs),
        rounds[1:],
    )


def check_generates(engine: LLMEngine) -> None:
    """Raises InvalidRequestError for a model that gives vectors."""
    if engine.config.model.is_pooling:
        raise InvalidRequestError("bench measures generating models, and this one gives vectors.", parameter="model")


def add_jobs(engine: LLMEngine, jobs: Sequence[Job]) -> list[str]:
    """Queue them: greedy, and as long as they are meant to be, whatever is drawn. Returns their ids."""
    return [
        engine.add_request(
            {"prompt_token_ids": job.prompt_token_ids},
            SamplingParams(temperature=0.0, max_tokens=job.num_output_tokens, ignore_eos=True, detokenize=False),
        )
        for job in jobs
    ]


def _run(engine: LLMEngine, jobs: Sequence[Job], advance: Callable[[int], None]) -> Round:
    started = time.perf_counter()
    add_jobs(engine, jobs)
    finished: list[RequestOutput] = []
    seen = engine.throughput.num_output_tokens
    while engine.has_unfinished_requests():
        finished += [output for output in engine.step() if isinstance(output, RequestOutput) and output.finished]
        advance(engine.throughput.num_output_tokens - seen)
        seen = engine.throughput.num_output_tokens
    seconds = time.perf_counter() - started
    first, per_token = [], []
    for output in finished:
        if output.error is not None:
            raise ServerError(f"request {output.request_id} failed: {output.error}")
        times, num_tokens = output.metrics, len(output.outputs[0].token_ids)
        first.append(times["first_token_time"] - times["arrival_time"])
        if num_tokens > 1:
            per_token.append((times["finished_time"] - times["first_token_time"]) / (num_tokens - 1))
    return Round(seconds, first, per_token)
