"""One process, two models: a generating one, and one beside it that gives vectors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from minivllm import LLM, AsyncEngine
from minivllm.entrypoints.app import create_app
from minivllm.entrypoints.server import Server, make_server
from minivllm.entrypoints.service import STUCK_SECONDS, ServerConfig
from minivllm.errors import ConfigError
from tests.command import Run
from tests.engine.test_async_engine import Gate
from tests.entrypoints.helpers import CHAT, COMPLETIONS, EMBEDDINGS, HELLO, Web
from tests.test_cli_serve import started

SCORE = "/v1/score"
TEXTS = ["the value is", "and", "what"]
NAMES = ServerConfig(served_model_names=("tiny", "alias"), served_embedding_model_names=("vectors", "bge"))


@pytest.fixture(scope="module")
def embedder(tiny_model: Callable[[str], Path]) -> LLM:
    return LLM(tiny_model("bert-cls"), dtype="float32", batch_invariant=True)


@pytest.fixture(scope="module")
def expected(embedder: LLM) -> list[list[float]]:
    return [output.outputs.embedding for output in embedder.embed(TEXTS, use_tqdm=False)]


@pytest.fixture(scope="module")
def chat_vectors(llm: LLM) -> list[list[float]]:
    return [output.outputs.embedding for output in llm.embed(TEXTS, use_tqdm=False)]


@pytest.fixture
def beside(expected: list[list[float]], embedder: LLM) -> Iterator[AsyncEngine]:
    engine = AsyncEngine(embedder.llm_engine, max_queue=4)
    yield engine
    engine.shutdown()
    assert not embedder.llm_engine.has_unfinished_requests()


@pytest.fixture
def both(chat_vectors: list[list[float]], engine: AsyncEngine, beside: AsyncEngine) -> Web:
    return Web(engine, NAMES, beside)


def vectors(web: Web, **fields: Any) -> list[list[float]]:
    reply = web.post(EMBEDDINGS, input=TEXTS, **fields)
    assert reply.status == 200, reply.text
    return [entry["embedding"] for entry in reply.body["data"]]


# ------------------------------------------------------------------ which model answers
def test_the_listing_has_every_name_of_both(both: Web, llm: LLM, embedder: LLM):
    cards = both.get("/v1/models").body["data"]
    assert [card["id"] for card in cards] == ["tiny", "alias", "vectors", "bge"]
    lengths = [model.llm_engine.config.model.max_model_len for model in (llm, llm, embedder, embedder)]
    assert [card["max_model_len"] for card in cards] == lengths
    assert [card["root"] for card in cards] == ["llama", "llama", "bert-cls", "bert-cls"]
    assert both.get("/v1/models/bge").body == cards[3]
    capabilities = both.get("/v1/engine/capabilities").body
    assert (capabilities["model"], capabilities["embedding_model"]) == ("tiny", "vectors")


@pytest.mark.parametrize("name", ["vectors", "bge", None, ""], ids=repr)
def test_the_embedding_model_answers_embeddings_also_without_a_name(
    both: Web, expected: list[list[float]], name: str | None
):
    assert vectors(both, model=name) == expected
    assert both.post(EMBEDDINGS, input=TEXTS, model=name).body["model"] == "vectors"
    assert both.post(SCORE, text_1=TEXTS[0], text_2=TEXTS, model=name).body["model"] == "vectors"


def test_the_generating_model_embeds_only_by_its_name(both: Web, chat_vectors: list[list[float]]):
    for name in ("tiny", "alias"):
        assert vectors(both, model=name) == chat_vectors
        assert both.post(EMBEDDINGS, input=TEXTS, model=name).body["model"] == "tiny"


def test_the_generating_model_generates_with_and_without_a_name(both: Web):
    for name in ("tiny", None):
        assert both.chat(model=name, max_tokens=2).body["model"] == "tiny"
        assert both.complete(model=name, max_tokens=2).status == 200


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/v1/responses"])
@pytest.mark.parametrize("name", ["vectors", "bge"])
def test_the_embedding_model_generates_nothing_and_the_answer_says_who_does(both: Web, path: str, name: str):
    fields = {CHAT: {"messages": HELLO}, COMPLETIONS: {"prompt": "the"}}.get(path, {"input": "the"})
    reply = both.post(path, model=name, **fields)
    assert (reply.status, reply.error["param"]) == (400, "model")
    assert f"{name!r} gives embeddings and generates no text" in reply.error["message"]
    assert "tiny, alias" in reply.error["message"]


def test_an_unknown_name_is_told_all_names(both: Web):
    for path, fields in ((CHAT, {"messages": HELLO}), (EMBEDDINGS, {"input": "a"})):
        reply = both.post(path, model="gpt-4", **fields)
        assert (reply.status, reply.error["code"]) == (404, "model_not_found")
        assert "served: tiny, alias, vectors, bge" in reply.error["message"]


def test_each_model_has_its_own_tokenizer(both: Web, llm: LLM, embedder: LLM):
    for name, model in (("tiny", llm), (None, llm), ("vectors", embedder)):
        tokens = both.post("/tokenize", prompt="the value", model=name).body
        assert tokens["tokens"] == model.get_tokenizer().encode("the value")
        assert tokens["max_model_len"] == model.llm_engine.config.model.max_model_len
        text = both.post("/detokenize", tokens=tokens["tokens"], model=name).body["prompt"]
        assert text == model.get_tokenizer().decode(tokens["tokens"])


def test_without_names_the_models_have_their_own(engine: AsyncEngine, beside: AsyncEngine):
    web = Web(engine, ServerConfig(), beside)
    assert [card["id"] for card in web.get("/v1/models").body["data"]] == ["llama", "bert-cls"]


def test_one_name_for_both_is_refused_at_the_start(engine: AsyncEngine, beside: AsyncEngine):
    names = ServerConfig(served_model_names=("a", "b"), served_embedding_model_names=("c", "b"))
    with pytest.raises(ConfigError, match="'b' is the name of both") as caught:
        create_app(engine, names, beside)
    assert caught.value.parameter == "served_embedding_model_names"


def test_names_for_a_model_that_is_not_there_are_refused_at_the_start(engine: AsyncEngine):
    with pytest.raises(ConfigError, match="no embedding model") as caught:
        create_app(engine, ServerConfig(served_embedding_model_names=("c",)))
    assert caught.value.parameter == "served_embedding_model_names"


# ------------------------------------------------------------------ both at once
def test_a_full_queue_of_one_does_not_stop_the_other(both: Web, gate: Gate, beside: AsyncEngine):
    """Two run and four wait; the seventh would be refused."""
    engine = both.service.engine
    streams = [engine.submit("the", None) for _ in range(engine.max_requests)]
    assert both.chat(max_tokens=2).status == 429
    assert both.get("/ready").status == 429
    assert both.post(EMBEDDINGS, input=TEXTS).status == 200
    assert both.post(EMBEDDINGS, input=TEXTS, model="tiny").status == 429
    for stream in streams:
        stream.close()
    gate.open()


@pytest.mark.parametrize("dead", ["engine", "embedding_engine"])
def test_one_dead_engine_is_a_sick_server(both: Web, dead: str):
    assert (both.get("/health").status, both.get("/ready").status) == (200, 200)
    getattr(both.service, dead).shutdown()
    assert (both.get("/health").status, both.get("/ready").status, both.service.is_alive) == (503, 503, False)


def test_one_stuck_engine_is_a_sick_server(both: Web, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(type(both.service.embedding_engine), "seconds_without_progress", STUCK_SECONDS + 1)
    assert both.get("/health").status == 503


# ------------------------------------------------------------------ over a socket
@pytest.fixture
def live(chat_vectors: list[list[float]], engine: AsyncEngine, beside: AsyncEngine) -> Iterator[Server]:
    names = {"served_model_names": ("tiny",), "served_embedding_model_names": ("vectors",)}
    server = make_server(engine, ServerConfig(port=0, poll_seconds=0.02, **names), beside)
    server.start()
    yield server
    server.drain(5.0)
    server.stop()


def test_the_openai_client_chats_and_embeds_at_one_address(live: Server, expected: list[list[float]]):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny", "vectors"]
        answers: list[Any] = []
        talk = threading.Thread(
            target=lambda: answers.append(client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=40))
        )
        talk.start()
        found = client.embeddings.create(model="vectors", input=TEXTS)  # base64 on the wire
        talk.join()
        assert answers[0].choices[0].finish_reason and answers[0].model == "tiny"
        assert [entry.embedding for entry in found.data] == expected and found.model == "vectors"
        many = client.embeddings.create(model="vectors", input=["the value"] * 2048, encoding_format="float")
        assert [entry.index for entry in many.data] == list(range(2048))
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="vectors", messages=HELLO)
        assert caught.value.param == "model"
        with pytest.raises(openai.BadRequestError) as caught:
            client.embeddings.create(model="vectors", input="a", dimensions=8)
        assert caught.value.param == "dimensions"


def test_a_drain_lets_embeddings_end_and_refuses_new_ones(
    live: Server, embedder: LLM, monkeypatch: pytest.MonkeyPatch, expected: list[list[float]]
):
    gate = Gate(embedder, monkeypatch)
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)
    found: list[Any] = []
    ask = threading.Thread(target=lambda: found.append(client.embeddings.create(model="vectors", input=TEXTS)))
    ask.start()
    gate.wait()
    drain = threading.Thread(target=live.drain, args=(30.0,))
    drain.start()
    while not live.service.draining.is_set():
        pass
    with pytest.raises(openai.InternalServerError) as caught:
        client.embeddings.create(model="vectors", input="the")
    assert caught.value.status_code == 503
    gate.open()
    ask.join()
    drain.join()
    assert [entry.embedding for entry in found[0].data] == expected
    client.close()


# ------------------------------------------------------------------ the command
def test_the_command_serves_both_and_says_so(tiny_model: Callable[[str], Path], expected: list[list[float]]):
    models = (str(tiny_model("llama")), "--embedding-model", str(tiny_model("bert-cls")))
    names = ("--served-model-name", "tiny", "--served-embedding-model-name", "vectors")
    common = ("--dtype", "float32", "--batch-invariant", "--num-gpu-blocks-override", "64")
    with started("serve", *models, "--port", "0", *names, *common, num_lines=9) as server:
        assert server.lines[0].split(" model ")[1].split()[0] == "tiny"
        assert server.lines[1] == "embeddings: model vectors  max_model_len 128  weights 0 MiB  cache 0 MiB"
        with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
            assert client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=2).choices
            found = client.embeddings.create(model="vectors", input=TEXTS)
            assert [entry.embedding for entry in found.data] == expected
        code, _ = server.stop()
        assert code == 0


def test_the_embedding_model_is_checked_like_the_other(minivllm: Run, tiny_model: Callable[[str], Path]):
    folder = str(tiny_model("llama"))
    result = minivllm("serve", folder, "--port", "0", "--embedding-model", "/no/such/model")
    assert result.code == 1 and "/no/such/model" in result.message
    result = minivllm("serve", folder, "--port", "0", "--served-embedding-model-name", "vectors")
    assert result.code == 2 and "--served-embedding-model-name needs --embedding-model" in result.message
