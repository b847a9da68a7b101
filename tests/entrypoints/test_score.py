"""POST /v1/score: the numbers of LLM.score, in vLLM's shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minivllm import LLM, AsyncEngine
from tests.entrypoints.helpers import Web

SCORE = "/v1/score"
QUERY, TEXTS = "the value is", ["the value", "and", "what is the capital"]


@pytest.fixture(scope="module", params=["llama", "bert-mean"])
def model(request: pytest.FixtureRequest, tiny_model: Callable[[str], Path]) -> LLM:
    return LLM(tiny_model(request.param), dtype="float32", num_gpu_blocks_override=64, batch_invariant=True)


@pytest.fixture
def server(model: LLM) -> Iterator[Web]:
    """The answers to expect are computed before: an engine thread does not share its engine."""
    engine = AsyncEngine(model.llm_engine)
    yield Web(engine)
    engine.shutdown()


def scores(web: Web, **fields: Any) -> list[float]:
    reply = web.post(SCORE, **fields)
    assert reply.status == 200, reply.text
    assert [entry["index"] for entry in reply.body["data"]] == list(range(len(reply.body["data"])))
    return [entry["score"] for entry in reply.body["data"]]


def test_scores_are_those_of_llm(model: LLM, request: pytest.FixtureRequest):
    one_to_many = [output.outputs.score for output in model.score(QUERY, TEXTS, use_tqdm=False)]
    pairs = [output.outputs.score for output in model.score(TEXTS, TEXTS[::-1], use_tqdm=False)]
    ids = [model.get_tokenizer().encode(text) for text in TEXTS]
    web: Web = request.getfixturevalue("server")
    assert scores(web, text_1=QUERY, text_2=TEXTS) == scores(web, text_1=[QUERY], text_2=ids) == one_to_many
    assert scores(web, text_1=TEXTS, text_2=TEXTS[::-1]) == pairs
    assert scores(web, text_1=QUERY, text_2=TEXTS[0]) == one_to_many[:1]
    assert len(set(one_to_many)) == 3 and all(-1 <= score <= 1 for score in one_to_many)


@pytest.mark.parametrize("names", [("queries", "documents"), ("queries", "items"), ("data_1", "data_2")], ids="-".join)
def test_the_other_names_mean_the_same(server: Web, names: tuple[str, str]):
    left, right = names
    assert scores(server, **{left: QUERY, right: TEXTS}) == scores(server, text_1=QUERY, text_2=TEXTS)


def test_the_body_has_the_shape_of_vllm_and_counts_a_query_once(server: Web, model: LLM):
    body = server.post(SCORE, text_1=QUERY, text_2=TEXTS, model="alias").body
    assert list(body) == ["id", "object", "created", "model", "data", "usage"] and body["id"].startswith("score-")
    assert (body["object"], body["model"]) == ("list", "tiny")
    assert {tuple(entry) for entry in body["data"]} == {("index", "object", "score")}
    assert {entry["object"] for entry in body["data"]} == {"score"}
    num_tokens = sum(len(model.get_tokenizer().encode(text)) for text in (QUERY, *TEXTS))
    assert body["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens, "completion_tokens": 0}


def test_the_path_of_older_clients_is_answered_too(server: Web):
    answers = [server.post(path, text_1=QUERY, text_2=TEXTS).body["data"] for path in (SCORE, "/score", "/v1//score/")]
    assert answers[0] == answers[1] == answers[2]
    assert SCORE in server.get("/v1/engine/capabilities").body["endpoints"]


def test_long_texts_are_cut_on_request(server: Web):
    long = "the value is and " * 60
    reply = server.post(SCORE, text_1=long, text_2=TEXTS)
    assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")
    reply = server.post(SCORE, text_1=long, text_2=TEXTS, truncate_prompt_tokens=6)
    assert reply.status == 200 and reply.headers["X-Minivllm-Truncated"] == "prompt_tokens=6"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1"),
        ({"text_1": ["a", "b"], "text_2": "a"}, "text_1"),
        ({"queries": ["a", "b"], "documents": "a"}, "queries"),
        ({"text_1": [], "text_2": ["a"]}, "text_1"),
        ({"text_1": "a", "text_2": []}, "text_2"),
        ({"text_1": "a", "text_2": ["a", ""]}, "text_2"),
        ({"text_1": "", "text_2": "a"}, "text_1"),
        ({"data_1": "a", "data_2": {"content": []}}, "data_2"),
        ({"text_1": "a"}, "text_2"),
        ({"text_2": "a"}, "text_1"),
        ({}, "text_1"),
        ({"text_1": "a", "documents": "b"}, "text_1"),
        ({"text_1": "a", "text_2": "b", "queries": "c"}, "text_1"),
        ({"queries": "a", "documents": "b", "items": "c"}, "queries"),
        ({"text_1": "a", "text_2": [[5], [99999]]}, "text_2"),
        ({"text_1": "a", "text_2": ["b"] * 2049}, "text_2"),
        ({"text_1": "a", "text_2": "b", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"text_1": "a", "text_2": "b", "model": "nobody"}, "model"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_bad_request_names_its_field(server: Web, fields: dict[str, Any], param: str):
    reply = server.post(SCORE, **fields)
    assert (reply.status, reply.error["param"]) == (404 if param == "model" else 400, param)
