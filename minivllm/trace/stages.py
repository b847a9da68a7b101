"""One draw, explained: the logits behind every stage of the sampler, the token, and why it was this one.

    logits_ready ──▶ explain_rows(logits, metadata)  one Drawing per row, before anything is drawn
    step_computed ─▶ Drawing.finish(token_id)        the Draw: where u fell, or what was largest

The stages are those of sample/sampler.py, computed a second time with its own functions: what runs is never changed. On
a GPU, whose kernels draw, they are what the reference makes of the same logits.

Knows no step. Called by recorder.py. Twin in vLLM: none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from minivllm.sample.metadata import SamplingMetadata
from minivllm.sample.sampler import Chance, stages
from minivllm.trace.records import Candidate, Draw, Stage

DIGEST_CHARS = 16  # 64 bits: enough to see that two rows differ
TextOf = Callable[[int], str]
SETTINGS = ("temperature", "min_p", "top_k", "top_p")  # stages with one number


class Drawing(NamedTuple):
    """A draw that has not happened yet."""

    position: int
    digest: str
    stages: list[Stage]
    last: np.ndarray | None  # [vocab_size] logits behind the last stage; None in a recording
    chance: Chance | None

    def finish(self, token_id: int, text_of: TextOf) -> Draw:
        """The draw, now that it has happened."""
        draw = Draw(self.position, token_id, self.digest)
        if self.last is None:
            return draw
        draw.text, draw.stages = text_of(token_id), self.stages
        if self.chance is None:
            draw.why = _why_greedy(self.last, token_id, text_of)
        else:
            draw.u = self.chance.u
            draw.low, draw.high = _interval(self.chance, token_id)
            left = int(np.count_nonzero(self.chance.weights))
            others = f"among the {left:,} tokens that are left" if left > 1 else "which is the only token left"
            share = f"[{draw.low:.4f}, {draw.high:.4f})"
            draw.why = f"u = {draw.u:.4f} falls in {share}, the share of {draw.text!r}, {others}"
        return draw


def digest_of(numbers: np.ndarray | Sequence[float] | None) -> str:  # [size]
    """Equal for equal bits; empty for None."""
    return "" if numbers is None else hashlib.sha256(np.asarray(numbers).tobytes()).hexdigest()[:DIGEST_CHARS]


def explain_rows(
    logits: torch.Tensor,  # [num_reqs, vocab_size] fp32
    metadata: SamplingMetadata,
    text_of: TextOf,
    num_top: int,  # candidates to keep at each stage; 0: digests only
) -> list[Drawing]:
    """One Drawing per row. Reads, changes nothing."""
    rows = logits.detach().to("cpu", torch.float32).contiguous()
    digests = [digest_of(row) for row in rows.numpy()]
    if not num_top:
        return [Drawing(p, d, [], None, None) for p, d in zip(metadata.positions, digests, strict=True)]
    found, chances = stages(rows, metadata)
    drawings = []
    for row, digest in enumerate(digests):
        values = [(name, logits_of[row]) for name, logits_of in found]
        told = _told_stages(values, metadata, row, text_of, num_top)
        drawings.append(Drawing(metadata.positions[row], digest, told, values[-1][1], chances[row]))
    return drawings


def _told_stages(
    values: Sequence[tuple[str, np.ndarray]],  # (stage, [vocab_size] logits behind it)
    metadata: SamplingMetadata,
    row: int,
    text_of: TextOf,
    num_top: int,
) -> list[Stage]:
    """The stages of one row as records."""
    told: list[Stage] = []
    before: Any = None
    for name, logits in values:
        setting = float(getattr(metadata, name)[row]) if name in SETTINGS else None
        changed = before is not None and not np.array_equal(before, logits, equal_nan=True)
        num_left = int(np.count_nonzero(logits > -np.inf))
        stage = Stage(name, setting, changed, num_left, told[-1].top if told and not changed else [])
        if not stage.top:
            stage.top = _top(logits, text_of, num_top)
        told.append(stage)
        before = logits
    return told


def _top(logits: np.ndarray, text_of: TextOf, num_top: int) -> list[Candidate]:  # [vocab_size]
    """The likeliest tokens, equal ones by id. Empty where the logits are no numbers."""
    largest = float(logits.max())
    if not np.isfinite(largest):
        return []
    weights = np.exp(logits.astype(np.float64) - largest)  # [vocab_size]
    weights /= weights.sum()
    ids = np.argsort(-weights, kind="stable")[:num_top]
    kept = [int(token_id) for token_id in ids if logits[token_id] > -np.inf]
    return [Candidate(i, text_of(i), round(float(logits[i]), 5), round(float(weights[i]), 7)) for i in kept]


def _interval(chance: Chance, token_id: int) -> tuple[float, float]:
    """Where the token's share lies in [0, 1)."""
    shares = np.cumsum(chance.weights, dtype=np.float64) / float(np.sum(chance.weights, dtype=np.float64))
    found = np.flatnonzero(chance.ids == token_id) if chance.ids is not None else np.array([token_id])
    if not len(found):
        return 0.0, 0.0  # a GPU drew a token that the reference has cut off: a tie at the edge
    index = int(found[0])
    return float(shares[index - 1]) if index else 0.0, float(shares[index])


def _why_greedy(logits: np.ndarray, token_id: int, text_of: TextOf) -> str:  # [vocab_size]
    """The largest logit and how far the next one is."""
    own = float(logits[token_id])
    others = np.delete(logits, token_id)
    second = int(others.argmax())
    second += second >= token_id
    if not np.isfinite(logits[second]):
        return f"greedy: {text_of(token_id)!r} is the only token left"
    lead = own - float(logits[second])
    return f"greedy: {text_of(token_id)!r} has the largest logit, {own:.3f}; {text_of(second)!r} is {lead:.3f} behind"
