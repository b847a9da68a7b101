"""Builders and oracles for the sampler's tests. The oracle is plain Python over lists, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from minivllm.sample import SamplingMetadata, SamplingRow
from minivllm.sampling_params import SamplingParams


def make_row(vocab_size: int, *, seed: int = 0, prompt=(), output=(), stops=(), bad_words=(), **params: Any):
    return SamplingRow(
        SamplingParams(**{"max_tokens": None, **params}),
        seed=seed,
        vocab_size=vocab_size,
        prompt_token_ids=list(prompt),
        output_token_ids=list(output),
        stop_token_ids=frozenset(stops),
        bad_words_token_ids=[list(word) for word in bad_words],
    )


def metadata_of(*rows: SamplingRow, **kwargs: Any) -> SamplingMetadata:
    return SamplingMetadata.from_requests(rows, **kwargs)


def llm_like_logits(num_rows: int, vocab_size: int, decay: float, seed: int) -> torch.Tensor:
    """Probabilities that fall like rank ** -decay, scattered over the vocabulary.  # [num_rows, vocab_size]"""
    generator = np.random.default_rng(seed)
    fall = -decay * np.log(np.arange(1, vocab_size + 1))
    rows = [
        (fall + 0.3 * generator.standard_normal(vocab_size))[generator.permutation(vocab_size)] for _ in range(num_rows)
    ]
    return torch.from_numpy(np.array(rows, dtype=np.float32))


def oracle_logits(
    logits: Sequence[float],
    params: SamplingParams,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    stops: Sequence[int] = (),
    bad_words: Sequence[Sequence[int]] = (),
) -> list[float]:
    """Everything before the temperature, one token and one rule at a time."""
    values = list(logits)
    for token_id in range(len(values)):
        if params.allowed_token_ids is not None and token_id not in params.allowed_token_ids:
            values[token_id] = -math.inf
        for word in bad_words:
            prefix = list(word[:-1])
            ends_with_prefix = list(output)[len(output) - len(prefix) :] == prefix and len(prefix) <= len(output)
            if word[-1] == token_id and ends_with_prefix:
                values[token_id] = -math.inf
        if len(output) < params.min_tokens and token_id in stops:
            values[token_id] = -math.inf
        values[token_id] += (params.logit_bias or {}).get(token_id, 0.0)
        if token_id in prompt or token_id in output:
            scale = params.repetition_penalty
            values[token_id] = values[token_id] / scale if values[token_id] > 0 else values[token_id] * scale
        count = list(output).count(token_id)
        values[token_id] -= params.frequency_penalty * count
        if count > 0:
            values[token_id] -= params.presence_penalty
    return values


def oracle_probabilities(
    values: Sequence[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[list[float], float]:
    """(the final distribution, how close a token came to a cut): below 1e-6 rounding may decide either way."""
    order = sorted(range(len(values)), key=lambda token_id: (-values[token_id], token_id))
    best = values[order[0]]
    weight = {token_id: math.exp((values[token_id] - best) / temperature) for token_id in order}
    kept = [token_id for token_id in order if weight[token_id] >= min_p]
    margin = min((abs(weight[token_id] - min_p) for token_id in order), default=1.0) if min_p > 0 else 1.0
    if 0 < top_k < len(kept):
        kept = [token_id for token_id in kept if values[token_id] >= values[kept[top_k - 1]]]
    if top_p < 1.0:
        total = math.fsum(weight[token_id] for token_id in kept)
        nucleus: list[int] = []
        before = 0.0
        for token_id in kept:
            margin = min(margin, abs(before / total - top_p))
            if before < top_p * total:
                nucleus.append(token_id)
            before += weight[token_id]
        kept = nucleus
    total = math.fsum(weight[token_id] for token_id in kept)
    probabilities = [0.0] * len(values)
    for token_id in kept:
        probabilities[token_id] = weight[token_id] / total
    return probabilities, margin


def chi_square_deviation(counts: Sequence[int], probabilities: Sequence[float]) -> float:
    """Standard deviations between Pearson's statistic and its mean (Wilson-Hilferty). |deviation| > 4: 1 in 16,000.

    Cells that expect fewer than 5 draws are taken together; a draw of an impossible cell gives infinity.
    """
    num_draws = sum(counts)
    cells: list[list[float]] = []
    rest = [0.0, 0.0]
    for count, probability in zip(counts, probabilities, strict=True):
        if probability == 0.0:
            if count:
                return math.inf
        elif probability * num_draws < 5:
            rest = [rest[0] + count, rest[1] + probability * num_draws]
        else:
            cells.append([count, probability * num_draws])
    if rest[1] >= 5:
        cells.append(rest)
    freedom = len(cells) - 1
    if freedom == 0:
        return 0.0
    statistic = sum((count - expected) ** 2 / expected for count, expected in cells)
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
