"""POST /v1/embeddings: the vectors of LLM.embed, as numbers or bytes, from a decoder and from an encoder."""

from __future__ import annotations

import array
import base64
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minivllm import LLM, AsyncEngine
from minivllm.entrypoints.embeddings import create_embedding
from minivllm.entrypoints.protocol import EmbeddingRequest
from minivllm.entrypoints.service import ClientGoneError
from tests.entrypoints.helpers import COMPLETIONS, EMBEDDINGS, Web, eventually

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
        ({"input": "a", "dimensions": "8"}, "dimensions"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": ["a", 5]}, "input"),
        ({"input": ["a", [5, "b"]]}, "input"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": "a", "truncate_prompt_tokens": 10**6}, "truncate_prompt_tokens"),
        ({"input": "a", "truncation_side": "left"}, "truncation_side"),
        ({"input": "a", "normalize": False}, "normalize"),
        ({"input": "a", "use_activation": False}, "use_activation"),
        ({"input": "a", "embed_dtype": "float16"}, "embed_dtype"),
        ({"input": "a", "endianness": "big"}, "endianness"),
        ({"input": "a", "messages": [{"role": "user", "content": "a"}]}, "messages"),
        ({}, "input"),
    ],
    ids=lambda value: str(value)[:60],
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


# ------------------------------------------------------------------ many inputs
class Busy:
    """Notes how many requests of the engine are unfinished whenever one is added."""

    def __init__(self, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch):
        self.most = 0
        submit = engine.submit_processed

        def noted(*arguments: Any) -> Any:
            stream = submit(*arguments)
            self.most = max(self.most, engine.num_unfinished_requests)
            return stream

        monkeypatch.setattr(engine, "submit_processed", noted)


def test_a_batch_may_be_larger_than_the_queue(model: LLM, monkeypatch: pytest.MonkeyPatch):
    """The AI SDK sends up to 2048 values in one call; 320 requests fit, and a larger batch was a 429."""
    texts = [f"the value is {number} " * (1 + number % 3) for number in range(2048)]
    some = list(range(0, 2048, 97))
    expected = [output.outputs.embedding for output in model.embed([texts[i] for i in some], use_tqdm=False)]
    with AsyncEngine(model.llm_engine, max_queue=8) as engine:
        busy = Busy(engine, monkeypatch)
        reply = Web(engine).post(EMBEDDINGS, input=texts, encoding_format="base64")
        assert reply.status == 200, reply.text[:300]
        found = [entry["embedding"] for entry in reply.body["data"]]
        assert len(found) == 2048 and engine.num_unfinished_requests == 0
    assert [base64.b64decode(found[i]) for i in some] == [array.array("f", vector).tobytes() for vector in expected]
    assert 0 < busy.most <= engine.max_requests


def test_a_batch_leaves_room_in_the_queue_for_others(server: Web, model: LLM, monkeypatch: pytest.MonkeyPatch):
    busy = Busy(server.service.engine, monkeypatch)
    assert server.post(EMBEDDINGS, input=["the value"] * 500).status == 200
    assert busy.most <= server.service.engine.max_requests // 2


def test_a_batch_that_finds_the_queue_full_is_refused_and_one_that_is_in_waits(model: LLM):
    with AsyncEngine(model.llm_engine, max_queue=0) as engine:
        web, others = Web(engine), []
        refill = engine.submit_processed

        def crowded(*arguments: Any) -> Any:
            """As soon as a request of the batch is in, somebody else takes the rest of the queue for a while."""
            stream = refill(*arguments)
            while not others and engine.num_unfinished_requests < engine.max_requests:
                others.append(refill(model.llm_engine.process_input("the", embed=True)))
            return stream

        engine.submit_processed = crowded  # type: ignore[method-assign]
        reply = web.post(EMBEDDINGS, input=["the value"] * 200)
        assert (reply.status, len(reply.body["data"])) == (200, 200) and others
        engine.submit_processed = refill  # type: ignore[method-assign]
        engine.max_requests = 0
        reply = web.post(EMBEDDINGS, input=["the value"] * 200)
        assert (reply.status, reply.error["code"], reply.headers["Retry-After"]) == (429, "queue_full", "1")


def test_one_bad_input_of_many_and_nothing_is_computed(server: Web, monkeypatch: pytest.MonkeyPatch):
    busy = Busy(server.service.engine, monkeypatch)
    reply = server.post(EMBEDDINGS, input=["the value"] * 300 + [""])
    assert (reply.status, reply.error["param"], busy.most) == (400, "input", 0)


def test_a_client_that_leaves_ends_its_batch(model: LLM):
    with AsyncEngine(model.llm_engine) as engine:
        service = Web(engine).service
        asked: list[int] = []

        def is_gone() -> bool:
            asked.append(engine.num_unfinished_requests)
            return len(asked) > 3

        body = EmbeddingRequest(input=["the value is"] * 1000)
        with pytest.raises(ClientGoneError):
            create_embedding(service, body, is_gone)
        eventually(lambda: engine.num_unfinished_requests == 0)


# ------------------------------------------------------------------ fields
def test_a_long_input_is_cut_on_request_and_the_answer_says_so(model: LLM, request: pytest.FixtureRequest):
    text, size = "the value is and " * 60, model.llm_engine.config.model.max_model_len
    expected = [
        model.embed(text, truncate_prompt_tokens=limit, use_tqdm=False)[0].outputs.embedding for limit in (-1, 7)
    ]
    web: Web = request.getfixturevalue("server")
    for limit, tokens, vector in ((-1, size, expected[0]), (7, 7, expected[1])):
        reply = web.post(EMBEDDINGS, input=[text, "the"], truncate_prompt_tokens=limit)
        assert reply.headers["X-Minivllm-Truncated"] == f"prompt_tokens={tokens}"
        assert reply.body["data"][0]["embedding"] == vector
        assert reply.body["usage"]["prompt_tokens"] == tokens + len(model.get_tokenizer().encode("the"))
    ids = list(range(5, 25))
    end = web.post(EMBEDDINGS, input=ids, truncate_prompt_tokens=4, truncation_side="left").body["data"]
    assert end == web.post(EMBEDDINGS, input=ids[-4:]).body["data"]
    assert "X-Minivllm-Truncated" not in web.post(EMBEDDINGS, input="the", truncate_prompt_tokens=-1).headers


def test_special_tokens_may_be_left_out(server: Web, model: LLM):
    ids = model.get_tokenizer().encode("the value", add_special_tokens=False)
    assert vectors(server, "the value", add_special_tokens=False) == vectors(server, ids)


def test_fields_that_change_nothing_are_taken(server: Web):
    plain = vectors(server, TEXTS)
    more = {"user": "u", "normalize": True, "use_activation": True, "embed_dtype": "float32", "endianness": "little"}
    assert vectors(server, TEXTS, dimensions=None, model="tiny", **more) == plain
    reply = server.post(EMBEDDINGS, input="the", truncate=True)
    assert reply.headers["X-Minivllm-Ignored"] == "truncate"


def test_a_matryoshka_model_gives_shorter_vectors(tiny_model: Callable[[str], Path], tmp_path: Path):
    folder = shutil.copytree(tiny_model("bert-cls"), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text()) | {"matryoshka_dimensions": [8, 16]}
    (folder / "config.json").write_text(json.dumps(config))
    llm = LLM(folder, dtype="float32", batch_invariant=True)
    expected = [output.outputs.embedding for output in llm.embed(TEXTS, dimensions=8, use_tqdm=False)]
    with AsyncEngine(llm.llm_engine) as engine:
        web = Web(engine)
        assert vectors(web, TEXTS, dimensions=8) == expected and len(expected[0]) == 8
        [packed, *_] = vectors(web, TEXTS, dimensions=8, encoding_format="base64")
        assert base64.b64decode(packed) == array.array("f", expected[0]).tobytes()
        reply = web.post(EMBEDDINGS, input="a", dimensions=9)
        assert (reply.status, reply.error["param"]) == (400, "dimensions") and "8, 16, got 9" in reply.error["message"]
