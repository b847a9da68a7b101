"""The `llm` command: as a model of its own in extra-openai-models.yaml, and by its `openai endpoint` without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.clients.forced import MAX_TOKENS, QUESTION, Temperature, check
from tests.clients.live import LiveServer

SHORT = ("-o", "temperature", "0", "-o", "max_tokens", "8")
SCHEMA = json.dumps(Temperature.model_json_schema())
TIMEOUT_SECONDS = 300


@pytest.fixture(scope="module")
def home(live: LiveServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llm's folder with the server's model (over chat and over Responses) and its key."""
    folder = tmp_path_factory.mktemp("llm")
    model = {"model_name": live.model, "api_base": live.url, "api_key_name": "minivllm", "supports_schema": True}
    models = [{**model, "model_id": "over-chat"}, {**model, "model_id": "over-responses", "responses": True}]
    (folder / "extra-openai-models.yaml").write_text(yaml.safe_dump(models))
    (folder / "keys.json").write_text(json.dumps({"minivllm": live.key}))
    return folder


def llm(home: Path, *arguments: str, code: int = 0) -> str:
    """What it printed: the answer, or what went wrong if `code` says that something must."""
    command = [sys.executable, "-m", "llm", *arguments]
    environment = {**os.environ, "LLM_USER_PATH": str(home)}
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
    )
    assert done.returncode == code, done.stdout + done.stderr
    return (done.stderr if code else done.stdout).strip()


def test_a_streamed_answer_is_the_whole_one_and_is_logged_with_its_usage(home: Path):
    streamed = llm(home, "-m", "over-chat", "Name a colour.", *SHORT)
    assert streamed and streamed == llm(home, "-m", "over-chat", "Name a colour.", *SHORT, "--no-stream")
    (last,) = json.loads(llm(home, "logs", "--json", "-n", "1"))
    assert last["response"].strip() == streamed and last["output_tokens"] > 0


def test_responses(home: Path):
    assert llm(home, "-m", "over-responses", "Name a colour.", *SHORT)


def test_a_schema_is_kept(home: Path):
    options = ("-o", "max_tokens", str(MAX_TOKENS), "-o", "temperature", "0")
    check(json.loads(llm(home, "-m", "over-chat", QUESTION, "--schema", SCHEMA, *options)))


def test_an_endpoint_needs_no_file(home: Path, live: LiveServer):
    where = ("openai", "endpoint", live.url, "--key", live.key)
    assert set(llm(home, *where, "--models").split()) >= {live.model, live.embedder}
    assert llm(home, *where, "-m", live.model, "Name a colour.", *SHORT)


def test_what_the_server_refuses_is_said(home: Path, live: LiveServer):
    where = ("openai", "endpoint", live.url)
    assert "'other'" in llm(home, *where, "--key", live.key, "-m", "other", "hi", code=1)
    assert "401" in llm(home, *where, "--key", "wrong", "-m", live.model, "hi", code=1)
