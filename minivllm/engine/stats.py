"""What the engine counts and times: tokens, how requests ended, how long each part of a request took.

    arrival ──queue──▶ scheduled ──prefill──▶ first token ──decode──▶ last token
                           └────────────inference────────────┘

Plain numbers, always on, written by the engine thread alone: a token costs one bisection and two additions. Another
thread may read them at any time. A sequence is what is timed (n = 3 are three); a prompt is counted once for all its
sequences, as in the usage that callers are told. A request that was given up is counted, but not timed.

Knows no clock and no Prometheus: the bounds are those of vLLM's histograms, so that its dashboards read ours.
Filled by output_processor.py, shown by entrypoints/metrics.py.
Twin in vLLM: vllm/v1/metrics/stats.py and loggers.py.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, takewhile

from minivllm.config import DEFAULT_MAX_MODEL_LEN

FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_SECONDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_SECONDS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0),
    *(40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
STEP_TOKENS = (1.0, *(float(2**power) for power in range(3, 15)))  # 1, 8, 16, ..., 16384
NUM_CANDIDATES = (1.0, 2.0, 5.0, 10.0, 20.0)
NUM_PREEMPTIONS = (1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0)
FINISH_REASONS = ("stop", "length", "abort", "error")


def one_two_five(limit: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50, ... up to a limit."""
    series = (float(digit * 10**power) for power in count() for digit in (1, 2, 5))
    return tuple(takewhile(lambda bound: bound <= limit, series))


class Histogram:
    """How often a value fell into which interval.

    Attributes:
        counts: counts[i] values were <= bounds[i] and above the bound before it; the last one is above all bounds.
        total: their sum.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]):
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


@dataclass(slots=True)
class SequenceStats:
    """One sequence: its sizes, and when what happened in seconds of the engine's clock; None: not yet, or never."""

    arrival: float
    num_prompt_tokens: int
    max_tokens: int = 0  # what was asked for, or the room that was left; 0: an embedding
    is_first: bool = True  # of its request's sequences
    num_cached_tokens: int = 0
    num_tokens: int = 0  # generated
    num_preemptions: int = 0
    scheduled: float | None = None  # for the first time: a preempted sequence is scheduled again
    first_token: float | None = None
    last_token: float = 0.0


class SpecDecodeStats:
    """Drafts, since the engine was made.

    Attributes:
        num_drafts: verifications of one request's drafts.
        num_accepted_tokens_per_pos: [i] drafts in place i came true.
    """

    def __init__(self, num_speculative_tokens: int = 0):
        self.num_drafts = 0
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0
        self.num_accepted_tokens_per_pos = [0] * num_speculative_tokens

    def observe(self, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        """One request's drafts were verified."""
        self.num_drafts += 1
        self.num_draft_tokens += num_draft_tokens
        self.num_accepted_tokens += num_accepted_tokens
        for position in range(num_accepted_tokens):
            self.num_accepted_tokens_per_pos[position] += 1


class EngineStats:
    """Since the engine was made. spec_decode: None without speculative decoding."""

    def __init__(self, max_model_len: int = DEFAULT_MAX_MODEL_LEN, spec_decode: SpecDecodeStats | None = None):
        self.spec_decode = spec_decode
        self.prompt_tokens = 0  # of requests whose first token, or vector, came
        self.cached_prompt_tokens = 0  # of these, found in the prefix cache
        self.generation_tokens = 0
        self.finished = dict.fromkeys(FINISH_REASONS, 0)
        self.iteration_tokens = Histogram(STEP_TOKENS)
        self.time_to_first_token = Histogram(FIRST_TOKEN_SECONDS)
        self.inter_token_latency = Histogram(TOKEN_SECONDS)
        self.time_per_output_token = Histogram(TOKEN_SECONDS)
        self.e2e_time = Histogram(REQUEST_SECONDS)
        self.queue_time = Histogram(REQUEST_SECONDS)
        self.prefill_time = Histogram(REQUEST_SECONDS)
        self.decode_time = Histogram(REQUEST_SECONDS)
        self.inference_time = Histogram(REQUEST_SECONDS)
        sizes = one_two_five(max_model_len)
        self.num_prompt_tokens = Histogram(sizes)
        self.num_generation_tokens = Histogram(sizes)
        self.max_num_generation_tokens = Histogram(sizes)  # of a request's sequences, the longest
        self.prefill_computed_tokens = Histogram(sizes)
        self.max_tokens = Histogram(sizes)  # what was asked for, or the room that was left
        self.num_candidates = Histogram(NUM_CANDIDATES)
        self.num_preemptions = Histogram(NUM_PREEMPTIONS)

    def add_scheduled(self, sequence: SequenceStats, num_cached_tokens: int, now: float) -> None:
        """A sequence was admitted, not for the first time if it had been preempted."""
        if sequence.scheduled is None:
            sequence.scheduled, sequence.num_cached_tokens = now, num_cached_tokens

    def add_tokens(self, sequence: SequenceStats, num_tokens: int, now: float) -> None:
        """A step brought a sequence so many tokens."""
        self.generation_tokens += num_tokens
        sequence.num_tokens += num_tokens
        if sequence.first_token is None:
            sequence.first_token = now
            self.time_to_first_token.observe(now - sequence.arrival)
            self._add_prompt(sequence)
        else:
            self.inter_token_latency.observe(now - sequence.last_token)
        sequence.last_token = now

    def add_embedding(self, sequence: SequenceStats, reason: str, now: float) -> None:
        """A vector came, or an error in its place."""
        if reason != "error":
            self._add_prompt(sequence)
        self.add_finished(sequence, reason, now)

    def _add_prompt(self, sequence: SequenceStats) -> None:
        if sequence.is_first:
            self.prompt_tokens += sequence.num_prompt_tokens
            self.cached_prompt_tokens += sequence.num_cached_tokens

    def add_finished(self, sequence: SequenceStats, reason: str, now: float) -> None:
        """A sequence is over."""
        self.finished[reason] += 1
        if reason == "abort":
            return
        self.e2e_time.observe(now - sequence.arrival)
        self.num_prompt_tokens.observe(sequence.num_prompt_tokens)
        self.num_generation_tokens.observe(sequence.num_tokens)
        self.prefill_computed_tokens.observe(sequence.num_prompt_tokens - sequence.num_cached_tokens)
        self.num_preemptions.observe(sequence.num_preemptions)
        if sequence.max_tokens:
            self.max_tokens.observe(sequence.max_tokens)
        if sequence.scheduled is not None:
            self._add_times(sequence, sequence.scheduled, now)

    def _add_times(self, sequence: SequenceStats, scheduled: float, now: float) -> None:
        if sequence.first_token is None:  # an embedding, or an error before the first token
            first_token = last_token = now
        else:
            first_token, last_token = sequence.first_token, sequence.last_token
        self.queue_time.observe(scheduled - sequence.arrival)
        self.prefill_time.observe(first_token - scheduled)
        self.decode_time.observe(last_token - first_token)
        self.inference_time.observe(last_token - scheduled)
        if sequence.num_tokens > 1:
            self.time_per_output_token.observe((last_token - first_token) / (sequence.num_tokens - 1))

    def add_finished_request(self, sequences: Sequence[SequenceStats], num_candidates: int) -> None:
        """All sequences of a request are over."""
        self.num_candidates.observe(num_candidates)
        self.max_num_generation_tokens.observe(max(sequence.num_tokens for sequence in sequences))
