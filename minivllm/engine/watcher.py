"""Watcher: who looks on while an engine works, and changes nothing. There is one at most, and none costs nothing.

    request_added, request_aborted, prefix_cache_reset          between two steps
    step_scheduled ─▶ batch_built ─▶ logits_ready* ─▶ step_computed ─▶ step_ended          in every step

All of it happens in the engine's own thread. A watcher that raises fails the step, as a model that raises does.

Knows nobody. Called by llm_engine.py and, for what happens inside a step, worker/model_runner.py; implemented by
trace/recorder.py. Twin in vLLM: none; the nearest is StatLoggerBase of vllm/v1/metrics/loggers.py.
"""

from __future__ import annotations

from typing import Protocol

from minivllm.engine.input_processor import EngineCoreRequest
from minivllm.outputs import ModelRunnerOutput, SchedulerOutput
from minivllm.worker.model_runner import BatchWatcher


class Watcher(BatchWatcher, Protocol):
    """See the module's docstring."""

    def request_added(self, request: EngineCoreRequest) -> None:
        """It is checked and waits for its first step."""

    def request_aborted(self, request_id: str) -> None:
        """Its caller has given it up while it ran or waited."""

    def prefix_cache_reset(self) -> None:
        """Every cached prefix is forgotten."""

    def step_scheduled(self, step: SchedulerOutput) -> None:
        """It is decided who computes how much; nothing is computed yet."""

    def step_computed(self, result: ModelRunnerOutput | None) -> None:
        """Tokens are drawn and no request knows of them yet. None: the step raised."""

    def step_ended(self) -> None:
        """Every request has what the step meant for it; those that ended are gone."""
