"""The life of a server and of its connections: before the model is there, readers that do not read, clients that cut
the line wherever it can be cut, many at once, and the end. Whatever happens, nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import random
import selectors
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Response

from minivllm import LLM, AsyncEngine, ConfigError
from minivllm.entrypoints.app import create_app
from minivllm.entrypoints.server import Server, make_server, serve
from minivllm.entrypoints.service import ServerConfig
from minivllm.errors import EngineDeadError
from tests.engine.test_async_engine import Gate, assert_idle, settle
from tests.entrypoints.helpers import CHAT, COMPLETIONS, HELLO, PATIENCE, events_of, eventually
from tests.entrypoints.test_server import connect, get, in_background, post, read

SHORT = {"temperature": 0, "ignore_eos": True, "max_tokens": 16}
LONG = {"temperature": 0, "ignore_eos": True}
HASTE = 0.4  # seconds that a client has in the tests about slow ones


@contextlib.contextmanager
def running(server: Server) -> Iterator[Server]:
    """A server that leaves no thread behind."""
    before = set(threading.enumerate())
    server.start()
    try:
        yield server
    finally:
        if server._service is not None:
            server.service.aborting.set()
        server.stop()
        eventually(lambda: set(threading.enumerate()) <= before)


@pytest.fixture
def server(engine: AsyncEngine) -> Iterator[Server]:
    with running(make_server(engine, ServerConfig(port=0, served_model_names=("tiny",)))) as server:
        yield server


@pytest.fixture
def hasty(engine: AsyncEngine) -> Iterator[Server]:
    config = ServerConfig(port=0, served_model_names=("tiny",), client_timeout_seconds=HASTE)
    with running(make_server(engine, config)) as server:
        yield server


@pytest.fixture(scope="module")
def wide_llm(tiny_model: Callable[[str], Path]) -> LLM:
    return LLM(tiny_model("llama"), dtype="float32", num_gpu_blocks_override=1024, max_num_seqs=64)


@pytest.fixture
def wide(wide_llm: LLM) -> Iterator[AsyncEngine]:
    """Takes 64 + 256 requests."""
    engine = AsyncEngine(wide_llm.llm_engine, max_queue=256)
    yield engine
    engine.shutdown()
    assert_idle(wide_llm)


def request_bytes(path: str, **body: Any) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def dial(server: Server, small_window: bool = False) -> socket.socket:
    client = socket.socket()
    if small_window:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(PATIENCE)
    client.connect(("127.0.0.1", server.port))
    return client


def is_closed(client: socket.socket) -> bool:
    """By the other side."""
    client.settimeout(0.0)
    try:
        return client.recv(1) == b""
    except (BlockingIOError, TimeoutError):
        return False
    except OSError:
        return True


# ------------------------------------------------------------------ before the model is there
def test_a_server_without_a_model_lives_and_asks_for_patience(engine: AsyncEngine):
    config = ServerConfig(port=0)
    with running(Server(config)) as server:
        assert (get(server, "/live").status, get(server, "/live/").status) == (200, 200)
        for path in ("/health", "/ready", "/ping", "/version", "/v1/models", "/metrics", "/nothing", "/alive"):
            reply = get(server, path)
            assert (reply.status, reply.error["type"]) == (503, "service_unavailable"), path
            assert reply.headers["Retry-After"] == "5" and reply.headers["X-Request-Id"]
        assert post(server, CHAT, messages=HELLO).status == 503
        with contextlib.closing(connect(server)) as connection:  # goes on over the same connection
            connection.request("HEAD", "/ready")
            assert read(connection)[::2] == (503, "")
            server.serve_app(create_app(engine, config), 8)
            connection.request("GET", "/ready")
            assert read(connection).status == 200 and connection.sock is not None
        assert post(server, CHAT, messages=HELLO, max_tokens=1).status == 200


def test_the_port_is_bound_before_the_model_is_loaded(engine: AsyncEngine):
    """While load() runs, somebody is answered; afterwards the model is there."""
    seen = []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def load() -> AsyncEngine:
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as client:
            client.sendall(b"GET /ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            seen.append(client.makefile("rb").read().split(b"\r\n")[0])
        return engine

    def ready(server: Server) -> None:
        seen.append(get(server, "/ready").status)
        signal.raise_signal(signal.SIGTERM)

    assert serve(load, ServerConfig(port=port), ready) == 0
    assert seen == [b"HTTP/1.1 503 Service Unavailable", 200]


def test_the_thread_that_loads_has_ended_when_requests_come(engine: AsyncEngine):
    """OpenMP's helpers of a second thread would make every step a third longer."""
    loaders = []

    def load() -> AsyncEngine:
        loaders.append(threading.current_thread())
        return engine

    def ready(server: Server) -> None:
        assert loaders[0] is not threading.main_thread() and not loaders[0].is_alive()
        signal.raise_signal(signal.SIGTERM)

    assert serve(load, ServerConfig(port=0), ready) == 0 and len(loaders) == 1


def test_a_port_in_use_is_an_error_before_anything_is_loaded(server: Server):
    def load() -> AsyncEngine:
        raise AssertionError("loaded for nothing")

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{server.port}"):
        serve(load, ServerConfig(port=server.port), lambda _: None)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_loading_ends_at_once_with_0(number: int):
    before, threads = signal.getsignal(number), set(threading.enumerate())
    with pytest.raises(SystemExit) as caught:
        serve(lambda: signal.raise_signal(number), ServerConfig(port=0), lambda _: None)  # type: ignore[arg-type,return-value]
    assert caught.value.code == 0 and signal.getsignal(number) is before
    eventually(lambda: set(threading.enumerate()) <= threads)


def test_a_model_that_cannot_be_loaded_closes_the_port_and_says_why():
    threads = set(threading.enumerate())

    def load() -> AsyncEngine:
        raise ConfigError("no such model", parameter="model")

    with pytest.raises(ConfigError, match="no such model"):
        serve(load, ServerConfig(port=0), lambda _: None)
    eventually(lambda: set(threading.enumerate()) <= threads)


# ------------------------------------------------------------------ slow clients
class Faucet:
    """An application that pours until somebody closes it."""

    def __init__(self, engine: AsyncEngine, config: ServerConfig):
        self.app = create_app(engine, config)
        self.num_open = 0
        self.app.add_url_rule("/endless", "version-endless", lambda: Response(self._pour(None)))
        self.app.add_url_rule("/large", "version-large", lambda: Response(b"x" * 8_000_000))
        self.app.add_url_rule("/some", "version-some", lambda: Response(self._pour(200)))

    def _pour(self, count: int | None) -> Iterator[bytes]:
        self.num_open += 1
        try:
            while count is None or count > 0:
                yield b"x" * 10_000
                count = None if count is None else count - 1
        finally:
            self.num_open -= 1


@pytest.fixture
def faucet(engine: AsyncEngine) -> Iterator[tuple[Faucet, Server]]:
    config = ServerConfig(port=0, client_timeout_seconds=HASTE)
    faucet, server = Faucet(engine, config), Server(config)
    server.serve_app(faucet.app, 2)
    with running(server):
        yield faucet, server


def test_a_reader_that_does_not_read_gives_its_thread_back(faucet: tuple[Faucet, Server]):
    """More of them than there are threads, one after the other: each held its thread for ever."""
    pouring, server = faucet
    clients = []
    for _ in range(4):
        client = dial(server, small_window=True)
        client.sendall(b"GET /endless HTTP/1.1\r\nHost: x\r\n\r\n")
        clients.append(client)
    assert get(server, "/version").status == 200  # waits for a thread
    eventually(lambda: server.service.num_in_flight == 0 and not server._channels())
    assert pouring.num_open == 0
    for client in clients:
        client.close()


def test_an_answer_that_nobody_fetches_is_dropped(faucet: tuple[Faucet, Server]):
    """Its thread has ended long before; its megabytes stayed, and its connection."""
    _, server = faucet
    client = dial(server, small_window=True)
    client.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
    eventually(lambda: any(channel.total_outbufs_len for channel in server._channels()))
    eventually(lambda: not server._channels())
    client.close()


@pytest.mark.parametrize("path", ["some", "large"])
def test_a_slow_but_steady_reader_gets_everything(faucet: tuple[Faucet, Server], path: str):
    _, server = faucet
    client = dial(server, small_window=True)
    client.sendall(f"GET /{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    started, size, pause = time.monotonic(), 0, threading.Event()
    while piece := client.recv(400_000 if time.monotonic() - started > 3 * HASTE else 20_000):
        size += len(piece)
        if time.monotonic() - started < 3 * HASTE:  # several times what a client has, and never a pause of it
            pause.wait(HASTE / 80)
    assert size > {"some": 2_000_000, "large": 8_000_000}[path]  # and headers
    client.close()


def test_a_stream_that_nobody_reads_is_aborted_and_its_blocks_are_free(
    engine: AsyncEngine, llm: LLM, gate: Gate, monkeypatch: pytest.MonkeyPatch
):
    """Small buffers: the tiny model has not much to say. The engine goes on only while the test lets it."""
    monkeypatch.setattr("minivllm.entrypoints.server.SEND_BUFFER_BYTES", 4096)
    monkeypatch.setattr("minivllm.entrypoints.server.OUT_BUFFER_BYTES", 4096)
    num_aborted = engine.engine.stats.finished["abort"]
    with running(make_server(engine, ServerConfig(port=0, client_timeout_seconds=HASTE))) as server:
        client = dial(server, small_window=True)
        client.sendall(request_bytes(COMPLETIONS, prompt=["the value is"] * 2, stream=True, logprobs=20, **LONG))
        gate.wait()
        (channel,) = server._channels()
        pause, num_steps = threading.Event(), 0
        while channel.total_outbufs_len <= 4096:  # until the next write must wait
            gate.steps(1)
            num_steps += 1
            pause.wait(0.01)
        assert num_steps < 100  # the model has more to say
        gate.steps(1)
        eventually(lambda: server.service.num_in_flight == 0)
        gate.open()
        settle(engine)
        assert engine.num_unfinished_requests == 0 and engine.engine.stats.finished["abort"] == num_aborted + 2
        pool = llm.llm_engine.scheduler.kv_cache.pool
        assert pool.num_free_blocks == pool.num_blocks - 1
        client.close()


@pytest.mark.parametrize(
    "beginning",
    [
        b"GET /heal",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX: ",
        f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 99999\r\n\r\n{{".encode(),
    ],
    ids=["request line", "header", "body"],
)
def test_a_request_that_does_not_arrive_is_given_up(hasty: Server, beginning: bytes):
    """A byte now and then kept a connection for ever."""
    clients = [dial(hasty) for _ in range(100)]
    for client in clients:
        client.sendall(beginning)
    deadline, pause = time.monotonic() + PATIENCE, threading.Event()
    while not all(is_closed(client) for client in clients):
        assert time.monotonic() < deadline, "a connection stayed"
        for client in clients:
            with contextlib.suppress(OSError):
                client.send(b"x")
        started = time.monotonic()
        assert get(hasty, "/health").status == 200
        assert time.monotonic() - started < 2.0
        pause.wait(HASTE / 8)
    for client in clients:
        client.close()


def test_a_request_that_waits_for_us_is_not_given_up(hasty: Server, gate: Gate):
    """Pipelined behind a long one: that it takes its time is our doing."""
    client = dial(hasty)
    later = b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    client.sendall(request_bytes(CHAT, messages=HELLO, **SHORT) + later[:20])
    gate.wait()
    threading.Event().wait(2 * HASTE + 1.0)
    gate.open()
    first = b""
    while b'"usage"' not in first:
        piece = client.recv(65536)
        assert piece, "the connection was closed"
        first += piece
    threading.Event().wait(HASTE / 2)  # the server looks at it now, and it still has time
    client.sendall(later[20:])
    rest = client.makefile("rb").read()
    assert rest.count(b"HTTP/1.1 200 OK") == 1 and b'"version"' in rest
    client.close()


# ------------------------------------------------------------------ many at once
def read_all(clients: list[socket.socket]) -> list[bytes]:
    """What each of them is sent, until the server closes it."""
    texts = [bytearray() for _ in clients]
    with selectors.DefaultSelector() as selector:
        for number, client in enumerate(clients):
            client.setblocking(False)
            selector.register(client, selectors.EVENT_READ, number)
        deadline = time.monotonic() + PATIENCE
        while selector.get_map():
            assert time.monotonic() < deadline, f"{len(selector.get_map())} streams have not ended"
            for key, _ in selector.select(1.0):
                piece = key.fileobj.recv(65536)  # type: ignore[union-attr]
                texts[key.data] += piece
                if not piece:
                    selector.unregister(key.fileobj)
                    clients[key.data].close()
    return [bytes(text) for text in texts]


def events_in(raw: bytes) -> list[Any]:
    """Of a chunked answer."""
    head, _, rest = raw.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), head
    body = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return events_of(body.decode())


def test_256_streams_at_once_all_end(wide: AsyncEngine):
    with running(make_server(wide, ServerConfig(port=0))) as server:
        clients = [dial(server) for _ in range(256)]
        for number, client in enumerate(clients):
            content = f"the number is {number}"
            client.sendall(request_bytes(CHAT, messages=[{"role": "user", "content": content}], stream=True, **SHORT))
        answers = [events_in(raw) for raw in read_all(clients)]
        assert len({answer[0]["id"] for answer in answers}) == 256
        for answer in answers:
            assert (answer[-2]["choices"][0]["finish_reason"], answer[-1]) == ("length", "[DONE]")
        eventually(lambda: server.service.num_in_flight == 0)


def settle_all(server: Server, engine: AsyncEngine) -> None:
    """Every connection is gone (what a client sent before it cut may still come), and whatever it asked for."""
    eventually(lambda: not server._channels() and server.service.num_in_flight == 0)
    eventually(lambda: engine.num_unfinished_requests == 0)
    settle(engine)


def cut(client: socket.socket, rng: random.Random) -> None:
    """Close: politely, or with a reset."""
    if rng.random() < 0.5:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def test_200_cuts_in_the_middle_of_streams_leave_nothing(server: Server, engine: AsyncEngine, llm: LLM):
    expected = post(server, CHAT, messages=HELLO, **SHORT).body["choices"][0]["message"]
    rng, threads = random.Random(1), threading.active_count()
    for _ in range(200):
        client = dial(server)
        client.sendall(request_bytes(CHAT, messages=HELLO, stream=True, **LONG))
        stream = client.makefile("rb")
        for _ in range(rng.randint(1, 20)):
            stream.readline()
        stream.close()
        cut(client, rng)
        if engine.num_unfinished_requests >= engine.max_requests - 1:
            eventually(lambda: engine.num_unfinished_requests < engine.max_requests - 1)
    settle_all(server, engine)
    pool = llm.llm_engine.scheduler.kv_cache.pool
    assert pool.num_free_blocks == pool.num_blocks - 1 and threading.active_count() == threads
    assert post(server, CHAT, messages=HELLO, **SHORT).body["choices"][0]["message"] == expected


@pytest.mark.parametrize("where", ["queued", "prefill", "whole"])
def test_cuts_anywhere_else_leave_nothing(server: Server, engine: AsyncEngine, llm: LLM, where: str):
    """Queued: both places are taken. Prefill: as soon as it was sent. Whole: nobody has to write to notice."""
    rng, pause = random.Random(2), threading.Event()
    holders = [engine.submit("the") for _ in range(2)] if where == "queued" else []
    for _ in range(60):
        client = dial(server)
        client.sendall(request_bytes(CHAT, messages=HELLO, stream=where == "prefill", **LONG))
        if where != "prefill":
            pause.wait(rng.random() * 0.02)
        cut(client, rng)
        eventually(lambda: engine.num_unfinished_requests < engine.max_requests - 1)
    for holder in holders:
        holder.close()
    settle_all(server, engine)
    # Of connections that were cut at once some are read only now, and take their places for a moment.
    eventually(lambda: post(server, CHAT, messages=HELLO, max_tokens=1).status == 200)
    pool = llm.llm_engine.scheduler.kv_cache.pool
    eventually(lambda: pool.num_free_blocks == pool.num_blocks - 1)


# ------------------------------------------------------------------ the end
def open_streams(server: Server, count: int, **fields: Any) -> list[socket.socket]:
    """So many streams whose first event has come."""
    clients = [dial(server) for _ in range(count)]
    for client in clients:
        client.sendall(request_bytes(CHAT, messages=HELLO, stream=True, **fields))
    for client in clients:
        client.recv(15, socket.MSG_PEEK | socket.MSG_WAITALL)
    return clients


def test_a_signal_lets_ten_streams_end(wide: AsyncEngine):
    answers: list[bytes] = []
    readers = []

    def ready(server: Server) -> None:
        clients = open_streams(server, 10, **LONG)
        readers.append(in_background(lambda: answers.extend(read_all(clients))))
        signal.raise_signal(signal.SIGTERM)

    assert serve(lambda: wide, ServerConfig(port=0), ready) == 0
    readers[0].join(PATIENCE)
    ends = [events_in(raw)[-2:] for raw in answers]
    assert len(ends) == 10
    for last, done in ends:
        assert (last["choices"][0]["finish_reason"], done) == ("length", "[DONE]")


def test_a_second_signal_ends_them_now(wide: AsyncEngine, wide_llm: LLM, monkeypatch: pytest.MonkeyPatch):
    gate = Gate(wide_llm, monkeypatch)  # the model would take for ever
    answers: list[bytes] = []
    readers = []

    def read_then_open(clients: list[socket.socket]) -> None:
        answers.extend(read_all(clients))
        gate.open()

    def ready(server: Server) -> None:
        clients = open_streams(server, 4, **LONG)
        gate.wait()
        readers.append(in_background(lambda: read_then_open(clients)))
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    assert serve(lambda: wide, ServerConfig(port=0, shutdown_timeout_seconds=10 * PATIENCE), ready) == 0
    readers[0].join(PATIENCE)
    ends = [events_in(raw)[-2:] for raw in answers]
    assert len(ends) == 4
    for last, done in ends:
        assert (last["error"]["type"], done) == ("service_unavailable", "[DONE]")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_streams_of_an_engine_that_ends_hear_why(tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch):
    """A rank that is gone is seen by the server before the step that waits for it fails."""
    llm = LLM(tiny_model("llama"), dtype="float32", num_gpu_blocks_override=64)
    gate = Gate(llm, monkeypatch)
    answers: list[bytes] = []
    threads = []

    def fail() -> None:
        raise EngineDeadError("rank 1 of this model has ended")

    def end_in_a_moment() -> None:
        time.sleep(0.3)
        monkeypatch.setattr(llm.llm_engine, "step", fail)
        gate.open()

    def ready(server: Server) -> None:
        clients = open_streams(server, 2, **LONG)
        gate.wait()
        threads.append(in_background(lambda: answers.extend(read_all(clients))))
        monkeypatch.setattr(type(llm.llm_engine), "is_alive", property(lambda _: False))
        threads.append(in_background(end_in_a_moment))

    assert serve(lambda: AsyncEngine(llm.llm_engine), ServerConfig(port=0), ready) == 1
    for thread in threads:
        thread.join(PATIENCE)
    errors = [events_in(raw)[-2]["error"]["message"] for raw in answers]
    assert len(errors) == 2 and all("rank 1 of this model has ended" in error for error in errors)
