"""Throughput: how many tokens the engine computed and drew, in all and per second of the last moments.

Counts are kept in buckets of a quarter of a second, so that neither many short steps nor few long ones cost memory.
Knows no request. Fed by llm_engine.py after every step, read by snapshot.py.
Twin in vLLM: vllm/v1/metrics/loggers.py (LoggingStatLogger).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

BUCKET_SECONDS = 0.25


class Throughput:
    """Args:
    window_seconds: how far per_second() looks back.
    clock: seconds.

    Attributes:
        num_computed_tokens: whose keys and values were computed, prompts and outputs.
        num_output_tokens: that were drawn.
    """

    def __init__(self, window_seconds: float = 2.0, clock: Callable[[], float] = time.monotonic):
        self.num_computed_tokens = 0
        self.num_output_tokens = 0
        self._window_seconds = window_seconds
        self._clock = clock
        self._buckets: deque[list[int]] = deque(maxlen=round(window_seconds / BUCKET_SECONDS))  # number, two counts

    def add(self, num_computed_tokens: int, num_output_tokens: int) -> None:
        """One step has ended."""
        self.num_computed_tokens += num_computed_tokens
        self.num_output_tokens += num_output_tokens
        number = int(self._clock() / BUCKET_SECONDS)
        if not self._buckets or self._buckets[-1][0] != number:
            self._buckets.append([number, 0, 0])
        self._buckets[-1][1] += num_computed_tokens
        self._buckets[-1][2] += num_output_tokens

    def per_second(self) -> tuple[float, float]:
        """(computed, drawn) tokens per second."""
        oldest = int(self._clock() / BUCKET_SECONDS) - round(self._window_seconds / BUCKET_SECONDS)
        recent = [bucket for bucket in self._buckets if bucket[0] > oldest]
        computed, output = (sum(bucket[column] for bucket in recent) for column in (1, 2))
        return computed / self._window_seconds, output / self._window_seconds
