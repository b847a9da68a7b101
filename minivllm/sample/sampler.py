"""The sampler: logits in, one token per row out. The order of the steps is in this file and nowhere else.

    grammar bitmask -> raw logits kept for logprobs -> allowed_token_ids -> bad_words, min_tokens -> logit_bias
    -> repetition, frequency, presence penalties -> greedy rows: argmax -> temperature -> min_p -> top_k -> top_p
    -> draw -> logprobs gathered

A row's tokens and logprobs depend on that row alone, bit for bit: steps for all rows together only move or scale
single values, everything that sums works on one row.

It does NOT know requests, text or the model. Called by worker/model_runner.py.
Twin in vLLM: v1/sample/sampler.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from minivllm.outputs import NO_TOKEN_LEFT, TokenLogprobs
from minivllm.sample import penalties
from minivllm.sample.logprobs import host_logits, token_logprobs
from minivllm.sample.metadata import SamplingMetadata
from minivllm.sample.penalties import Logits
from minivllm.sample.random import uniform
from minivllm.sample.top_k_top_p import LogitsRow, inverse_cdf, restrict

NO_TOKEN = -1  # sampled_token_ids of a row in `errors`


@dataclass(slots=True)
class SamplerOutput:
    """One entry per row of logits. A row in `errors` has token NO_TOKEN and no logprobs."""

    sampled_token_ids: list[int]  # [num_reqs]
    logprobs: list[TokenLogprobs | None]  # [num_reqs]
    errors: dict[int, str]  # row -> why nothing can be drawn


def sample(logits: torch.Tensor, metadata: SamplingMetadata) -> SamplerOutput:
    """Draw one token per row of `logits` [num_reqs, vocab_size].

    Works in place when the logits are fp32, contiguous and in main memory: their content is spent afterwards.
    A row whose largest logit is NaN or +inf, or that has no token left, becomes an entry of `errors`; the other
    rows are not affected. ValueError when the metadata are for another number of rows.
    """
    values = _checked(logits, metadata)
    raw_rows = _process(values, metadata)
    best = values.argmax(axis=1)  # [num_reqs]; NaN counts as the largest
    row_max = values[np.arange(len(values)), best].tolist()  # [num_reqs]
    tokens: list[int] = best.tolist()
    errors = {row: reason(value) for row, value in enumerate(row_max) if not math.isfinite(value)}
    for row, temperature in enumerate(metadata.temperature):
        if row in errors:
            tokens[row] = NO_TOKEN
        elif temperature > 0.0:
            tokens[row] = _draw(values[row], row_max[row], row, metadata)

    logprobs: list[TokenLogprobs | None] = [None] * len(tokens)
    for row, raw in raw_rows.items():
        if row not in errors:
            logprobs[row] = entry = token_logprobs(raw, tokens[row], metadata.num_logprobs[row] or 0)
            if math.isnan(entry.logprobs[0]):  # NaN or +inf that a mask has hidden from the draw
                errors[row], tokens[row], logprobs[row] = reason(math.nan), NO_TOKEN, None
    return SamplerOutput(tokens, logprobs, errors)


def final_probabilities(logits: torch.Tensor, metadata: SamplingMetadata) -> torch.Tensor:
    """The distribution that `sample` draws from, row by row, float64; the logits stay as they are.

    A greedy row is 1 at its argmax. A row that `sample` would report in `errors` is NaN.
    logits: [num_reqs, vocab_size] -> [num_reqs, vocab_size]
    """
    values = _checked(logits, metadata).copy()
    _process(values, metadata)
    probabilities = np.zeros(values.shape, dtype=np.float64)
    for row, row_values in enumerate(values):
        best = int(row_values.argmax())
        row_max = float(row_values[best])
        if not math.isfinite(row_max):
            probabilities[row] = math.nan
        elif metadata.temperature[row] == 0.0:
            probabilities[row, best] = 1.0
        else:
            ids, weights = _distribution(row_values, row_max, row, metadata)
            probabilities[row, slice(None) if ids is None else ids] = weights / weights.sum(dtype=np.float64)
    return torch.from_numpy(probabilities)


def _checked(logits: torch.Tensor, metadata: SamplingMetadata) -> Logits:  # [num_reqs, vocab_size], as array
    if logits.dim() != 2 or len(logits) != len(metadata.temperature):
        raise ValueError(f"logits must be [{len(metadata.temperature)}, vocab_size], got {list(logits.shape)}")
    return host_logits(logits)


def _process(values: Logits, metadata: SamplingMetadata) -> dict[int, LogitsRow]:
    """All steps before the argmax, in place. Returns {row: [vocab_size] raw logits} for the rows that want logprobs."""
    if metadata.grammar_bitmask is not None:
        penalties.apply_grammar_bitmask(values, metadata.grammar_bitmask.cpu().numpy())
    raw_rows = {
        row: values[row].copy() if metadata.changes_logits(row) else values[row]
        for row, num_logprobs in enumerate(metadata.num_logprobs)
        if num_logprobs is not None
    }
    penalties.apply_allowed_token_ids(values, metadata.allowed_token_ids)
    penalties.apply_banned_token_ids(values, metadata.banned_token_ids)
    penalties.apply_logit_bias(values, metadata.logit_bias)
    penalties.apply_penalties(values, metadata.penalties)
    return raw_rows


def _distribution(
    row_values: LogitsRow, row_max: float, row: int, metadata: SamplingMetadata
) -> tuple[np.ndarray | None, np.ndarray]:
    return restrict(
        row_values,
        row_max,
        metadata.temperature[row],
        metadata.top_k[row],
        metadata.top_p[row],
        metadata.min_p[row],
    )


def _draw(row_values: LogitsRow, row_max: float, row: int, metadata: SamplingMetadata) -> int:
    ids, weights = _distribution(row_values, row_max, row, metadata)
    index = inverse_cdf(weights, uniform(metadata.seeds[row], metadata.positions[row]))
    return index if ids is None else int(ids[index])


def reason(row_max: float) -> str:
    """Why nothing can be drawn from a row whose largest logit is row_max (NaN counts as the largest)."""
    if math.isnan(row_max):
        return "The model produced logits that are not numbers (NaN)."
    if row_max > 0:
        return "The model produced an infinite logit."
    return NO_TOKEN_LEFT
