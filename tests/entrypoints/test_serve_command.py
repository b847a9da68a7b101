"""`minivllm serve` as a process: the ready line, a signal in the middle of an answer, and wrong usage."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from minivllm.cli import app
from minivllm.cli.serving import origins as read_origins
from tests.entrypoints.helpers import CHAT, HELLO, PATIENCE, events_of

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def process(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A server of its own; killed if the test leaves it running."""
    command = [
        sys.executable,
        "-m",
        "minivllm.cli",
        "serve",
        "--port",
        "0",
        "--num-gpu-blocks-override",
        "64",
        *arguments,
    ]
    started = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


def test_a_signal_in_the_middle_of_an_answer_lets_it_end(tiny_model: Callable[[str], Path]):
    flags = (
        "--no-enable-prefix-caching",
        "--enable-chunked-prefill",
        "--served-model-name",
        "tiny",
        "--dtype",
        "float32",
    )
    with process(str(tiny_model("llama")), *flags, VLLM_API_KEY="one two") as server:
        ready = server.stdout.readline()
        found = re.fullmatch(
            r"minivllm ready: http://127\.0\.0\.1:(\d+)/v1  model tiny  max_model_len 128  KV blocks 63\n", ready
        )
        assert found, ready + server.stderr.read()
        example = server.stdout.readline()
        key = '-H "Authorization: Bearer $VLLM_API_KEY"'
        assert example.startswith(f"try: curl http://127.0.0.1:{found[1]}{CHAT} {key} ")
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=PATIENCE)) as client:
            body = json.dumps({"messages": HELLO, "stream": True, "ignore_eos": True, "temperature": 0})
            headers = {"Content-Type": "application/json"}
            client.request("POST", CHAT, body, headers)
            assert client.getresponse().read() and client.sock  # no key: 401
            client.request("POST", CHAT, body, {**headers, "Authorization": "Bearer two"})
            response = client.getresponse()
            first = response.readline()
            server.send_signal(signal.SIGTERM)
            events = events_of((first + response.read()).decode())
        assert events[-2]["choices"][0]["finish_reason"] == "length" and events[-1] == "[DONE]"
        assert server.wait(PATIENCE) == 0


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["serve", *arguments])


@pytest.mark.parametrize(
    "arguments",
    [
        ("a", "--model", "b"),
        ("a", "--max-queue", "-1"),
        ("a", "--allowed-origins", "[5]"),
        ("a", "--allowed-origins", "[broken"),
        ("a", "--port", "many"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2_before_a_model_is_looked_for(arguments: tuple[str, ...]):
    assert invoke(*arguments).exit_code == 2


@pytest.mark.parametrize("arguments", [("--port", "70000"), ("--api-key", ""), ("--max-body-bytes", "1")], ids=" ".join)
def test_a_bad_setting_is_an_error_before_a_model_is_looked_for(arguments: tuple[str, ...]):
    result = invoke("no-such-model", *arguments)
    assert result.exit_code == 1 and arguments[0].removeprefix("--").replace("-", "_") in str(result.exception)


@pytest.mark.parametrize(
    ("text", "origins"),
    [
        (None, ()),
        ("", ()),
        ("*", ("*",)),
        ("http://a.test http://b.test", ("http://a.test", "http://b.test")),
        ("http://a.test,http://b.test", ("http://a.test", "http://b.test")),
        ('["http://a.test"]', ("http://a.test",)),
        ("[]", ()),
    ],
)
def test_origins_are_words_or_a_json_list(text: str | None, origins: tuple[str, ...]):
    assert read_origins(text) == origins
