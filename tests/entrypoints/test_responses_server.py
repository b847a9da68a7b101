"""The Responses API over real sockets, with openai's own client: what it parses, and clients that leave."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from minivllm import LLM, AsyncEngine
from minivllm.entrypoints.server import Server
from tests.engine.test_async_engine import Gate, settle
from tests.entrypoints.helpers import PATIENCE, eventually
from tests.entrypoints.response_helpers import GREEDY, RESPONSES, checked, named_events, text_of
from tests.entrypoints.test_responses import break_steps
from tests.entrypoints.test_server import connect, get, in_background, read, send, server

__all__ = ["server"]  # a fixture

HI = "what is the capital"
LONG = {"input": HI, "temperature": 0, "extra_body": {"ignore_eos": True}}
SHORT = {**LONG, "max_output_tokens": 8}


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as client:
        yield client


# ------------------------------------------------------------------ openai's client
def test_the_client_folds_the_stream_to_the_whole_answer(client: openai.OpenAI):
    whole = client.responses.create(model="tiny", **SHORT)
    assert whole.output_text and whole.usage.output_tokens == 8 and whole.status == "incomplete"
    with client.responses.stream(model="tiny", **SHORT) as stream:  # raises when events come out of order
        kinds = [event.type for event in stream]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    events = list(client.responses.create(model="tiny", stream=True, **SHORT))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert events[-1].response.output_text == whole.output_text
    assert events[-1].response.usage.output_tokens == 8


def test_the_client_gets_its_final_response(client: openai.OpenAI):
    """From a stream that was completed, which is what its helper waits for."""
    fields = {"model": "tiny", "input": HI, "temperature": 0, "extra_body": {"stop": ["e", "a", "t", " "]}}
    whole = client.responses.create(**fields)
    assert whole.status == "completed"
    with client.responses.stream(**fields) as stream:
        assert stream.get_final_response().output_text == whole.output_text


def test_the_client_reads_what_is_remembered(client: openai.OpenAI):
    first = client.responses.create(model="tiny", **SHORT)
    assert client.responses.retrieve(first.id).to_dict() == first.to_dict()
    following = client.responses.create(model="tiny", previous_response_id=first.id, **{**SHORT, "input": "more"})
    items: list[Any] = [{"role": "user", "content": HI}, *first.output, {"role": "user", "content": "more"}]
    again = client.responses.create(model="tiny", **{**SHORT, "input": items})
    assert following.output_text == again.output_text
    client.responses.delete(first.id)
    for call in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError):
            call(first.id)
    with pytest.raises(openai.BadRequestError):
        client.responses.cancel(again.id)
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="tiny", input=HI, top_p=7)
    assert caught.value.param == "top_p"


def test_the_client_gets_structured_output(client: openai.OpenAI):
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form: Any = {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}
    response = client.responses.create(model="tiny", input=HI, text=form, max_output_tokens=40)
    assert json.loads(response.output_text)["a"] in (1, 2)


def test_the_client_raises_what_breaks_a_stream(client: openai.OpenAI, llm: LLM, monkeypatch: pytest.MonkeyPatch):
    break_steps(llm, monkeypatch, 3)
    with pytest.raises(openai.APIError, match="failed to answer") as caught:
        list(client.responses.create(model="tiny", stream=True, **SHORT))
    assert caught.value.code == "500"


def test_the_client_cancels_a_stream(client: openai.OpenAI, gate: Gate, engine: AsyncEngine):
    stream = client.responses.create(model="tiny", stream=True, **LONG)
    name = next(stream).response.id
    gate.wait()
    gate.steps(2)
    assert client.responses.cancel(name).status == "cancelled"
    gate.open()
    with pytest.raises(openai.APIError, match="cancelled"):
        list(stream)
    eventually(lambda: engine.num_unfinished_requests == 0)
    assert client.responses.retrieve(name).status == "cancelled"


# ------------------------------------------------------------------ clients that leave
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_blocks(server: Server, engine: AsyncEngine, llm: LLM, gate: Gate, stream: bool):
    """And what it saw of a stream is remembered; of a whole answer it saw nothing."""
    pool = llm.llm_engine.scheduler.kv_cache.pool
    connection = connect(server)
    send(connection, RESPONSES, {"input": HI, "stream": stream, "temperature": 0, "ignore_eos": True})
    gate.wait()
    gate.steps(4)
    connection.close()
    if not stream:  # noticed without anything being written
        eventually(lambda: server.service.num_in_flight == 0)
    gate.open()
    eventually(lambda: engine.num_unfinished_requests == 0 and server.service.num_in_flight == 0)
    settle(engine)
    assert pool.num_free_blocks == pool.num_blocks - 1
    stored = list(server.service.responses._responses.values())
    assert [one.read()["status"] for one in stored] == (["cancelled"] if stream else [])


def test_a_client_that_leaves_the_queue_is_never_computed(server: Server, engine: AsyncEngine, gate: Gate):
    running = [engine.submit("the") for _ in range(2)]  # both places are taken
    gate.wait()
    connection = connect(server)
    send(connection, RESPONSES, {"input": HI, "stream": True, **GREEDY})
    eventually(lambda: engine.num_unfinished_requests == 3)
    connection.close()
    eventually(lambda: server.service.num_in_flight == 0)
    gate.steps(1)
    assert engine.num_unfinished_requests == 2
    gate.open()
    for one in running:
        list(one)


def test_many_streams_at_once_and_others_that_look(server: Server):
    """Every stream keeps the rules, whoever reads, deletes or cancels beside it; nobody gets a 5xx."""
    texts, statuses = [], []

    def ask(number: int) -> None:
        with contextlib.closing(connect(server)) as connection:
            send(connection, RESPONSES, {"input": f"{HI} {number % 2}", "stream": True, **GREEDY})
            response = checked(named_events(read(connection).text))
            texts.append((number % 2, text_of(response)))

    def look() -> None:
        for _ in range(40):
            for name in list(server.service.responses._responses):
                statuses.append(get(server, f"{RESPONSES}/{name}").status)

    threads = [in_background(lambda number=number: ask(number)) for number in range(5)]
    threads.append(in_background(look))
    for thread in threads:
        thread.join(PATIENCE)
    assert len(texts) == 5 and len(set(texts)) == 2 and set(statuses) <= {200}
