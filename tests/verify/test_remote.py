"""Servers over sockets: ours is found equal to transformers and to itself; a planted difference and a missing echo are
found."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minivllm import LLM, AsyncEngine
from minivllm.entrypoints.server import make_server
from minivllm.entrypoints.service import ServerConfig
from minivllm.verify.records import FAIL, NOT_RUN, OK, TIE
from minivllm.verify.remote import diff_servers, verify_server


@contextlib.contextmanager
def serving(model: Path, change: Callable[[Any], None] = lambda network: None) -> Iterator[str]:
    """The address of a server of ours, whose network was changed."""
    llm = LLM(model, dtype="float32", num_gpu_blocks_override=64)
    change(llm.llm_engine._executor.model)
    engine = AsyncEngine(llm.llm_engine)
    server = make_server(engine, ServerConfig(port=0, served_model_names=("tiny",)))
    server.start()
    try:
        yield server.url
    finally:
        server.stop()
        engine.shutdown()


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama-rope-llama3")


@pytest.fixture(scope="module")
def url(model: Path) -> Iterator[str]:
    with serving(model) as url:
        yield url


def spoil_theta(network: Any) -> None:
    network.ropes["default"].frequencies *= 1.1


def spoil_norm(network: Any) -> None:
    network.model.norm.weight *= 1.3


class WithoutEcho(http.server.BaseHTTPRequestHandler):
    """Hands everything on to `target`, but echo and the token ids: some servers answer 200 and say nothing."""

    target = ""

    def do_GET(self) -> None:
        self.answer({"data": [{"id": "tiny"}]})

    def do_POST(self) -> None:
        from minivllm.openai_client import OpenAIClient

        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        kept = {name: value for name, value in body.items() if name not in ("echo", "return_token_ids")}
        self.answer(OpenAIClient(self.target).ask(self.path.removeprefix("/v1"), kept))

    def answer(self, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def deaf_url(url: str) -> Iterator[str]:
    handler = type("Handler", (WithoutEcho,), {"target": url})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


# ------------------------------------------------------------------ verify --against-url
def test_our_server_equals_transformers(url: str, model: Path):
    report = verify_server(url, model, max_tokens=8)
    assert {check.status for check in report.checks} <= {OK, TIE}, report.failures
    assert {check.section for check in report.checks} == {"tokenizer", "prompt logprobs", "greedy"}
    assert report.findings == [] and len(report.logprobs) > 100
    assert all("ids" in check.value for check in report.checks if check.section == "tokenizer")


def test_a_difference_that_grows_with_the_position_is_localised(model: Path):
    with serving(model, spoil_theta) as url:
        report = verify_server(url, model, max_tokens=8)
    assert "prompt logprobs" in {check.section for check in report.failures}
    assert report.findings[0].component == "log-probabilities" and report.findings[0].position >= 1


def test_a_difference_everywhere_is_said_to_be_there_from_the_start(model: Path):
    with serving(model, spoil_norm) as url:
        report = verify_server(url, model, max_tokens=8)
    assert report.findings[0].kind == "different from the start"


def test_a_server_that_ignores_echo_is_said_to_and_still_compared(deaf_url: str, model: Path):
    report = verify_server(deaf_url, model, max_tokens=8)
    logprobs = [check for check in report.checks if check.section == "prompt logprobs"]
    assert {check.status for check in logprobs} == {NOT_RUN}
    assert "not with one for each prompt token" in logprobs[0].detail
    assert not report.failures
    assert all("usage" in check.value for check in report.checks if check.section == "tokenizer")


def test_another_dtype_has_other_limits(model: Path):
    with serving(model, lambda network: network.model.norm.weight.mul_(1.003)) as url:
        assert verify_server(url, model, max_tokens=4).failures
        assert not verify_server(url, model, max_tokens=4, server_dtype="bfloat16").failures


# ------------------------------------------------------------------ diff
def test_two_servers_of_one_model_are_equal(url: str):
    report = diff_servers(url, url, max_tokens=8)
    assert {check.status for check in report.checks} == {OK}


def test_two_servers_of_different_networks_are_told_apart(url: str, model: Path):
    with serving(model, spoil_theta) as other:
        report = diff_servers(url, other, max_tokens=8)
    assert report.failures and report.findings
    assert {check.status for check in report.checks} >= {FAIL}


def test_two_servers_with_different_tokenizers_are_told_apart(url: str, tiny_model: Callable[[str], Path]):
    with serving(tiny_model("qwen2")) as other:
        report = diff_servers(url, other, max_tokens=4)
    assert report.failures
