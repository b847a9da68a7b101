"""A server that answers what a test has written down, and remembers what it was asked. For clients under test."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Asked(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]
    body: Any


class ScriptedServer:
    """Attributes:
    status, content: of every answer; content is sent as it is, and the connection closed. Or content is a function of
        what was asked: it returns the pieces, and each is sent when it comes.
    asked: what came in.
    hold: while it is cleared, answers to a POST wait behind their content.
    gone: set when a client left during such a wait.
    """

    def __init__(self, status: int = 200, content: bytes | Callable[[Asked], Iterable[bytes]] = b"") -> None:
        self.status, self.content = status, content
        self.asked: list[Asked] = []
        self.hold, self.gone = threading.Event(), threading.Event()
        self.hold.set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def close(self) -> None:
        self.hold.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        script = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer()

            def do_HEAD(self) -> None:
                self._answer()

            def do_POST(self) -> None:
                self._answer()

            def _answer(self) -> None:
                text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                body = json.loads(text) if text else None
                asked = Asked(self.command, self.path, {name.title(): v for name, v in self.headers.items()}, body)
                script.asked.append(asked)
                content = [script.content] if isinstance(script.content, bytes) else script.content(asked)
                self.send_response(script.status)
                self.end_headers()
                with contextlib.suppress(OSError):
                    for piece in content:
                        self.wfile.write(piece)
                    while self.command == "POST" and not script.hold.wait(0.01):
                        self.connection.setblocking(False)
                        with contextlib.suppress(BlockingIOError):
                            if not self.connection.recv(1):
                                script.gone.set()
                                return

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing: the test says what matters."""

        return Handler


@contextlib.contextmanager
def scripted(status: int = 200, content: bytes | str = b"") -> Iterator[ScriptedServer]:
    server = ScriptedServer(status, content.encode() if isinstance(content, str) else content)
    try:
        yield server
    finally:
        server.close()


def events(*objects: Any) -> str:
    """A stream of events, with [DONE] behind them."""
    return "".join(f"data: {json.dumps(event)}\n\n" for event in objects) + "data: [DONE]\n\n"


def chat_event(**delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
