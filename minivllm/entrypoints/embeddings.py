"""POST /v1/embeddings: texts in, vectors of length 1 out. A generating model embeds with its last token.

Called by app.py. Twin in vLLM: vllm/entrypoints/pooling/embed/serving.py.
"""

from __future__ import annotations

import array
import base64
import sys
from typing import Any

from flask import Response

from minivllm.entrypoints.answers import Envelope, json_response
from minivllm.entrypoints.generation import IsGone, Job, collect
from minivllm.entrypoints.protocol import EmbeddingRequest, prompts_of
from minivllm.entrypoints.service import Service


def create_embedding(service: Service, body: EmbeddingRequest, is_gone: IsGone) -> Response:
    """Raises ClientError, ServerError."""
    prompts = prompts_of(body.input, "input")
    options = {"priority": body.priority or 0, "cache_salt": body.cache_salt}
    outputs = collect(Job(service, prompts, None, "input", is_gone, embed=True, **options))
    encode = _as_base64 if body.encoding_format == "base64" else list
    num_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    value: dict[str, Any] = {
        **Envelope(service, "embd").open("list"),
        "data": [
            {"index": index, "object": "embedding", "embedding": encode(output.outputs.embedding)}
            for index, output in enumerate(outputs)
        ],
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens, "completion_tokens": 0},
    }
    return json_response(value)


def _as_base64(embedding: list[float]) -> str:
    """Little-endian float32, as every client of this format expects."""
    values = array.array("f", embedding)
    if sys.byteorder == "big":
        values.byteswap()
    return base64.b64encode(values.tobytes()).decode("ascii")
