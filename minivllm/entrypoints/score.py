"""POST /v1/score: how alike two texts are, as the cosine of their vectors. One against many, or pair by pair.

The numbers are those of LLM.score. A query that is compared with many texts is computed, and counted, once. Models that
read both texts at once (cross-encoders) cannot be loaded, and say so then.

Called by app.py. Twin in vLLM: vllm/entrypoints/pooling/scoring/.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from flask import Response

from minivllm.engine.vectors import check_pairs, cosine, pairs_of
from minivllm.entrypoints.answers import Envelope, json_response
from minivllm.entrypoints.embeddings import vector_job, vector_usage
from minivllm.entrypoints.generation import IsGone, collect, truncated_header
from minivllm.entrypoints.protocol import MAX_EMBEDDING_INPUTS, ScoreRequest, prompts_of
from minivllm.entrypoints.service import Service
from minivllm.errors import InvalidRequestError

# What the left one is called -> what the right one may be called.
PARTNERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"text_1": ("text_2",), "queries": ("documents", "items"), "data_1": ("data_2",)}
)


def create_score(service: Service, body: ScoreRequest, is_gone: IsGone) -> Response:
    """Raises ClientError, ServerError."""
    names = _names(body)
    left, right = (prompts_of(getattr(body, name), name, MAX_EMBEDDING_INPUTS) for name in names)
    check_pairs(len(left), len(right), *names)
    engine = service.engine_named(body.model, embeds=True)
    parameters = [names[0]] * len(left) + [names[1]] * len(right)
    job = vector_job(service, body, [*left, *right], parameters, is_gone)
    vectors = [output.outputs.embedding for output in collect(job)]
    value: dict[str, Any] = {
        **Envelope(service, "score", service.names_of(engine)[0]).open("list"),
        "data": [
            {"index": index, "object": "score", "score": cosine(*pair)}
            for index, pair in enumerate(pairs_of(vectors[: len(left)], vectors[len(left) :]))
        ],
        "usage": vector_usage(job),
    }
    return json_response(value, truncated_header(job))


def _names(body: ScoreRequest) -> tuple[str, str]:
    """The two fields that were sent: a pair that belongs together, and nothing else."""
    sent = [name for left, rights in PARTNERS.items() for name in (left, *rights) if getattr(body, name) is not None]
    for left, rights in PARTNERS.items():
        for right in rights:
            if sent == [left, right]:
                return left, right
    if len(sent) == 1 and sent[0] in PARTNERS:
        partner = " or ".join(PARTNERS[sent[0]])
        raise InvalidRequestError(f"{partner} is missing.", parameter=PARTNERS[sent[0]][0])
    missing = [left for left, rights in PARTNERS.items() if len(sent) == 1 and sent[0] in rights]
    if missing:
        raise InvalidRequestError(f"{missing[0]} is missing.", parameter=missing[0])
    raise InvalidRequestError(
        f"Send text_1 and text_2, or queries and documents, got {', '.join(sent) or 'neither'}.",
        parameter=sent[0] if sent else "text_1",
    )
