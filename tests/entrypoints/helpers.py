"""The server from its clients' side: one call and what came back, whole or as events."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from minivllm import AsyncEngine
from minivllm.entrypoints.app import create_app
from minivllm.entrypoints.service import ServerConfig, Service

ROOT = str(Path(__file__).parents[2])  # no reply may show where it runs
PATIENCE = 60.0  # seconds until a test that hangs fails; nothing waits for it to pass
HELLO = [{"role": "user", "content": "what is the capital"}]
CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"


class Reply(NamedTuple):
    """One answer."""

    status: int
    headers: Any
    text: str

    @property
    def body(self) -> dict[str, Any]:
        return json.loads(self.text)

    @property
    def events(self) -> list[Any]:
        """The JSON of every event; [DONE] and comments as they are."""
        return events_of(self.text)

    @property
    def error(self) -> dict[str, Any]:
        """The one shape that every error has."""
        assert self.headers["Content-Type"] == "application/json", self.text
        assert list(self.body) == ["error"] and list(self.body["error"]) == ["message", "type", "param", "code"]
        assert isinstance(self.body["error"]["message"], str) and self.body["error"]["message"]
        assert "Traceback" not in self.text and ROOT not in self.text and " at 0x" not in self.text
        return self.body["error"]


def events_of(text: str) -> list[Any]:
    """The JSON of every event in a stream; [DONE] and comments as they are."""
    found = []
    for block in text.split("\n\n")[:-1]:
        payload = block.removeprefix("data: ")
        found.append(json.loads(payload) if payload.startswith("{") else payload)
    return found


class Web:
    """The application, called without a socket."""

    def __init__(
        self, engine: AsyncEngine, config: ServerConfig | None = None, embedding_engine: AsyncEngine | None = None
    ):
        config = config or ServerConfig(served_model_names=("tiny", "alias"))
        self.app = create_app(engine, config, embedding_engine)
        self.service: Service = self.app.extensions["minivllm"]
        self.app.json.sort_keys = False  # bodies go out as clients send them: a schema's order counts
        self.client = self.app.test_client()

    def call(self, method: str, path: str, body: Any = None, **options: Any) -> Reply:
        if body is not None:
            options["json"] = body
        if path.startswith("//"):  # the client would take what follows for a host
            options["environ_overrides"] = {"PATH_INFO": path}
        response = self.client.open(path, method=method, **options)
        reply = Reply(response.status_code, response.headers, response.get_data(as_text=True))
        response.close()
        return reply

    def get(self, path: str, **options: Any) -> Reply:
        return self.call("GET", path, **options)

    def post(self, path: str, **body: Any) -> Reply:
        return self.call("POST", path, body)

    def chat(self, messages: Any = HELLO, **fields: Any) -> Reply:
        return self.post(CHAT, messages=messages, **fields)

    def complete(self, prompt: Any = "the value is", **fields: Any) -> Reply:
        return self.post(COMPLETIONS, prompt=prompt, **fields)

    def streamed(self, path: str, **body: Any) -> Any:
        """An iterator over the pieces of a stream, as they are written; the caller closes it."""
        return self.client.post(path, json={**body, "stream": True}, buffered=False)


def eventually(condition: Callable[[], Any]) -> None:
    """Fail unless it comes true."""
    deadline, pause = time.monotonic() + PATIENCE, threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        pause.wait(0.005)
