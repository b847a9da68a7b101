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
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from minivllm.outputs import NO_TOKEN_LEFT, TokenLogprobs
from minivllm.sample import penalties
from minivllm.sample.logprobs import host_logits, token_logprobs
from minivllm.sample.metadata import SamplingMetadata
from minivllm.sample.penalties import Logits
from minivllm.sample.random import uniform
from minivllm.sample.top_k_top_p import LogitsRow, TokenIds, Weights, inverse_cdf, restrict

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


def _process(
    values: Logits, metadata: SamplingMetadata, seen: Callable[[str, Logits], None] | None = None
) -> dict[int, LogitsRow]:
    """All steps before the argmax, in place. Returns {row: [vocab_size] raw logits} for the rows that want logprobs.

    seen: called behind each step with its name and the values, which the next step changes.
    """
    if metadata.grammar_bitmask is not None:
        penalties.apply_grammar_bitmask(values, metadata.grammar_bitmask.cpu().numpy())
    raw_rows = {
        row: values[row].copy() if metadata.changes_logits(row) else values[row]
        for row, num_logprobs in enumerate(metadata.num_logprobs)
        if num_logprobs is not None
    }
    changes: tuple[tuple[str, Callable[[], None]], ...] = (
        ("grammar", lambda: None),  # done above: logprobs are those behind it
        ("allowed_token_ids", lambda: penalties.apply_allowed_token_ids(values, metadata.allowed_token_ids)),
        ("bad_words, min_tokens", lambda: penalties.apply_banned_token_ids(values, metadata.banned_token_ids)),
        ("logit_bias", lambda: penalties.apply_logit_bias(values, metadata.logit_bias)),
        ("penalties", lambda: penalties.apply_penalties(values, metadata.penalties)),
    )
    for name, change in changes:
        change()
        if seen is not None:
            seen(name, values)
    return raw_rows


class Chance(NamedTuple):
    """What one sampled row is drawn from: u points into the weights laid end to end."""

    u: float  # in [0, 1): the number that the request's seed has for this position
    ids: TokenIds | None  # [num_candidates], likeliest first; None: all tokens by id
    weights: Weights  # [num_candidates], not normalised


def stages(logits: torch.Tensor, metadata: SamplingMetadata) -> tuple[list[tuple[str, Logits]], list[Chance | None]]:
    """What `sample` does to the logits, stage by stage, for people who look on; the logits stay as they are.

    Returns [(stage, [num_reqs, vocab_size] logits behind it)] and one Chance per row, None for a row that is greedy or
    has nothing finite. A token that can no longer be drawn is -inf; from "temperature" on, logits are divided by it.
    logits: [num_reqs, vocab_size]
    """
    values = _checked(logits, metadata).copy()
    found = [("model", values.copy())]
    _process(values, metadata, lambda name, now: found.append((name, now.copy())))
    sampled = [row for row, t in enumerate(metadata.temperature) if t > 0.0 and math.isfinite(values[row].max())]
    chances: list[Chance | None] = [None] * len(values)
    for name in ("temperature", "min_p", "top_k", "top_p"):
        shown = values.copy()
        for row in sampled:
            ids, weights = restrict(
                values[row],
                float(values[row].max()),
                metadata.temperature[row],
                metadata.top_k[row] if name in ("top_k", "top_p") else 0,
                metadata.top_p[row] if name == "top_p" else 1.0,
                metadata.min_p[row] if name != "temperature" else 0.0,
            )
            chances[row] = Chance(uniform(metadata.seeds[row], metadata.positions[row]), ids, weights)
            scaled = values[row] / np.float32(metadata.temperature[row])
            if ids is not None:
                shown[row] = -np.inf
            kept = slice(None) if ids is None else ids
            shown[row, kept] = scaled[kept]
        found.append((name, shown))
    return found, chances


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
