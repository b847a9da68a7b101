"""POST /v1/embeddings: the vectors of LLM.embed, as numbers or bytes, from a decoder and from an encoder."""

from __future__ import annotations

import array
import base64
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minivllm import LLM, AsyncEngine
from tests.entrypoints.helpers import COMPLETIONS, EMBEDDINGS, Web

TEXTS = ["the value is", "and", "what"]


@pytest.fixture(scope="module", params=["llama", "bert-mean", "qwen3-embedding"])
def model(request: pytest.FixtureRequest, tiny_model: Callable[[str], Path]) -> LLM:
    return LLM(tiny_model(request.param), dtype="float32", num_gpu_blocks_override=64, batch_invariant=True)


@pytest.fixture
def server(model: LLM) -> Iterator[Web]:
    """The answers to expect are computed before: an engine thread does not share its engine."""
    engine = AsyncEngine(model.llm_engine)
    yield Web(engine)
    engine.shutdown()


def vectors(web: Web, value: Any, **fields: Any) -> list[Any]:
    body = web.post(EMBEDDINGS, input=value, **fields).body
    assert [entry["index"] for entry in body["data"]] == list(range(len(body["data"])))
    return [entry["embedding"] for entry in body["data"]]


def test_vectors_are_those_of_llm_in_every_form(model: LLM, request: pytest.FixtureRequest):
    expected = [output.outputs.embedding for output in model.embed(TEXTS, use_tqdm=False)]
    tokens = [output.prompt_token_ids for output in model.embed(TEXTS, use_tqdm=False)]
    web: Web = request.getfixturevalue("server")
    assert vectors(web, TEXTS) == vectors(web, tokens) == vectors(web, TEXTS, encoding_format="float") == expected
    assert vectors(web, TEXTS[0]) == vectors(web, tokens[0]) == expected[:1]
    body = web.post(EMBEDDINGS, input=TEXTS).body
    num_tokens = sum(map(len, tokens))
    assert body["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens, "completion_tokens": 0}
    assert body["object"] == "list" and body["model"] == "tiny"


def test_bytes_are_little_endian_floats(server: Web):
    for numbers, text in zip(vectors(server, TEXTS), vectors(server, TEXTS, encoding_format="base64"), strict=True):
        assert base64.b64decode(text) == array.array("f", numbers).tobytes()  # this machine's order is theirs


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": [[5], [99999]]}, "input"),
        ({"input": "word " * 300}, "input"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "dimensions": 8}, "dimensions"),
        ({}, "input"),
    ],
    ids=str,
)
def test_a_bad_request_names_its_field(server: Web, fields: dict[str, Any], param: str):
    """Errors about the text named `prompt`, which nobody had sent."""
    reply = server.post(EMBEDDINGS, **fields)
    assert (reply.status, reply.error["param"]) == (400, param)


def test_an_encoder_generates_no_text(server: Web, model: LLM):
    status = server.post(COMPLETIONS, prompt="the", max_tokens=1).status
    assert status == (400 if model.llm_engine.config.model.is_pooling else 200)
    capabilities = server.get("/v1/engine/capabilities").body
    assert capabilities["generates_text"] == (status == 200) and capabilities["embeds"]
