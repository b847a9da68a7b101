"""deploy/nginx.conf under Debian's nginx, as a user without rights, in front of real servers.

Where a test must know when a server says what, the server is one that answers by script.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from minivllm.entrypoints.protocol import error_body
from minivllm.entrypoints.service import ServerConfig
from tests.deploy.instances import NOBODY, Instance, Reply, Stream, call, complete, eventually, nginx
from tests.scripted_server import ScriptedServer, events, scripted

MAX_BODY_BYTES = ServerConfig().max_body_bytes


def port_of(script: ScriptedServer) -> int:
    return int(script.url.removesuffix("/v1").rpartition(":")[2])


def owners_of(program: str) -> set[int]:
    return {
        status.stat().st_uid
        for status in Path("/proc").glob("[0-9]*/status")
        if status.read_text().startswith(f"Name:\t{program}\n")
    }


# ------------------------------------------------------------------ streams
def test_nginx_runs_without_rights(balanced: str):
    assert owners_of("nginx") & {0, NOBODY} == {NOBODY}


def read_whole(url: str, num_tokens: int) -> tuple[int, int]:
    """(reads, events) of a stream of so many tokens. Half a character is no event."""
    with contextlib.closing(Stream(url, num_tokens)) as stream:
        pieces = list(stream.pieces())
    assert pieces[-1].endswith(b"data: [DONE]\n\n")
    return len(pieces), b"".join(pieces).count(b'"text"')


def test_tokens_arrive_one_by_one(balanced: str):
    num_reads, num_events = read_whole(balanced, 200)
    assert num_events > 100 and num_reads > num_events / 2


def buffering(configuration: str) -> str:
    assert "proxy_buffering off;" in configuration
    return configuration.replace("proxy_buffering off;", "proxy_buffering on;")


@pytest.mark.parametrize("change", [str, buffering])
def test_an_event_arrives_while_the_next_one_is_not_written(change: Callable[[str], str], tmp_path: Path):
    with scripted(content="data: {}\n\n") as script, nginx(tmp_path / "nginx", [port_of(script)], change) as url:
        script.hold.clear()
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=2)
        connection.request("POST", "/v1/chat/completions", body=b"{}")
        if change is buffering:  # so the other case says something
            with pytest.raises(TimeoutError):
                connection.getresponse().read1()
        else:
            assert connection.getresponse().read1() == b"data: {}\n\n"
        connection.close()
        assert script.gone.wait(60)  # and nginx says that the client has left


def test_a_client_that_leaves_frees_its_engine(balanced: str, instances: list[Instance]):
    def aborted() -> float:
        return sum(one.metric("vllm:request_success_total", finished_reason="abort") for one in instances)

    before = aborted()
    streams = [Stream(balanced) for _ in range(3)]
    for stream in streams:
        stream.wait_for_text()
    assert [one.metric("vllm:num_requests_running") for one in instances] == [1, 1, 1]  # the freest was taken
    assert aborted() == before
    for stream in streams:
        stream.close()
    eventually(lambda: aborted() == before + 3)
    assert sum(one.metric("vllm:num_requests_running") for one in instances) == 0


# ------------------------------------------------------------------ one is gone
def read_to_the_end(stream: Stream) -> None:
    with contextlib.suppress(http.client.IncompleteRead, ConnectionError):
        for _ in stream.pieces():
            pass


def test_a_killed_instance_ends_its_own_streams_and_no_later_request(balanced: str, instances: list[Instance]):
    streams = [Stream(balanced) for _ in range(3)]
    for stream in streams:
        stream.wait_for_text()
    instances[1].kill()
    try:
        assert [complete(balanced).status for _ in range(12)] == [200] * 12
        running = [one.metric("vllm:num_requests_running") for one in (instances[0], instances[2])]
        assert running == [1, 1]
        with ThreadPoolExecutor(3) as pool:
            readers = [pool.submit(read_to_the_end, stream) for stream in streams]
            eventually(lambda: any(reader.done() for reader in readers))
            assert sorted(reader.done() for reader in readers) == [False, False, True]
            for stream in streams:
                stream.hang_up()
    finally:
        instances[1].start()
        for stream in streams:
            stream.close()
    # nginx tries it again after fail_timeout
    eventually(lambda: complete(balanced).status == 200 and instances[1].num_answered > 0)


def test_a_server_that_takes_nothing_is_passed_over(tmp_path: Path):
    """It loads its model, or is going down."""
    with scripted(503) as loading, scripted(content="the other") as other:
        with nginx(tmp_path / "nginx", [port_of(loading), port_of(other)]) as url:
            replies = [call(f"{url}/v1/completions", b"{}") for _ in range(4)]
        assert [(reply.status, reply.text) for reply in replies] == [(200, "the other")] * 4
        assert len(loading.asked) == 1  # and then not for fail_timeout


def test_a_request_whose_server_dies_is_answered_by_another(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as dying, scripted(content="the other") as other:

        def die() -> None:
            connection, _ = dying.accept()
            with connection:
                connection.recv(1 << 16)

        with ThreadPoolExecutor(1) as pool, nginx(tmp_path / "nginx", [dying.getsockname()[1], port_of(other)]) as url:
            death = pool.submit(die)
            replies = [call(f"{url}/v1/completions", b"{}") for _ in range(4)]
            death.result(60)
    assert [(reply.status, reply.text) for reply in replies] == [(200, "the other")] * 4


def test_a_full_queue_is_the_clients_to_hear_about(tmp_path: Path):
    with (
        scripted(429, "full") as full,
        scripted(content="free") as free,
        nginx(tmp_path / "nginx", [port_of(full), port_of(free)]) as url,
    ):
        texts = [call(f"{url}/v1/completions", b"{}").text for _ in range(6)]
    assert sorted(texts) == ["free"] * 3 + ["full"] * 3


def test_nobody_is_there(tmp_path: Path):
    with nginx(tmp_path / "nginx", [2, 2, 2]) as url:
        for _ in range(3):
            reply = complete(url)
            assert reply.status == 503 and reply.headers["Retry-After"] == "10"
            assert reply.error == error_of(503, reply)


# ------------------------------------------------------------------ bodies, addresses
def error_of(status: int, reply: Reply) -> Any:
    """What a server of ours would say, with this message."""
    return error_body(reply.error["message"], status)["error"]


def body_of(num_bytes: int) -> bytes:
    frame = len(json.dumps({"model": "tiny", "prompt": ""}))
    return json.dumps({"model": "tiny", "prompt": "a" * (num_bytes - frame)}).encode()


def test_the_longest_body_reaches_a_server(balanced: str):
    reply = call(f"{balanced}/v1/completions", body_of(MAX_BODY_BYTES))
    assert reply.status == 400 and reply.error["code"] == "context_length_exceeded"


def test_one_byte_more_is_refused_as_the_server_would(balanced: str):
    reply = call(f"{balanced}/v1/completions", body_of(MAX_BODY_BYTES + 1))
    assert reply.status == 413 and "1 MiB" in reply.error["message"]
    assert reply.error == error_of(413, reply)


def test_each_instance_has_its_own_metrics(balanced: str, instances: list[Instance]):
    before = [one.num_answered for one in instances]
    assert [complete(balanced).status for _ in range(6)] == [200] * 6
    assert sum(one.num_answered for one in instances) == sum(before) + 6
    reply = call(f"{balanced}/metrics")
    assert reply.status == 404 and "each server" in reply.error["message"]
    assert reply.error == error_of(404, reply)


def test_probes_and_errors_pass(balanced: str):
    for path in ("/health", "/ready", "/live", "/v1/models", "/"):
        assert call(balanced + path).status == 200, path
    reply = complete(balanced, model="nobody")
    assert reply.status == 404 and "nobody" in reply.error["message"]


def test_several_streams_at_once_are_whole(balanced: str):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: read_whole(balanced, 40), range(8)))
    assert min(num_events for _, num_events in found) > 10


def test_events_of_scripts_pass_unchanged(tmp_path: Path):
    text = events({"a": "é\u2028"}) * 200
    with scripted(content=text) as script, nginx(tmp_path / "nginx", [port_of(script)]) as url:
        assert call(f"{url}/v1/models").text == text
