"""The scripts of examples/ai-sdk/client against real refusals: 429, 503, servers that hang and servers that are killed.

Needs node and npm's registry: `tox -e examples`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import pytest

from tests.examples.running import Ran, install_examples, run, start
from tests.sdk.test_sdk import Server, server

KEY = "examples-key"
TINY = "tiny"
BALANCE_SECONDS = 40  # the guide's balancer looks at its instances every 30
KILL_AFTER_SECONDS = 8


@pytest.fixture(scope="module", autouse=True)
def packages() -> None:
    install_examples()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Runs one request, keeps none waiting: these two flags make `minivllm serve` answer 429."""
    log = tmp_path_factory.mktemp("small") / "server.log"
    with server(log, "--api-key", KEY, "--max-num-seqs", "1", "--max-queue", "0", "--max-model-len", "512") as one:
        yield one


def client(script: str, at: Server, **settings: str) -> Ran:
    ran = run(f"client/{script}.mjs", VLLM_BASE_URL=at.url, VLLM_API_KEY=KEY, **settings)
    assert ran.code == 0, ran.out + ran.err
    return ran


# ------------------------------------------------------------------ 429
def test_retries_wait_as_long_as_a_full_server_says(small: Server):
    ran = client("retries", small, ATTEMPTS="60")
    assert {answer["word"] for answer in ran.lines("answer")} == {"one", "two", "three", "four"}
    waits = ran.lines("wait")
    assert waits and all((wait["status"], wait["waitMs"]) == (429, 1000) for wait in waits)
    last: dict[str, dict[str, Any]] = {}
    for call in sorted(ran.calls, key=lambda call: call["startedMs"]):
        before = last.get(call["body"])
        assert before is None or (before["status"] == 429 and call["startedMs"] - before["endedMs"] >= 1000)
        last[call["body"]] = call


def test_a_limited_client_is_not_refused(small: Server):
    (line,) = client("rate-limiting", small).lines()
    assert (line["answered"], line["refused"]) == (6, 0)


def test_without_its_limit_it_is_refused(small: Server):
    (line,) = client("rate-limiting", small, AT_ONCE="6").lines()
    assert line["refused"] > 0
    assert line["answered"] + line["refused"] == 6


def test_requests_start_no_faster_than_the_rate(small: Server):
    ran = client("rate-limiting", small, PER_MINUTE="120")
    starts = sorted(call["startedMs"] for call in ran.calls)
    assert len(starts) == 6
    assert starts[-1] - starts[0] >= 5 * 500 - 50  # half a second each; timers may be early by a little


# ------------------------------------------------------------------ what needs no fault
def test_a_cache_asks_once(small: Server):
    (line,) = client("caching", small).lines()
    assert (line["calls"], line["requests"]) == (6, 3)
    assert line["first"] == line["shared"] == line["again"]
    assert line["other"] == line["otherAgain"]
    assert line["longer"]


def test_every_error_is_explained(small: Server):
    kinds = {line["case"]: line for line in client("error-handling", small).lines()}
    assert {case: (line["kind"], line.get("status"), line["again"]) for case, line in kinds.items()} == {
        "a wrong key": ("key", 401, False),
        "an unknown model": ("unknown", 404, False),
        "a bad value": ("refused", 400, False),
        "a prompt that is too long": ("refused", 400, False),
        "nobody there": ("unreachable", None, True),
        "nobody there, asked twice": ("unreachable", None, True),
        "a limit": ("timeout", None, True),
        "a change of mind": ("aborted", None, False),
        "a full server": ("full", 429, True),
    }
    assert kinds["nobody there, asked twice"]["attempts"] == 2


# ------------------------------------------------------------------ 503
@contextlib.contextmanager
def reading(url: str, model: str) -> Iterator[IO[bytes]]:
    """A long stream, which is being written."""
    body = {"model": model, "prompt": "One, two,", "max_tokens": 400, "ignore_eos": True, "stream": True}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    request = urllib.request.Request(f"{url}/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=300) as response:
        response.readline()
        yield response


def lines_of(process: subprocess.Popen[str]) -> Iterator[str]:
    assert process.stdout
    return iter(process.stdout.readline, "")


def test_retries_outlast_a_restart(tmp_path: Path):
    """The server drains: 503 with Retry-After. It ends: nobody there. It is started again: the answers."""
    settings = ("--api-key", KEY, "--max-model-len", "512")
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(server(tmp_path / "first.log", *settings))
        port = first.url.split(":")[2].removesuffix("/v1")
        with reading(first.url, first.model):
            os.kill(first.pid, signal.SIGTERM)
            environment = {"VLLM_BASE_URL": first.url, "VLLM_API_KEY": KEY, "ATTEMPTS": "60"}
            script = stack.enter_context(start("client/retries.mjs", tmp_path / "calls", **environment))
            stack.callback(script.kill)
            refused = json.loads(next(lines_of(script)).removeprefix("wait "))
        assert (refused["status"], refused["waitMs"]) == (503, 5000)
        ended_by = time.monotonic() + 60
        while is_there(first.url):
            assert time.monotonic() < ended_by, "the server does not end"
            time.sleep(0.1)
        stack.enter_context(server(tmp_path / "second.log", *settings, port=port))
        answers = [line for line in lines_of(script) if line.startswith("answer")]
        assert len(answers) == 4
        assert script.wait() == 0


def is_there(url: str) -> bool:
    try:
        urllib.request.urlopen(f"{url.removesuffix('/v1')}/live", timeout=10).close()
    except OSError:
        return False
    return True


# ------------------------------------------------------------------ a server that hangs, and one that is killed
@pytest.mark.parametrize(("fault", "kind"), [(signal.SIGSTOP, "timeout"), (signal.SIGKILL, "cut")])
def test_a_stream_of_a_lost_server_is_given_up(fault: signal.Signals, kind: str, tmp_path: Path):
    with server(tmp_path / "server.log", "--api-key", KEY, "--max-model-len", "512") as one:
        settings = {"VLLM_BASE_URL": one.url, "VLLM_API_KEY": KEY, "IDLE_MS": "3000"}
        with start("client/timeouts.mjs", tmp_path / "calls", **settings) as script:
            lines = lines_of(script)
            whole = json.loads(next(lines).removeprefix("whole "))
            assert (whole["kind"], whole["again"]) == ("timeout", True)
            assert next(lines).startswith("word ")
            os.kill(one.pid, fault)
            *_, last = lines
            assert last.startswith("stream ")
            explained = json.loads(last.removeprefix("stream "))
            assert (explained["kind"], script.wait()) == (kind, 0), explained


# ------------------------------------------------------------------ three instances, one killed
@pytest.fixture(scope="module")
def balanced(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[list[str], Ran, Ran]]:
    """The urls; what the guide's balancer and ours printed while the second instance hung and then was killed."""
    logs = tmp_path_factory.mktemp("instances")
    with contextlib.ExitStack() as stack:
        settings = (str(tiny_model("llama")), "--served-model-name", TINY, "--num-gpu-blocks-override", "256")
        instances = [stack.enter_context(server(logs / f"{number}.log", *settings)) for number in range(3)]
        urls = [instance.url for instance in instances]
        environment = {"VLLM_BASE_URLS": ",".join(urls), "VLLM_MODEL": TINY, "SECONDS": str(BALANCE_SECONDS)}
        pool = stack.enter_context(ThreadPoolExecutor(2))
        guides = pool.submit(run, "sdk4/load-balancing.mjs", **environment)
        ours = pool.submit(run, "client/load-balancing.mjs", **environment)
        time.sleep(KILL_AFTER_SECONDS)
        os.kill(instances[1].pid, signal.SIGSTOP)  # now there are requests in it
        time.sleep(3)
        os.kill(instances[1].pid, signal.SIGKILL)
        yield urls, guides.result(), ours.result()


def test_the_guides_balancer_loses_only_what_it_sends_to_the_killed_instance(balanced: tuple[list[str], Ran, Ran]):
    urls, guides, _ = balanced
    assert guides.code == 0, guides.out + guides.err
    lines = sorted(guides.lines(), key=lambda line: line["number"])
    assert [line["number"] for line in lines] == list(range(1, 2 * BALANCE_SECONDS + 1))
    lost = [line for line in lines if "error" in line]
    assert lost and {line["url"] for line in lost} == {urls[1]}
    answered = [line for line in lines if "text" in line]
    assert {line["url"] for line in answered} == set(urls)
    # Its health check then finds the instance dead: the last requests go round the other two.
    assert {line["url"] for line in lines[-12:]} == {urls[0], urls[2]}
    assert lost[-1]["number"] < lines[-12]["number"]


def test_a_balancer_that_goes_on_to_the_next_loses_nothing(balanced: tuple[list[str], Ran, Ran]):
    urls, _, ours = balanced
    assert ours.code == 0, ours.out + ours.err
    answers = [line for line in ours.lines() if "number" in line]
    assert sorted(line["number"] for line in answers) == list(range(1, 2 * BALANCE_SECONDS + 1))
    assert all("text" in line for line in answers)
    assert {line["url"] for line in answers} == set(urls)
    failures = [line for line in ours.lines() if "failed" in line]
    assert failures and {line["failed"] for line in failures} == {urls[1]}


def test_with_no_instance_left_each_is_tried_and_the_error_is_told():
    ran = run("client/load-balancing.mjs", VLLM_BASE_URLS="http://127.0.0.1:2/v1,http://127.0.0.1:3/v1", SECONDS="1")
    assert ran.code == 0
    failed = [line["failed"] for line in ran.lines() if "failed" in line]
    assert sorted(failed) == ["http://127.0.0.1:2/v1"] * 2 + ["http://127.0.0.1:3/v1"] * 2
    assert all("Cannot connect" in line["error"] for line in ran.lines() if "number" in line)
