"""What the sampler must know: SamplingRow for one request, kept while it runs; SamplingMetadata for one step.

Everything that can be prepared once per request is (ids filtered to the width of the logits, counts for penalties),
so that a step only collects. Host memory only: lists, and numpy arrays for the sparse parts.

It does NOT know logits, chance or the scheduler. Built by worker/model_runner.py, read by sample/sampler.py.
Twin in vLLM: v1/sample/metadata.py, and the sampling half of v1/worker/gpu_input_batch.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from minivllm.sample.penalties import BadWords, Logits, PenaltyState, TokenIds, within
from minivllm.sampling_params import SamplingParams


class SamplingRow:
    """One request as the sampler sees it. Call `append` for every token it produces, once.

    output_token_ids is what it had produced before (a request that resumes after a preemption).
    stop_token_ids are eos and the stop ids: forbidden while the output is shorter than min_tokens.
    Ids outside [0, vocab_size), the width of the logits, are dropped here: none ever becomes an index.
    """

    __slots__ = (
        "allowed",
        "bad_words",
        "bias",
        "changes_logits",
        "early_stops",
        "num_output_tokens",
        "params",
        "penalties",
        "seed",
    )

    def __init__(
        self,
        params: SamplingParams,
        *,
        seed: int,
        vocab_size: int,
        prompt_token_ids: Sequence[int],
        output_token_ids: Iterable[int] = (),
        stop_token_ids: Iterable[int] = (),
        bad_words_token_ids: Sequence[Sequence[int]] = (),
    ):
        self.params = params
        self.seed = seed
        self.num_output_tokens = 0
        self.allowed = None if params.allowed_token_ids is None else within(params.allowed_token_ids, vocab_size)
        self.bias = _bias(params.logit_bias, vocab_size) if params.logit_bias else None
        self.early_stops: list[int] = within(stop_token_ids, vocab_size).tolist() if params.min_tokens else []
        self.bad_words = BadWords(bad_words_token_ids, vocab_size) if bad_words_token_ids else None
        self.penalties = PenaltyState(params, vocab_size, prompt_token_ids) if params.uses_penalties else None
        self.changes_logits = bool(self.early_stops) or any(
            part is not None for part in (self.allowed, self.bias, self.bad_words, self.penalties)
        )
        for token_id in output_token_ids:
            self.append(token_id)

    def append(self, token_id: int) -> None:
        """Take note of the next output token. O(1)."""
        self.num_output_tokens += 1
        if self.penalties is not None:
            self.penalties.append(token_id)
        if self.bad_words is not None:
            self.bad_words.append(token_id)

    def banned_now(self) -> list[int]:
        """Ids that bad_words and min_tokens forbid at this position."""
        banned = self.bad_words.banned_next() if self.bad_words is not None else []
        if self.num_output_tokens < self.params.min_tokens:
            banned = banned + self.early_stops
        return banned


def _bias(logit_bias: dict[int, float], vocab_size: int) -> tuple[TokenIds, Logits]:
    token_ids = within(logit_bias, vocab_size)
    return token_ids, np.array([logit_bias[token_id] for token_id in token_ids.tolist()], dtype=np.float32)


@dataclass(slots=True)
class SamplingMetadata:
    """One entry per row of logits; {row: ...} for what most requests do not use."""

    temperature: list[float]  # [num_reqs]; 0.0 = greedy
    top_k: list[int]  # [num_reqs]; 0 = off
    top_p: list[float]  # [num_reqs]; 1.0 = off
    min_p: list[float]  # [num_reqs]; 0.0 = off
    seeds: list[int]  # [num_reqs]
    positions: list[int]  # [num_reqs] index of the token to draw in the request's output
    num_logprobs: list[int | None]  # [num_reqs]; None = none asked
    allowed_token_ids: dict[int, TokenIds] = field(default_factory=dict)
    banned_token_ids: dict[int, list[int]] = field(default_factory=dict)  # from bad_words and min_tokens
    logit_bias: dict[int, tuple[TokenIds, Logits]] = field(default_factory=dict)
    penalties: dict[int, PenaltyState] = field(default_factory=dict)
    grammar_bitmask: torch.Tensor | None = None  # [num_reqs, ceil(vocab_size / 32)] int32, 1 = allowed

    @classmethod
    def from_requests(
        cls, rows: Sequence[SamplingRow], grammar_bitmask: torch.Tensor | None = None
    ) -> SamplingMetadata:
        """Collect the step: rows[i] belongs to row i of the logits. Reads the rows, changes nothing.

        grammar_bitmask: [num_reqs, ceil(vocab_size / 32)] int32
        """
        params = [row.params for row in rows]
        metadata = cls(
            temperature=[0.0 if p.is_greedy else p.temperature for p in params],
            top_k=[p.top_k for p in params],
            top_p=[p.top_p for p in params],
            min_p=[p.min_p for p in params],
            seeds=[row.seed for row in rows],
            positions=[row.num_output_tokens for row in rows],
            num_logprobs=[p.logprobs for p in params],
            grammar_bitmask=grammar_bitmask,
        )
        for index, row in enumerate(rows):
            if row.changes_logits:
                metadata._add_changes(index, row)
        return metadata

    def _add_changes(self, index: int, row: SamplingRow) -> None:
        if row.allowed is not None:
            self.allowed_token_ids[index] = row.allowed
        if banned := row.banned_now():
            self.banned_token_ids[index] = banned
        if row.bias is not None:
            self.logit_bias[index] = row.bias
        if row.penalties is not None:
            self.penalties[index] = row.penalties

    def changes_logits(self, index: int) -> bool:
        """Whether a step between the raw logprobs and the draw changes this row."""
        return (
            index in self.allowed_token_ids
            or index in self.banned_token_ids
            or index in self.logit_bias
            or index in self.penalties
        )
