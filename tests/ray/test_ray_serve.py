"""deploy/ray_serve.py as a process: two replicas of the default model behind one endpoint, one of them killed."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import pytest

from tests.entrypoints.helpers import CHAT, COMPLETIONS, HELLO, Reply, events_of
from tests.ray.processes import named

ROOT = Path(__file__).parents[2]
PATIENCE = 120.0  # for a replica to load its model, while others use the cores
REPLICA = "ray::ServeReplica"
ENGINE = {"num_gpu_blocks_override": 512, "max_model_len": 512}
JSON = {"Content-Type": "application/json"}


class Server(NamedTuple):
    process: subprocess.Popen[str]
    port: int

    def open(self, method: str, path: str, body: Any = None) -> tuple[http.client.HTTPConnection, Any]:
        """A connection, and an answer that has begun."""
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        client.request(method, path, None if body is None else json.dumps(body), JSON)
        return client, client.getresponse()

    def call(self, method: str, path: str, body: Any = None) -> Reply:
        client, response = self.open(method, path, body)
        with contextlib.closing(client):
            return Reply(response.status, response.headers, response.read().decode())

    def metric(self, name: str, **labels: str) -> dict[str, float]:
        """replica -> the sum of its samples with these labels."""
        found: Counter[str] = Counter()
        for line in self.call("GET", "/metrics").text.splitlines():
            if line.startswith(f"{name}{{") and all(f'{key}="{value}"' in line for key, value in labels.items()):
                found[re.findall('replica="([^"]+)"', line)[0]] += float(line.rpartition(" ")[2])
        return dict(found)


@contextlib.contextmanager
def served(*arguments: str) -> Iterator[Server]:
    """The endpoint; killed if the test leaves it running."""
    command = [sys.executable, "deploy/ray_serve.py", *arguments, "--port", "0"]
    with tempfile.TemporaryFile("w+") as output:  # not a pipe: Ray goes on talking
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, text=True)
        try:
            yield Server(process, wait_for_port(process, output))
        finally:
            process.kill()
            process.wait()


def wait_for_port(process: subprocess.Popen[str], output: IO[str]) -> int:
    deadline = time.monotonic() + PATIENCE
    while True:
        said = os.pread(output.fileno(), 2**20, 0).decode()  # the place where the server writes stays its own
        if found := re.search(r"^minivllm ready: http://127\.0\.0\.1:(\d+)/v1$", said, re.MULTILINE):
            return int(found[1])
        assert process.poll() is None and time.monotonic() < deadline, "it has not started, and says why above"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with served("--num-replicas", "2", "--engine", json.dumps(ENGINE)) as started:
        yield started


def eventually(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def chat(num_tokens: int, **more: Any) -> dict[str, Any]:
    return {"messages": HELLO, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, **more}


def test_a_stream_comes_token_by_token_and_says_what_the_whole_answer_says(server: Server):
    whole = server.call("POST", CHAT, chat(24))
    assert whole.status == 200 and whole.body["usage"]["completion_tokens"] == 24
    client, response = server.open("POST", CHAT, chat(24, stream=True))
    assert response.headers["Content-Type"].startswith("text/event-stream")
    arrivals, text = [], b""
    while line := response.readline():
        text += line
        arrivals += [time.monotonic()] if b'"content":' in line else []
    client.close()
    events = events_of(text.decode())
    pieces = [event["choices"][0]["delta"].get("content") or "" for event in events[:-1]]
    assert "".join(pieces) == whole.body["choices"][0]["message"]["content"]
    assert events[-1] == "[DONE]" and len(arrivals) >= 20
    assert arrivals[-1] - arrivals[0] > 0.02  # not all of it at the end


def test_the_api_is_the_servers(server: Server):
    assert server.call("POST", COMPLETIONS, {"prompt": "Once", "max_tokens": 3}).body["usage"]["completion_tokens"] == 3
    assert server.call("GET", "/v1/models").body["data"][0]["max_model_len"] == 512
    assert [server.call("GET", path).status for path in ("/health", "/ready", "/live", "/version")] == [200] * 4
    assert server.call("GET", "/nothing").status == 404 and server.call("GET", "/nothing").error
    assert server.call("POST", CHAT, {"messages": []}).status == 400
    assert "must be" in server.call("POST", CHAT, chat(-1)).error["message"]
    large = server.call("POST", CHAT, {"messages": "x" * 2**21})
    assert large.status == 413 and large.error


def test_a_known_beginning_goes_where_it_is_known_and_the_rest_to_the_least_busy(server: Server):
    def served_by(prompts: list[list[int]]) -> dict[str, float]:
        before = server.metric("vllm:request_success_total")
        for prompt in prompts:
            assert server.call("POST", COMPLETIONS, {"prompt": prompt, "max_tokens": 1}).status == 200
        after = server.metric("vllm:request_success_total")
        return {name: after[name] - before.get(name, 0) for name in after}

    document = list(range(1000, 1100))
    assert sorted(served_by([[*document, number] for number in range(6)]).values()) == [0, 6]
    hits = server.metric("vllm:prefix_cache_hits_total")
    assert max(hits.values()) >= 5 * 96  # whole blocks of all but the first
    streams = [
        server.open(
            "POST", COMPLETIONS, {"prompt": [number] * 80, "max_tokens": 60, "stream": True, "ignore_eos": True}
        )
        for number in range(100, 106)
    ]
    try:
        eventually(lambda: sorted(server.metric("vllm:num_requests_running").values()) == [3, 3])
    finally:
        for client, response in streams:
            response.read()
            client.close()


def test_a_client_that_leaves_ends_its_answer(server: Server):
    def aborted() -> float:
        return sum(server.metric("vllm:request_success_total", finished_reason="abort").values())

    before = aborted()
    client, response = server.open("POST", CHAT, chat(400, stream=True))
    assert response.readline()
    response.close()
    client.close()
    eventually(lambda: aborted() == before + 1)
    assert set(server.metric("vllm:num_requests_running").values()) == {0}


def read_all(server: Server, num_streams: int, num_tokens: int) -> tuple[list[threading.Thread], list[bytearray]]:
    """Streams, read by threads; each text grows."""
    texts = [bytearray() for _ in range(num_streams)]

    def read(text: bytearray) -> None:
        client, response = server.open("POST", CHAT, chat(num_tokens, stream=True))
        with contextlib.closing(client):
            while line := response.readline():
                text += line

    threads = [threading.Thread(target=read, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    return threads, texts


def test_a_killed_replica_loses_its_own_streams_and_is_replaced(server: Server):
    threads, texts = read_all(server, 8, 200)
    eventually(lambda: all(text.count(b'"content":') > 3 for text in texts))
    running = server.metric("vllm:num_requests_running")
    assert sum(running.values()) == 8 and sorted(running.values()) == [4, 4]
    replicas = named(REPLICA, server.process.pid)
    assert len(replicas) == 2
    os.kill(replicas[0], signal.SIGKILL)
    for thread in threads:
        thread.join(PATIENCE)
    ends = []
    for text in texts:
        events = events_of(text.decode())
        assert events[-1] == "[DONE]"
        last = events[-2]
        ends.append(last["error"]["message"] if "error" in last else last["choices"][0]["finish_reason"])
    assert Counter(ends) == {"The replica that had this request has ended.": 4, "length": 4}
    assert server.call("POST", CHAT, chat(3)).status == 200  # nobody waits for the new one
    assert server.call("GET", "/health").status == 200
    eventually(lambda: len(server.metric("vllm:num_requests_running")) == 2)
    assert replicas[0] not in named(REPLICA, server.process.pid)


def test_a_signal_lets_the_answers_end_and_everything_with_them(server: Server):
    replicas = named(REPLICA, server.process.pid)
    threads, texts = read_all(server, 2, 40)
    eventually(lambda: all(b'"content":' in text for text in texts))
    server.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(PATIENCE)
    assert all(events_of(text.decode())[-2]["choices"][0]["finish_reason"] == "length" for text in texts)
    assert server.process.wait(PATIENCE) == 0
    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in replicas))


# ------------------------------------------------------------------ servers of their own, tiny models
def test_load_starts_another_replica(tiny_model: Callable[[str], Path]):
    engine = {"dtype": "float32", "num_gpu_blocks_override": 64, "impl": "reference"}
    scaling = ("--max-replicas", "2", "--target-ongoing-requests", "1", "--upscale-delay-seconds", "0.5")
    with served(str(tiny_model("llama")), "--engine", json.dumps(engine), *scaling) as server:
        assert len(server.metric("vllm:num_requests_running")) == 1
        stop = threading.Event()

        def ask() -> None:
            while not stop.is_set():
                assert server.call("POST", CHAT, chat(100)).status == 200

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            eventually(lambda: len(server.metric("vllm:num_requests_running")) == 2)
        finally:
            stop.set()
            for thread in threads:
                thread.join()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--engine", '{"max_model_len": 100000}'), "max_model_len"),
        (("--engine", "[1]"), "--engine must be a JSON object"),
        (("--port", "PORT"), "cannot listen on 127.0.0.1:"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_start_ends_with_the_reason(
    arguments: tuple[str, str], message: str, tiny_model: Callable[[str], Path]
):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        option, value = arguments
        value = value.replace("PORT", str(taken.getsockname()[1]))
        command = [
            sys.executable,
            "deploy/ray_serve.py",
            str(tiny_model("llama")),
            "--num-replicas",
            "1",
            "--port",
            "0",
        ]
        result = subprocess.run([*command, option, value], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode in (1, 2) and message in result.stderr.replace("\n", " ")
