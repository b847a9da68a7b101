"""compare: two runs side by side, the first difference marked.

    compare(outputs_a[0], outputs_b[0], labels=("float32", "int8"))
    compare(outputs_a, outputs_b)                       request by request
    compare_tokens(a, b)                                the same as numbers

Behind the first difference the runs continue different texts; what they say there is shown faint and not compared.
Knows no engine. Twin in vLLM: none; check_logprobs_close in its tests compares so.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minivllm.errors import InvalidRequestError
from minivllm.figures.page import Figure, figure
from minivllm.figures.tokens import Source, Token, described, tokens_of, visible
from minivllm.outputs import RequestOutput


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two answers up to their first difference."""

    num_equal: int  # tokens
    num_tokens: tuple[int, int]
    first_difference: int | None  # a position in the answers; None: they are equal
    max_delta: float | None  # of the log-probabilities of equal tokens; None: not reported
    max_delta_position: int | None
    gaps: tuple[float | None, float | None]  # at the difference, own token over the other run's, nats

    @property
    def verdict(self) -> str:
        """One or two sentences."""
        delta = ""
        if self.max_delta is not None:
            delta = f" Largest |Δlogprob| before: {self.max_delta:.2g}, at token {self.max_delta_position}."
        if self.first_difference is None:
            return f"All {self.num_equal} tokens are equal.{delta}"
        said = f"First difference at token {self.first_difference} of {self.num_tokens[0]} and {self.num_tokens[1]}."
        gaps = [f"{gap:.2g}" for gap in self.gaps if gap is not None]
        return said + (f" There each preferred its own by {' and '.join(gaps)} nats." if gaps else "") + delta


def compare_tokens(a: Sequence[Token], b: Sequence[Token]) -> Comparison:
    """Where two answers part, and how close their log-probabilities are until then. An end is a difference, too."""
    num_equal = 0
    for one, other in zip(a, b, strict=False):
        if (one.token_id, one.text if one.token_id is None else "") != (
            other.token_id,
            other.text if other.token_id is None else "",
        ):
            break
        num_equal += 1
    deltas = [
        (abs(one.logprob - other.logprob), position)
        for position, (one, other) in enumerate(zip(a[:num_equal], b[:num_equal], strict=True))
        if one.logprob is not None and other.logprob is not None
    ]
    largest = max(deltas, key=lambda delta: delta[0], default=None)
    differ = num_equal < max(len(a), len(b))
    both = num_equal < min(len(a), len(b))
    return Comparison(
        num_equal=num_equal,
        num_tokens=(len(a), len(b)),
        first_difference=num_equal if differ else None,
        max_delta=largest[0] if largest else None,
        max_delta_position=largest[1] if largest else None,
        gaps=(_gap(a[num_equal], b[num_equal]), _gap(b[num_equal], a[num_equal])) if both else (None, None),
    )


def _gap(own: Token, other: Token) -> float | None:
    """By how much a run preferred its own token; None where it did not report the other one."""
    rival = None if own.logprobs is None or other.token_id is None else own.logprobs.get(other.token_id)
    return None if rival is None or own.logprob is None else own.logprob - rival.logprob


def compare(
    a: Source | Sequence[RequestOutput],
    b: Source | Sequence[RequestOutput],
    *,
    labels: tuple[str, str] = ("a", "b"),
    title: str | None = None,
    candidate: int = 0,
    tokenizer: Any = None,
) -> Figure:
    """Two runs side by side.

    Args:
        a, b: an output of LLM.generate each, as many outputs each, or a list of texts each.
        labels: what the runs are called.
        candidate: which of the n answers.
        tokenizer: for texts where the outputs have no logprobs; None: ids.

    Raises InvalidRequestError: as many outputs as the other run has are needed.
    """
    left, right = _requests(a), _requests(b)
    if len(left) != len(right):
        raise InvalidRequestError(f"b must have as many outputs as a ({len(left)}), got {len(right)}.", parameter="b")
    sections = []
    num_different = 0
    for number, (one, other) in enumerate(zip(left, right, strict=True)):
        pair = [tokens_of(source, candidate=candidate, tokenizer=tokenizer) for source in (one, other)]
        result = compare_tokens(pair[0], pair[1])
        num_different += result.first_difference is not None
        heading = f"<b>request {number}</b> " if len(left) > 1 else ""
        columns = "".join(_column(label, tokens, result) for label, tokens in zip(labels, pair, strict=True))
        sections.append(f'<figcaption>{heading}{result.verdict}</figcaption><div class="runs">{columns}</div>')
    said = f"{num_different} of {len(left)} requests differ" if len(left) > 1 else ""
    return figure(title or f"{labels[0]} | {labels[1]}", said, "".join(sections))


def _requests(runs: Source | Sequence[RequestOutput]) -> list[Source]:
    if isinstance(runs, RequestOutput):
        return [runs]
    many = [run for run in runs if isinstance(run, RequestOutput)]
    return list(many) if many and len(many) == len(runs) else [runs]  # type: ignore[list-item]


def _column(label: str, tokens: Sequence[Token], result: Comparison) -> str:
    first = result.first_difference
    parts = []
    for position, token in enumerate(tokens):
        kind = "" if first is None or position < first else "first" if position == first else "after"
        said = html.escape(described(token, position))
        parts.append(f'<span class="token {kind}" title="{said}">{visible(token.text)}</span>')
        parts.append("<br>" if "\n" in token.text else "<wbr>")
    if first is not None and first >= len(tokens):
        parts.append('<span class="token first" title="this run ended here">end</span>')
    return f'<div><div class="part">{html.escape(label)}</div><div class="tokens">{"".join(parts)}</div></div>'
