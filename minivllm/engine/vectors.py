"""What is done with embeddings after the model: shorter ones, and how alike two of them are. Plain Python.

    [length-1 vector] ── shorten ──▶ [length-1 vector of fewer numbers]      Matryoshka
    two of them       ── cosine  ──▶ a number in [-1, 1]

Called by llm.py, and by the HTTP layer for /v1/embeddings and /v1/score, so that both give the same numbers.
Knows no model. Twin in vLLM: vllm/entrypoints/pooling/ and vllm/pooling_params.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

from minivllm.config import ModelConfig
from minivllm.errors import InvalidRequestError, show

T = TypeVar("T")


def check_dimensions(dimensions: Any, model: ModelConfig) -> None:
    """As vLLM: only where the model says that it was trained for it. None: whole vectors. Raises InvalidRequestError"""
    if dimensions is None:
        return
    if model.matryoshka_dimensions is None:
        raise _bad_dimensions(
            f"{model.name} was not trained for shorter vectors (Matryoshka), which would be poor ones: leave it out."
        )
    allowed = model.matryoshka_dimensions or range(1, model.embedding_size + 1)
    if type(dimensions) is not int or dimensions not in allowed:
        words = ", ".join(map(str, allowed)) if isinstance(allowed, tuple) else f"in [1, {model.embedding_size}]"
        raise _bad_dimensions(f"for {model.name} it must be {words}, got {show(dimensions, 40)}.")


def _bad_dimensions(what: str) -> InvalidRequestError:
    return InvalidRequestError(f"dimensions: {what}", parameter="dimensions")


def shorten(embedding: list[float], dimensions: int | None) -> list[float]:
    """The first `dimensions` numbers, L2-normalised again. embedding: [embedding_size]"""
    if dimensions is None or dimensions == len(embedding):
        return embedding
    head = embedding[:dimensions]
    length = math.sqrt(sum(x * x for x in head))
    return [x / length for x in head] if length > 0 else head


def cosine(left: list[float], right: list[float]) -> float:
    """Of two L2-normalised vectors. left, right: [embedding_size]"""
    return max(-1.0, min(1.0, sum(x * y for x, y in zip(left, right, strict=True))))


def check_pairs(num_left: int, num_right: int, left_name: str, right_name: str) -> None:
    """One against many, or as many against as many. Raises InvalidRequestError."""
    if num_left not in (1, num_right):
        raise InvalidRequestError(
            f"{left_name} must hold one text or as many as {right_name} ({num_right}), got {num_left}.",
            parameter=left_name,
        )


def pairs_of(left: Sequence[T], right: Sequence[T]) -> list[tuple[T, T]]:
    """Each of the right with its partner on the left, which may be one for all."""
    partners = list(left) * len(right) if len(left) == 1 else list(left)
    return list(zip(partners, right, strict=True))
