"""token_heatmap: every token on a colour.

    token_heatmap(output)                              surprise: the fainter, the surer the model was of this token
    token_heatmap(output, "entropy")                   how undecided it was, whatever was drawn
    token_heatmap(output, captured.of(output).norm(dim=-1))    any number per token

Orange is large; where some values are below 0, those are blue. Knows no engine. Twin in vLLM: none.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

from minivllm.errors import InvalidRequestError
from minivllm.figures.page import Figure, figure
from minivllm.figures.tokens import Source, Token, described, tokens_of, visible

ORANGE, BLUE = "230,119,0", "28,126,214"
STRONGEST = 0.7  # opacity: text in the page's own colour stays readable on it
SURPRISE_NATS = 6.0  # a probability of 1/400 and less has the strongest colour


def token_heatmap(
    source: Source,
    values: str | Iterable[float | None] = "logprob",
    *,
    title: str | None = None,
    candidate: int = 0,
    tokenizer: Any = None,
    show_values: bool = False,
) -> Figure:
    """The tokens of an answer on colours.

    Args:
        source: an output of LLM.generate, or a list of texts.
        values: "logprob" or "entropy" (nats) of the output's logprobs, which the request must have asked for; of its
            prompt_logprobs, too, where it has them. Or numbers, one for each token of the answer, or of prompt and
            answer, or of all but the newest token, which nothing is computed for. None, NaN, infinite ones: no colour.
        candidate: which of the n answers.
        tokenizer: for texts where the output has no logprobs; None: ids.
        show_values: the numbers below the tokens, too.

    Raises InvalidRequestError: naming what does not fit.
    """
    if isinstance(values, str):
        tokens, numbers, scale = _known(values, source, candidate, tokenizer)
        name = {"logprob": "surprise, -logprob in nats", "entropy": "entropy in nats, at least"}[values]
    else:
        tokens, numbers = _given(values, source, candidate, tokenizer)
        scale = max((abs(number) for number in numbers if number is not None), default=0.0)
        name = "value"
    low = -scale if any(number is not None and number < 0 for number in numbers) else 0.0
    legend = (
        f'{name} {low:.3g}<span class="legend" style="background:linear-gradient(90deg,'
        f'{_colour(low, scale)},transparent{"" if low else " 0"},{_colour(scale, scale)})"></span>{scale:.3g}'
    )
    body = "".join(_parts(tokens, numbers, scale, show_values))
    return figure(title or "token heatmap", legend, f'<div class="tokens">{body}</div>')


def _known(name: str, source: Source, candidate: int, tokenizer: Any) -> tuple[list[Token], list[float | None], float]:
    """Tokens, their numbers, and the number that gets the strongest colour."""
    if name not in ("logprob", "entropy"):
        raise InvalidRequestError(f"values must be logprob, entropy or numbers, got {name!r}.", parameter="values")
    with_prompt = getattr(source, "prompt_logprobs", None) is not None
    tokens = tokens_of(source, candidate=candidate, tokenizer=tokenizer, with_prompt=with_prompt)
    if not any(token.logprobs for token in tokens):
        raise InvalidRequestError(
            f"{name} needs logprobs: ask for them, SamplingParams(logprobs=5), or give numbers.", parameter="values"
        )
    if name == "logprob":
        return tokens, [None if token.logprob is None else -token.logprob for token in tokens], SURPRISE_NATS
    entropies = [token.entropy for token in tokens]
    return tokens, entropies, max(entropy for entropy in entropies if entropy is not None)


def _given(
    values: Iterable[float | None], source: Source, candidate: int, tokenizer: Any
) -> tuple[list[Token], list[float | None]]:
    numbers = [float(value) if value is not None and math.isfinite(value) else None for value in values]
    whole = tokens_of(source, candidate=candidate, tokenizer=tokenizer, with_prompt=True)
    answer = [token for token in whole if not token.is_prompt]
    for tokens in (answer, whole, whole[:-1]):
        if len(tokens) == len(numbers):
            return tokens, numbers
    raise InvalidRequestError(
        f"values must be {len(answer)} numbers (the answer's tokens) or {len(whole)} (prompt and answer), "
        f"got {len(numbers)}.",
        parameter="values",
    )


def _parts(tokens: Sequence[Token], numbers: Sequence[float | None], scale: float, show_values: bool) -> Iterable[str]:
    has_prompt = bool(tokens) and tokens[0].is_prompt
    for position, (token, number) in enumerate(zip(tokens, numbers, strict=True)):
        if has_prompt and (position == 0 or token.is_prompt != tokens[position - 1].is_prompt):
            line = "" if position == 0 else "<br>"
            yield f'{line}<span class="part">{"prompt" if token.is_prompt else "answer"}</span> '
        known = "unknown" if number is None else ""
        style = "" if number is None else f' style="background:{_colour(number, scale)}"'
        below = f"<small>{'-' if number is None else format(number, '.2g')}</small>" if show_values else ""
        said = described(token, position) + ("" if number is None else f"\nvalue {number:.4g}")
        yield f'<span class="token {known}" title="{html.escape(said)}"{style}>{visible(token.text)}{below}</span>'
        yield "<br>" if "\n" in token.text else "<wbr>"


def _colour(number: float, scale: float) -> str:
    opacity = STRONGEST * min(1.0, abs(number) / scale) if scale else 0.0
    return f"rgba({BLUE if number < 0 else ORANGE},{opacity:.3f})"
