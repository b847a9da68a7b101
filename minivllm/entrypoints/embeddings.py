"""POST /v1/embeddings: texts in, vectors of length 1 out. A generating model embeds with its last token.

Without a name the embedding model answers, where there is one beside the generating model. A call may hold more inputs
than the queue does: they are queued a window at a time.

Called by app.py; vector_job also by score.py. Twin in vLLM: vllm/entrypoints/pooling/embed/serving.py.
"""

from __future__ import annotations

import array
import base64
import sys
from collections.abc import Sequence
from typing import Any

from flask import Response

from minivllm.engine.vectors import check_dimensions, shorten
from minivllm.entrypoints.answers import Envelope, json_response
from minivllm.entrypoints.generation import IsGone, Job, collect, prompt_options, truncated_header
from minivllm.entrypoints.protocol import MAX_EMBEDDING_INPUTS, EmbeddingRequest, VectorBody, prompts_of
from minivllm.entrypoints.service import Service

WINDOW_STEPS = 2  # requests of one call in the engine, in multiples of what runs at a time: it must not run dry


def create_embedding(service: Service, body: EmbeddingRequest, is_gone: IsGone) -> Response:
    """Raises ClientError, ServerError."""
    engine = service.engine_named(body.model, embeds=True)
    check_dimensions(body.dimensions, engine.engine.config.model)
    prompts = prompts_of(body.input, "input", MAX_EMBEDDING_INPUTS)
    job = vector_job(service, body, prompts, "input", is_gone)
    vectors = [shorten(output.outputs.embedding, body.dimensions) for output in collect(job)]
    encode = _as_base64 if body.encoding_format == "base64" else list
    value: dict[str, Any] = {
        **Envelope(service, "embd", service.names_of(engine)[0]).open("list"),
        "data": [
            {"index": index, "object": "embedding", "embedding": encode(vector)} for index, vector in enumerate(vectors)
        ],
        "usage": vector_usage(job),
    }
    return json_response(value, truncated_header(job))


def vector_job(
    service: Service, body: VectorBody, prompts: Sequence[Any], parameter: str | Sequence[str], is_gone: IsGone
) -> Job:
    """Queue what vectors are wanted of. parameter: what the caller calls it, or each of it."""
    engine = service.engine_named(body.model, embeds=True)
    window = WINDOW_STEPS * engine.engine.config.scheduler.max_num_seqs
    options = {"embed": True, **prompt_options(body)}
    return Job(service, prompts, None, parameter, is_gone, engine=engine, max_queued=window, **options)


def vector_usage(job: Job) -> dict[str, int]:
    num_tokens = sum(len(request.prompt_token_ids) for request in job.requests)
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens, "completion_tokens": 0}


def _as_base64(embedding: list[float]) -> str:
    """Little-endian float32, as every client of this format expects."""
    values = array.array("f", embedding)
    if sys.byteorder == "big":
        values.byteswap()
    return base64.b64encode(values.tobytes()).decode("ascii")
