"""Where a decode step's time goes: a stopwatch around the parts of a step, on the engine as it runs.

    part         is                                                  where
    scheduler    who computes what, and what came of it              core/scheduler.py
    batch        flat tensors                                        worker/input_batch.py
    embedding    rows of the table                                   models/linear.py
    norms, rotation, gate, cache write, attention                    kernels/ops/<op>
    products     the layers' matrix products                         models/linear.py
    logits       the product with the vocabulary                     models/*.py: compute_logits
    sampler      logits to token                                     worker/cpu.py, sample/
    forward      Python between the parts of the network             models/
    engine       all the rest of a step: outputs, runner, glue       engine/, worker/

A part's time is its own, without parts inside it, so that they add up to the step. One step is shown, the middle one:
on a machine that does other things as well a mean says little. Steps with and without the stopwatch take turns: what it
costs itself is the difference, and is told. A whole step (models/whole_step.py) is one call that counts for itself; its
products are those of the layers with the gate, its rotation has the writing of the cache with it.

The parts are functions that modules of ours call by a global name, and methods; while a step is profiled other ones
stand in their places, and `finally` puts them back. A replayed CUDA graph calls no function: CPUs only.
Knows no terminal. Called by cli/bench.py. Twin in vLLM: none; its profiles are torch.profiler's.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minivllm.bench.measure import add_jobs, check_generates
from minivllm.bench.workloads import Workload, jobs_of
from minivllm.engine.llm_engine import LLMEngine
from minivllm.errors import ConfigError
from minivllm.kernels.decoder_step import PARTS, decoder_step
from minivllm.models import layers
from minivllm.models.linear import Embedding, Linear
from minivllm.worker import cpu
from minivllm.worker.input_batch import InputBatch

KERNELS = {
    "rms_norm": "norms",
    "rotary_embedding": "rotation",
    "silu_and_mul": "gate",
    "reshape_and_cache": "cache write",
    "paged_attention": "attention",
}
HEADS = ("lm_head", "embed_out")  # their product is in "logits"
REST = "engine"  # what no other part has


@dataclass(slots=True)
class Stopwatch:
    """Own seconds and calls of each part. A part inside another one stops the other's time."""

    seconds: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    inside: list[float] = field(default_factory=list)  # of the open parts, seconds of the parts within

    def around(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.inside.append(0.0)
            started = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                elapsed = time.perf_counter() - started
                self.seconds[part] = self.seconds.get(part, 0.0) + elapsed - self.inside.pop()
                self.calls[part] = self.calls.get(part, 0) + 1
                if self.inside:
                    self.inside[-1] += elapsed

        return timed

    def around_parts(self, call: Callable[..., Any], cycles: np.ndarray) -> Callable[..., Any]:
        """A whole step that counts the cycles [num_parts] of its own parts: its time, in their proportion."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            before, started = cycles.copy(), time.perf_counter()
            result = call(*args, **kwargs)
            elapsed = time.perf_counter() - started
            spent = cycles - before  # [num_parts]
            for part, share in zip(PARTS, spent / spent.sum(), strict=True):
                if share == 0:
                    continue
                self.seconds[part] = self.seconds.get(part, 0.0) + elapsed * float(share)
                self.calls[part] = self.calls.get(part, 0) + 1
            self.inside[-1] += elapsed
            return result

        return timed


@dataclass(frozen=True, slots=True)
class Part:
    """Of one step: milliseconds, and how often it was called."""

    name: str
    milliseconds: float
    calls: int


@dataclass(frozen=True, slots=True)
class Profile:
    """A decode step of so many requests: the middle one of num_steps, its longest part first."""

    num_requests: int
    num_steps: int
    parts: list[Part]
    plain_milliseconds: float  # of the median step without the stopwatch

    @property
    def milliseconds(self) -> float:
        """Of a step with the stopwatch: the parts together."""
        return sum(part.milliseconds for part in self.parts)

    def as_dict(self) -> dict[str, Any]:
        """What --json prints."""
        return {
            "num_requests": self.num_requests,
            "num_steps": self.num_steps,
            "step_ms": self.milliseconds,
            "plain_step_ms": self.plain_milliseconds,
            "parts": [{"name": p.name, "ms": p.milliseconds, "calls": p.calls} for p in self.parts],
        }


def profile(engine: LLMEngine, workload: Workload, num_steps: int = 16) -> Profile:
    """Profile decode steps of a workload's requests, all of them behind their prompts.

    Raises InvalidRequestError: the model draws no tokens. ConfigError: the engine computes on a GPU, guesses
    tokens, or has too short a context.
    """
    check_generates(engine)
    if engine.model_runner.kv_caches[0][0].device.type != "cpu":
        raise ConfigError("--profile is for CPUs: add --device cpu. On a GPU ask torch.profiler.", parameter="device")
    if engine.config.speculative is not None:
        raise ConfigError("--profile is of plain decode steps: leave speculative_config out.", parameter="profile")
    model = engine.config.model
    jobs = jobs_of(workload, -1, model.vocab_size, model.max_model_len)
    request_ids = add_jobs(engine, jobs)
    timed, plain = list[Stopwatch](), list[float]()
    try:
        while engine.scheduler.waiting or any(r.num_output_tokens < 2 for r in engine.scheduler.running):
            engine.step()
        num_requests = len(engine.scheduler.running)
        while num_requests and len(timed) < num_steps and len(engine.scheduler.running) == num_requests:
            started = time.perf_counter()
            engine.step()
            plain.append(time.perf_counter() - started)
            timed.append(Stopwatch())
            with _parts_timed(engine, timed[-1]):
                timed[-1].around(REST, engine.step)()
    finally:
        for request_id in request_ids:
            engine.abort_request(request_id)
    if not timed:
        raise ConfigError("max_model_len leaves no room for a decode step to profile.", parameter="max_model_len")
    middle = sorted(timed, key=lambda watch: sum(watch.seconds.values()))[len(timed) // 2]
    parts = [Part(name, 1000 * seconds, middle.calls[name]) for name, seconds in middle.seconds.items()]
    parts.sort(key=lambda part: -part.milliseconds)
    return Profile(num_requests, len(timed), parts, 1000 * statistics.median(plain))


@contextmanager
def _parts_timed(engine: LLMEngine, watch: Stopwatch) -> Iterator[None]:
    """Every part of a step goes through the stopwatch."""
    runner = engine.model_runner
    model = runner.model
    homes = (layers, sys.modules[type(model).__module__])  # whose global names the network calls
    with ExitStack() as stack:

        def time_it(owner: Any, name: str, part: str) -> None:
            stack.enter_context(_replaced(owner, name, watch.around(part, getattr(owner, name))))

        for home in dict.fromkeys(homes):
            for name in KERNELS.keys() & vars(home).keys():
                time_it(home, name, KERNELS[name])
        for path, module in model.named_modules():
            if isinstance(module, Linear) and path.rpartition(".")[2] not in HEADS:
                time_it(module, "forward", "products")
            elif isinstance(module, Embedding):
                time_it(module, "forward", "embedding")
        if runner.path.decoder_weights is not None:
            whole = watch.around_parts(decoder_step, runner.path.decoder_weights.cycles)
            stack.enter_context(_replaced(cpu, "decoder_step", whole))
        time_it(engine.scheduler, "schedule", "scheduler")
        time_it(engine.scheduler, "update_from_output", "scheduler")
        time_it(InputBatch, "build", "batch")
        time_it(runner.path, "forward", "forward")
        time_it(runner.path, "sample", "sampler")
        time_it(model, "compute_logits", "logits")
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """owner.name is value for a while; what was no attribute of its own is none afterwards."""
    own = vars(owner)
    had, before = name in own, own.get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
