"""Tokens as figures show them: text with visible blanks, where it stands, and what the model gave for it.

Knows no colour. Called by heatmap.py and comparison.py. Twin in vLLM: none.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from minivllm.errors import InvalidRequestError
from minivllm.outputs import Logprob, RequestOutput

BLANKS = MappingProxyType({" ": "·", "\t": "⇥", "\n": "⏎", "\r": "␍"})

Source = RequestOutput | Sequence[str]  # an answer, or tokens as texts


@dataclass(frozen=True, slots=True)
class Token:
    """One position. logprobs: those that were reported there, this token's among them; None: none were."""

    text: str
    token_id: int | None = None
    is_prompt: bool = False
    logprobs: Mapping[int, Logprob] | None = None

    @property
    def own(self) -> Logprob | None:
        return None if self.logprobs is None or self.token_id is None else self.logprobs.get(self.token_id)

    @property
    def logprob(self) -> float | None:
        return None if self.own is None else self.own.logprob

    @property
    def entropy(self) -> float | None:
        """In nats, of the reported tokens, with all others as one: what is reported is never more than the truth."""
        if self.logprobs is None:
            return None
        probabilities = [math.exp(one.logprob) for one in self.logprobs.values()]
        probabilities.append(max(0.0, 1.0 - sum(probabilities)))
        return sum(-p * math.log(p) for p in probabilities if p > 0)

    def alternatives(self, count: int = 3) -> list[Logprob]:
        """The most likely other tokens, best first."""
        others = [one for token_id, one in (self.logprobs or {}).items() if token_id != self.token_id]
        return sorted(others, key=lambda one: -one.logprob)[:count]


def tokens_of(source: Source, *, candidate: int = 0, tokenizer: Any = None, with_prompt: bool = False) -> list[Token]:
    """The tokens of an answer, or of a list of texts.

    Args:
        candidate: which of the n answers.
        tokenizer: what `LLM.get_tokenizer()` gives, for texts where the output has no logprobs; None: ids are shown.
        with_prompt: the prompt's tokens in front.

    Raises InvalidRequestError: neither an answer nor texts.
    """
    if isinstance(source, RequestOutput):
        if not 0 <= candidate < len(source.outputs):
            raise InvalidRequestError(
                f"candidate must be 0 to {len(source.outputs) - 1}, got {candidate}.", parameter="candidate"
            )
        answer = source.outputs[candidate]
        prompt: list[Token] = []
        if with_prompt:
            prompt = _tokens(source.prompt_token_ids, source.prompt_logprobs, tokenizer, is_prompt=True)
        return prompt + _tokens(answer.token_ids, answer.logprobs, tokenizer, is_prompt=False)
    if isinstance(source, str) or not all(isinstance(text, str) for text in source):
        raise InvalidRequestError("source must be a RequestOutput or a list of texts.", parameter="source")
    return [Token(text) for text in source]


def _tokens(
    token_ids: Sequence[int],
    logprobs: Sequence[Mapping[int, Logprob] | None] | None,
    tokenizer: Any,
    *,
    is_prompt: bool,
) -> list[Token]:
    found = []
    for index, token_id in enumerate(token_ids):
        reported = logprobs[index] if logprobs is not None and index < len(logprobs) else None
        token = Token("", token_id, is_prompt, reported)
        text = token.own.decoded_token if token.own is not None else None
        if text is None and tokenizer is not None:
            text = tokenizer.decode([token_id])
        found.append(Token(f"[{token_id}]" if text is None else text, token_id, is_prompt, reported))
    return found


def visible(text: str) -> str:
    """HTML of a token's text: blanks as faint signs, a line break behind each ⏎."""
    if text == "":
        return '<span class="blank">∅</span>'
    parts = []
    for character in text:
        if character in BLANKS:
            parts.append(f'<span class="blank">{BLANKS[character]}</span>')
        else:
            parts.append(html.escape(character))
    return "".join(parts)


def described(token: Token, position: int) -> str:
    """What one reads when the pointer rests on the token. Plain text."""
    lines = [f"position {position}: {token.text!r}" + ("" if token.token_id is None else f" (id {token.token_id})")]
    if token.own is not None:
        rank = "" if token.own.rank is None else f", rank {token.own.rank}"
        lines.append(f"logprob {token.own.logprob:.4g}, probability {math.exp(token.own.logprob):.3g}{rank}")
    others = ", ".join(f"{one.decoded_token!r} {math.exp(one.logprob):.3g}" for one in token.alternatives())
    return "\n".join(lines + ([f"instead: {others}"] if others else []))
