"""`minivllm serve --tensor-parallel-size 2` as processes: one of them is killed in the middle of an answer."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.entrypoints.helpers import CHAT, HELLO, PATIENCE, events_of
from tests.entrypoints.test_serve_command import process

SECONDS_TO_END = 5.0


def children_of(parent: int) -> list[int]:
    """Ids of the processes that a process has started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            state, *numbers = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(numbers[0]) == parent and state != "Z":
                found.append(int(folder.name))
    return found


@contextlib.contextmanager
def served(model: Path) -> Iterator[tuple[subprocess.Popen[str], int, http.client.HTTPResponse]]:
    """A server on two ranks, the other rank's process id, and an answer that has begun."""
    with process(str(model), "--dtype", "float32", "--tensor-parallel-size", "2", OMP_NUM_THREADS="1") as server:
        ready = server.stdout.readline()
        port = re.search(r"http://127\.0\.0\.1:(\d+)/", ready)
        assert port, ready + server.stderr.read()
        (rank,) = children_of(server.pid)
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", int(port[1]), timeout=PATIENCE)) as client:
            body = {"messages": HELLO, "stream": True, "ignore_eos": True, "temperature": 0}
            client.request("POST", CHAT, json.dumps(body), {"Content-Type": "application/json"})
            yield server, rank, client.getresponse()


def test_a_killed_rank_ends_every_stream_with_an_error_and_the_server(tiny_model: Callable[[str], Path]):
    with served(tiny_model("llama")) as (server, rank, response):
        first = response.readline()
        os.kill(rank, signal.SIGSTOP)  # now nothing can end by itself
        time.sleep(0.1)
        assert server.poll() is None
        killed = time.monotonic()
        os.kill(rank, signal.SIGKILL)
        events = events_of((first + response.read()).decode())
        (error,) = [event["error"] for event in events if isinstance(event, dict) and "error" in event]
        assert "rank 1 of this model has ended" in error["message"]
        choices = [choice for event in events if isinstance(event, dict) for choice in event.get("choices", ())]
        assert choices and all(choice["finish_reason"] is None for choice in choices)
        assert server.wait(SECONDS_TO_END) == 1
        assert time.monotonic() - killed < SECONDS_TO_END


def test_a_signal_lets_the_answer_end_and_the_other_rank_with_it(tiny_model: Callable[[str], Path]):
    with served(tiny_model("llama")) as (server, rank, response):
        first = response.readline()
        server.send_signal(signal.SIGTERM)
        events = events_of((first + response.read()).decode())
        assert events[-2]["choices"][0]["finish_reason"] == "length" and events[-1] == "[DONE]"
        assert server.wait(PATIENCE) == 0
        assert rank not in children_of(1) and not Path(f"/proc/{rank}").exists()
