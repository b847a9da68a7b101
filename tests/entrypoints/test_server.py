"""The real server over real sockets: clients that leave, bodies that are too long, the orderly end."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from minivllm import LLM, AsyncEngine, ConfigError
from minivllm.entrypoints.server import Server, make_server, serve
from minivllm.entrypoints.service import ServerConfig
from tests.engine.test_async_engine import Gate, settle
from tests.entrypoints.helpers import CHAT, COMPLETIONS, HELLO, PATIENCE, Reply, events_of, eventually

LONG = {"temperature": 0, "ignore_eos": True}  # until the context is full
SHORT = {**LONG, "max_tokens": 4}


@pytest.fixture
def server(engine: AsyncEngine) -> Iterator[Server]:
    """Listens on a free port; when it has stopped none of its threads is left."""
    before = set(threading.enumerate())
    server = make_server(engine, ServerConfig(port=0, served_model_names=("tiny",), max_body_bytes=100_000))
    server.start()
    yield server
    server.service.aborting.set()  # a test that failed may have left something running
    server.stop()
    eventually(lambda: set(threading.enumerate()) <= before)


def connect(server: Server) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)


def send(connection: http.client.HTTPConnection, path: str, body: dict[str, Any]) -> None:
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})


def read(connection: http.client.HTTPConnection) -> Reply:
    response = connection.getresponse()
    return Reply(response.status, response.headers, response.read().decode())


def get(server: Server, path: str) -> Reply:
    with contextlib.closing(connect(server)) as connection:
        connection.request("GET", path)
        return read(connection)


def post(server: Server, path: str, **body: Any) -> Reply:
    with contextlib.closing(connect(server)) as connection:
        send(connection, path, body)
        return read(connection)


def in_background(function: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=function)
    thread.start()
    return thread


def raw(server: Server, data: bytes) -> Reply:
    """Bytes in, the answer out."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as client:
        sending = in_background(lambda: _send(client, data))
        response = http.client.HTTPResponse(client)
        response.begin()
        reply = Reply(response.status, response.headers, response.read().decode())
    sending.join(PATIENCE)
    return reply


def _send(client: socket.socket, data: bytes) -> None:
    """The server may answer and close before it has read everything."""
    with contextlib.suppress(OSError):
        client.sendall(data)


# ------------------------------------------------------------------ answers
def test_one_connection_carries_many_requests(server: Server):
    with contextlib.closing(connect(server)) as connection:
        for path, body, status in (
            (CHAT, {"messages": HELLO, **SHORT}, 200),
            (CHAT, {"messages": HELLO, "temperature": 5}, 400),
            ("/tokenize", {"prompt": "the"}, 200),
            ("/nothing", {}, 404),
            (COMPLETIONS, {"prompt": "the", **SHORT}, 200),
        ):
            send(connection, path, body)
            assert read(connection).status == status
            assert connection.sock is not None, path  # http.client drops it when the server says "close"


def test_headers_and_role_arrive_before_the_first_step(server: Server, gate: Gate):
    with contextlib.closing(connect(server)) as connection:
        send(connection, CHAT, {"messages": HELLO, "stream": True, **SHORT})
        response = connection.getresponse()  # nothing has been computed
        assert response.status == 200 and response.headers["Content-Type"].startswith("text/event-stream")
        assert b'"role":"assistant"' in response.readline()
        gate.open()
        assert events_of(response.read().decode().lstrip("\n"))[-1] == "[DONE]"


def test_the_openai_client_works(server: Server):
    """base64 vectors are its default, and it wants every field that it has a type for."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").id == "tiny"
        whole = client.chat.completions.create(model="tiny", messages=HELLO, temperature=0, max_tokens=8, logprobs=True)
        assert whole.usage and whole.usage.total_tokens and len(whole.choices[0].logprobs.content)
        stream = client.chat.completions.create(
            model="tiny",
            messages=HELLO,
            temperature=0,
            max_tokens=8,
            stream=True,
            stream_options={"include_usage": True},
        )
        *chunks, last = list(stream)
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
        assert last.usage and last.usage.completion_tokens == whole.usage.completion_tokens
        completion = client.completions.create(model="tiny", prompt="the", max_tokens=3, temperature=0, echo=True)
        assert completion.choices[0].text.startswith("the")
        vectors = [
            client.embeddings.create(model="tiny", input=["the", "and"], **fields).data[1].embedding
            for fields in ({}, {"encoding_format": "float"})
        ]
        assert vectors[0] == pytest.approx(vectors[1])
        for name, call in (
            ("NotFoundError", lambda: client.chat.completions.create(model="other", messages=HELLO)),
            ("BadRequestError", lambda: client.chat.completions.create(model="tiny", messages=HELLO, top_p=7)),
        ):
            with pytest.raises(getattr(openai, name)):
                call()


# ------------------------------------------------------------------ clients that leave
LEAVING: dict[str, dict[str, Any]] = {
    "stream": {"messages": HELLO, "stream": True, **LONG},
    "whole": {"messages": HELLO, **LONG},
    "three": {"messages": HELLO, "temperature": 1, "ignore_eos": True, "n": 3},
    "beams": {"messages": HELLO, "use_beam_search": True, "n": 2},
}


@pytest.mark.parametrize("body", LEAVING.values(), ids=LEAVING.keys())
def test_a_client_that_leaves_a_running_request_frees_its_blocks(
    server: Server, engine: AsyncEngine, llm: LLM, gate: Gate, body: dict[str, Any]
):
    pool = llm.llm_engine.scheduler.kv_cache.pool
    connection = connect(server)
    send(connection, CHAT, body)
    gate.wait()
    gate.steps(2)
    assert engine.num_unfinished_requests > 0
    connection.close()
    if "stream" not in body:  # noticed without anything being written
        eventually(lambda: server.service.num_in_flight == 0)
    gate.open()
    eventually(lambda: engine.num_unfinished_requests == 0 and server.service.num_in_flight == 0)
    settle(engine)
    assert pool.num_free_blocks == pool.num_blocks - 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_the_queue_is_never_computed(
    server: Server, engine: AsyncEngine, llm: LLM, gate: Gate, stream: bool
):
    running = [engine.submit("the") for _ in range(2)]  # both places are taken
    gate.wait()
    connection = connect(server)
    send(connection, CHAT, {"messages": HELLO, "stream": stream, **LONG})
    eventually(lambda: engine.num_unfinished_requests == 3)
    gate.steps(2)
    assert len(llm.llm_engine.scheduler.waiting) == 1
    connection.close()
    eventually(lambda: server.service.num_in_flight == 0)
    gate.steps(1)
    assert engine.num_unfinished_requests == 2
    gate.open()
    for one in running:
        list(one)


def test_others_go_on_when_one_leaves(server: Server, engine: AsyncEngine):
    expected = post(server, CHAT, messages=HELLO, **LONG).body["choices"][0]["message"]["content"]
    leaver = connect(server)
    send(leaver, CHAT, {"messages": HELLO, "stream": True, **LONG})
    with contextlib.closing(connect(server)) as stayer:
        send(stayer, CHAT, {"messages": HELLO, **LONG})
        leaver.getresponse().readline()
        leaver.close()
        assert read(stayer).body["choices"][0]["message"]["content"] == expected
    eventually(lambda: server.service.num_in_flight == 0)


# ------------------------------------------------------------------ what is too long
HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode()


def chunked(size: int) -> bytes:
    return b"".join(b"2710\r\n" + b"x" * 10_000 + b"\r\n" for _ in range(size // 10_000)) + b"0\r\n\r\n"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (HEAD + b"Content-Length: 200000\r\n\r\n" + b"x" * 200_000, 413),
        (HEAD + b"Content-Length: 100001\r\n\r\n" + b"x" * 100_001, 413),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(200_000), 413),
        (HEAD + b"X: " + b"x" * 100_000 + b"\r\n\r\n", 431),
        (HEAD + b"Content-Length: five\r\n\r\n", 400),
        (HEAD + b"Transfer-Encoding: gzip\r\n\r\n", 501),
        (b"GET /health HTTP/1.1\r\nbad header\r\n\r\n", 400),
    ],
    ids=["declared", "one too many", "chunked", "header", "no length", "unknown coding", "no header"],
)
def test_what_the_socket_layer_refuses_has_the_same_shape(server: Server, data: bytes, status: int):
    """A chunked body beyond the limit was cut and read as if it were whole; refusals were plain text."""
    reply = raw(server, data)
    assert (reply.status, bool(reply.error)) == (status, True)
    assert get(server, "/health").status == 200


def test_a_chunked_body_within_the_limit_is_read(server: Server):
    body = json.dumps({"messages": HELLO, **SHORT}).encode()
    pieces = b"".join(
        f"{len(body[i : i + 7]):x}\r\n".encode() + body[i : i + 7] + b"\r\n" for i in range(0, len(body), 7)
    )
    assert raw(server, HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + pieces + b"0\r\n\r\n").status == 200


def test_a_port_that_is_taken_is_a_clear_error(server: Server, engine: AsyncEngine):
    with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{server.port}"):
        make_server(engine, ServerConfig(port=server.port))


# ------------------------------------------------------------------ the end
@pytest.mark.parametrize("stream", [False, True])
def test_a_drain_lets_running_answers_end_and_refuses_new_ones(server: Server, gate: Gate, stream: bool):
    with contextlib.closing(connect(server)) as connection:
        send(connection, CHAT, {"messages": HELLO, "stream": stream, **SHORT})
        gate.wait()
        draining = in_background(lambda: server.drain(PATIENCE))
        eventually(server.service.draining.is_set)
        assert get(server, "/ready").status == 503 and get(server, "/health").status == 200
        assert post(server, CHAT, messages=HELLO).status == 503
        gate.open()
        reply = read(connection)
        draining.join(PATIENCE)
        assert not draining.is_alive()
        if stream:
            assert reply.events[-2]["choices"][0]["finish_reason"] == "length" and reply.events[-1] == "[DONE]"
        else:
            assert reply.body["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("is_urgent", [False, True])
def test_what_is_not_done_in_time_or_at_a_second_signal_ends_with_an_error(server: Server, gate: Gate, is_urgent: bool):
    with contextlib.closing(connect(server)) as whole, contextlib.closing(connect(server)) as stream:
        send(whole, CHAT, {"messages": HELLO, **LONG})
        send(stream, CHAT, {"messages": HELLO, "stream": True, **LONG})
        gate.wait()
        eventually(lambda: server.service.num_in_flight == 2)
        server.drain(PATIENCE if is_urgent else 0.0, lambda: is_urgent)
        reply = read(stream)
        assert reply.events[-2]["error"]["type"] == "service_unavailable" and reply.events[-1] == "[DONE]"
        reply = read(whole)
        assert (reply.status, reply.error["code"]) == (503, 503)


def test_an_idle_server_drains_at_once(server: Server):
    server.drain(10 * PATIENCE)
    assert server.service.draining.is_set() and server.service.num_in_flight == 0


def test_a_signal_ends_the_server_with_0_and_the_handlers_are_as_before(engine: AsyncEngine):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    urls = []

    def ready(server: Server) -> None:
        assert get(server, "/ready").status == 200
        urls.append(server.url)
        signal.raise_signal(signal.SIGTERM)

    assert serve(lambda: engine, ServerConfig(port=0), ready) == 0
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert not engine.is_alive and len(urls) == 1
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", int(urls[0].rsplit(":", 1)[1])), timeout=PATIENCE)


def test_a_dead_engine_ends_the_server_with_1(engine: AsyncEngine, llm: LLM, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("threading.excepthook", lambda _: None)  # the thread's own death is expected
    replies = []

    def die() -> list[Any]:
        raise KeyboardInterrupt

    def ready(server: Server) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(llm.llm_engine, "step", die)
            replies.append(post(server, CHAT, messages=HELLO, **LONG))
            eventually(lambda: not engine.is_alive)

    assert serve(lambda: engine, ServerConfig(port=0), ready) == 1
    assert replies[0].status == 503 and replies[0].error
    for request_id in list(llm.llm_engine.output_processor._parents):
        llm.llm_engine.abort_request(request_id)
