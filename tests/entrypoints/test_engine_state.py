"""/v1/engine/state and /v1/engine/events: true, shared, bounded, and in nobody's way."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from minivllm import LLM, AsyncEngine, SamplingParams
from minivllm.engine.throughput import Throughput
from minivllm.entrypoints import connection, engine_state, state_feed
from minivllm.entrypoints.server import Server, make_server
from minivllm.entrypoints.service import ServerConfig
from minivllm.entrypoints.state_feed import Frame, StateFeed
from tests.engine.test_async_engine import Gate, settle
from tests.entrypoints.helpers import CHAT, HELLO, PATIENCE, Web, eventually

STATE, EVENTS = "/v1/engine/state", "/v1/engine/events"
LONG = {"temperature": 0, "ignore_eos": True}
LONGEST = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
KEY = {"Authorization": "Bearer secret"}
FAST = {"keep_alive_seconds": 0.05, "state_interval_seconds": 0.01, "poll_seconds": 0.01}


class Events:
    """A stream of events, read piece by piece as the application writes it."""

    def __init__(self, web: Web, **options: Any):
        self.response = web.client.get(EVENTS, buffered=False, **options)
        self.pieces: Iterator[bytes] = iter(self.response.response)

    def next(self, name: str) -> Any:
        """The data of the next event with this name; keep-alives are passed over."""
        while True:
            piece = next(self.pieces).decode()
            if not piece.startswith(":"):
                break
        first, second, *rest = piece.split("\n")
        assert first == f"event: {name}" and second.startswith("data: ") and rest == ["", ""], piece
        return json.loads(second.removeprefix("data: "))

    def until(self, condition: Any) -> Any:
        deadline = time.monotonic() + PATIENCE
        while not condition(state := self.next("state")):
            assert time.monotonic() < deadline, "no such state came"
        return state

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *_: object) -> None:
        self.response.close()


@pytest.fixture
def web(engine: AsyncEngine) -> Web:
    return Web(engine, ServerConfig(**FAST))


@pytest.fixture
def server(engine: AsyncEngine) -> Iterator[Server]:
    server = make_server(engine, ServerConfig(port=0, max_watchers=2, **FAST))
    server.start()
    yield server
    server.service.draining.set()
    server.service.aborting.set()
    server.stop()


def connect(server: Server) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)


# ------------------------------------------------------------------ the state
def test_the_state_is_the_engines(web: Web, llm: LLM):
    reply = web.get(STATE)
    assert reply.status == 200 and reply.headers["Content-Type"] == "application/json"
    assert reply.headers["Cache-Control"] == "no-store"
    state = reply.body
    assert state["version"] == 1 and state["requests"] == [] and isinstance(state["revision"], int)
    assert state["config"]["num_blocks"] == len(state["blocks"]["ref_counts"]) == 64


def test_the_state_is_true_when_it_is_asked_for(web: Web, engine: AsyncEngine, llm: LLM, gate: Gate):
    stream = engine.submit("the value is", LONGEST)
    gate.wait()
    replies: list[Any] = []
    for num_steps in (1, 2):
        asking = threading.Thread(target=lambda: replies.append(web.get(STATE).body))
        asking.start()
        eventually(lambda: not engine._inbox.empty())  # the engine thread has been asked, and stands before a step
        gate.steps(1)  # the answer is given between this step and the next
        asking.join(PATIENCE)
        (request,) = replies[-1]["requests"]
        assert (request["status"], request["num_output_tokens"]) == ("running", num_steps)
        assert replies[-1]["step"] == llm.llm_engine.last_step.step
    gate.open()
    stream.close()


def test_an_unchanged_engine_is_not_asked_twice(web: Web, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch):
    taken = []
    take = state_feed.take_snapshot
    monkeypatch.setattr(state_feed, "take_snapshot", lambda engine: taken.append(1) or take(engine))
    web.chat(max_tokens=2, **LONG)
    settle(engine)
    eventually(lambda: not any(web.get(STATE).body["tokens_per_second"].values()))
    count = len(taken)
    first, second = web.get(STATE), web.get(STATE)
    assert first.text == second.text and len(taken) == count
    web.chat(max_tokens=2, **LONG)
    assert web.get(STATE).text != first.text and len(taken) > count


def test_nobody_watches_nothing_is_taken(web: Web, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(state_feed, "take_snapshot", lambda _: pytest.fail("nobody asked"))
    assert web.chat(max_tokens=4, **LONG).status == 200
    settle(engine)


def test_state_and_events_need_a_key(engine: AsyncEngine):
    web = Web(engine, ServerConfig(api_keys=("secret",), **FAST))
    for path in (STATE, EVENTS):
        reply = web.get(path)
        assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
    assert web.get(STATE, headers=KEY).status == 200
    with Events(web, headers=KEY) as events:
        assert events.response.status_code == 200
        assert events.next("state")["version"] == 1


@pytest.mark.parametrize("path", [STATE, EVENTS])
def test_a_dead_engine_is_said(web: Web, engine: AsyncEngine, path: str):
    engine.shutdown()
    reply = web.get(path)
    assert reply.status == 503 and "engine has ended" in reply.error["message"]


def test_a_snapshot_that_fails_is_an_error_and_the_engine_goes_on(
    web: Web, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    with monkeypatch.context() as patch:
        patch.setattr(state_feed, "take_snapshot", lambda _: {}["of the inside"])
        reply = web.get(STATE)
    settle(engine)
    assert reply.status == 500 and "inside" not in reply.text and "of the inside" in caplog.text
    assert web.get(STATE).status == 200 and web.chat(max_tokens=2, **LONG).status == 200


# ------------------------------------------------------------------ the events
def test_events_follow_a_request_from_arrival_to_end(web: Web, engine: AsyncEngine):
    with Events(web) as events:
        assert events.response.headers["Content-Type"].startswith("text/event-stream")
        assert next(events.pieces) == b": keep-alive\n\n"  # before anything is known
        assert events.next("state")["requests"] == []
        stream = engine.submit("the value is", LONGEST)
        counts = []
        state = events.until(lambda state: state["requests"])
        while state["requests"]:
            counts.append(state["requests"][0]["num_output_tokens"])
            state = events.next("state")
        assert len(counts) > 1 and counts == sorted(counts) and counts[-1] > counts[0]
        assert state["blocks"]["num_held"] == 0
        assert list(stream)[-1].finished


def test_tokens_per_second_fall_to_zero_and_then_it_is_quiet(
    web: Web, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
):
    now = [1000.0]
    monkeypatch.setattr(engine.engine, "throughput", Throughput(clock=lambda: now[0]))
    with Events(web) as events:
        web.chat(max_tokens=4, **LONG)
        events.until(lambda state: state["tokens_per_second"]["output"] == 2.0)
        now[0] += 10.0
        events.until(lambda state: not any(state["tokens_per_second"].values()))
        assert [next(events.pieces) for _ in range(3)] == [b": keep-alive\n\n"] * 3


def test_states_come_no_faster_than_the_interval(engine: AsyncEngine):
    """However many steps there are."""
    web = Web(engine, ServerConfig(state_interval_seconds=0.1))
    with Events(web) as events:
        stream = engine.submit("the", LONGEST)
        state = events.until(lambda state: state["requests"])
        started, count = time.monotonic(), 0
        while state["requests"]:
            state, count = events.next("state"), count + 1
        assert 0 < count <= (time.monotonic() - started) / 0.1 + 1
        assert engine.engine.throughput.num_output_tokens >= 100  # steps
        stream.close()


def test_the_interval_grows_with_what_a_snapshot_costs(engine: AsyncEngine):
    feed = StateFeed(engine, max_watchers=1, min_interval_seconds=0.1)
    assert feed.interval_seconds == 0.1
    idle = {"tokens_per_second": {"computed": 0.0, "output": 0.0}}
    feed._frame = Frame(0, idle, cost_seconds=0.02)
    assert feed.interval_seconds == 0.02 / state_feed.MAX_SHARE


def test_all_watchers_share_one_snapshot(web: Web, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch):
    taken = []
    take = state_feed.take_snapshot
    monkeypatch.setattr(state_feed, "take_snapshot", lambda engine: taken.append(1) or take(engine))
    with contextlib.ExitStack() as stack:
        watchers = [stack.enter_context(Events(web)) for _ in range(8)]
        states = [watcher.next("state") for watcher in watchers]
    assert states == states[:1] * 8 and len(taken) == 1


def test_the_engine_thread_is_asked_once_however_many_wait(engine: AsyncEngine, gate: Gate):
    feed = StateFeed(engine, max_watchers=1, min_interval_seconds=0.0)
    stream = engine.submit("the", LONGEST)
    gate.wait()
    for _ in range(5):
        feed.newest()
    assert engine._inbox.qsize() == 1
    gate.open()
    stream.close()


def test_one_watcher_too_many_is_refused_by_name(web: Web):
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(Events(web))
        reply = web.get(EVENTS)
        assert reply.status == 429 and "at most 8 may be (max_watchers)" in reply.error["message"]
        assert reply.headers["Retry-After"]
        assert web.get(STATE).status == 200
    with contextlib.closing(web.client.head(EVENTS)) as response:
        assert response.status_code == 200  # takes a place, and leaves it
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            assert stack.enter_context(Events(web)).response.status_code == 200


def test_a_draining_server_says_the_end(web: Web):
    with Events(web) as events:
        events.next("state")
        web.service.draining.set()
        assert events.next("end") == {"reason": "The server is shutting down."}
        assert list(events.pieces) == []


def test_an_engine_that_dies_ends_the_stream_with_an_error(web: Web, engine: AsyncEngine):
    with Events(web) as events:
        events.next("state")
        engine.shutdown()
        assert events.next("error")["error"]["type"] == "service_unavailable"
        assert list(events.pieces) == []


def test_a_watcher_that_reads_slowly_misses_states(engine: AsyncEngine):
    """Nothing is written before the last piece has left; a watcher that never reads is let go."""
    web = Web(engine, ServerConfig(client_timeout_seconds=1.0, **FAST))
    unsent = [0]
    feed = StateFeed(engine, 1, 0.01)
    pieces = engine_state.events(web.service, feed, bool, lambda: unsent[0])
    assert next(pieces).startswith(b":") and next(pieces).startswith(b"event: state")
    unsent[0] = 1
    reader = threading.Timer(0.2, lambda: unsent.__setitem__(0, 0))
    web.chat(max_tokens=8, **LONG)
    reader.start()
    started = time.monotonic()
    piece = next(pieces)
    assert time.monotonic() - started >= 0.15
    assert json.loads(piece.split(b"data: ")[1])["step"] == engine.engine.last_step.step  # the newest, no others
    unsent[0] = 1
    assert list(pieces) == []


# ------------------------------------------------------------------ over sockets
def test_a_watcher_that_leaves_makes_room(server: Server):
    for _ in range(5):
        with contextlib.closing(connect(server)) as one, contextlib.closing(connect(server)) as two:
            for client in (one, two):
                client.request("GET", EVENTS)
                assert client.getresponse().status == 200
        eventually(lambda: server.service.num_in_flight == 0)


def test_a_watcher_that_never_reads_holds_up_nothing(
    server: Server, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Not other clients, not other watchers, not the end."""
    take = state_feed.take_snapshot
    monkeypatch.setattr(state_feed, "take_snapshot", lambda engine: {**take(engine), "more": "x" * 3_000_000})
    monkeypatch.setattr(connection, "UNREAD_SECONDS", 0.3)
    with socket.socket() as deaf, contextlib.closing(connect(server)) as watcher:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", server.port))
        deaf.sendall(f"GET {EVENTS} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        eventually(lambda: any(getattr(s, "total_outbufs_len", 0) > 2**17 for s in server._sockets.values()))
        watcher.request("GET", EVENTS)
        response = watcher.getresponse()
        lines: list[bytes] = []
        reading = threading.Thread(target=lambda: lines.extend(line[:20] for line in response))
        reading.start()
        for _ in range(3):
            with contextlib.closing(connect(server)) as client:
                body = {"messages": HELLO, "max_tokens": 4, **LONG}
                client.request("POST", CHAT, json.dumps(body), {"Content-Type": "application/json"})
                assert client.getresponse().status == 200
            known = len(lines)
            eventually(lambda known=known: len(lines) > known)
        started = time.monotonic()
        server.drain(PATIENCE)
        assert time.monotonic() - started < PATIENCE / 2  # it did not wait for the deaf one
        reading.join(PATIENCE)
        assert not reading.is_alive() and lines[-1] == b"\n"  # its stream is whole to the end
        server.stop()
    assert "still running" not in caplog.text  # what waitress says of threads that it had to leave behind
    monkeypatch.setattr(server, "stop", lambda: None)
