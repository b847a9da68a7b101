"""Around the application: what is done for every call, whatever answers it.

    tidy path ── id ── count in ──▶ application ──▶ X-Request-Id ── pieces ──▶ count out ── access line ── http metrics

A call lasts until its last byte was handed over, or until it was clear that nobody takes it.
Knows no endpoint. Made by app.py. Twin in vLLM: the middlewares of vllm/entrypoints/openai/api_server.py.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from minivllm.entrypoints.logs import log_access
from minivllm.entrypoints.metrics import Metrics
from minivllm.entrypoints.request_ids import REQUEST_ID, make_request_id
from minivllm.entrypoints.service import Service

HANDLER = "minivllm.handler"  # of the WSGI environment: the route's rule, set by app.py
NO_HANDLER = "none"
PROBES = frozenset({"/health", "/v1/health", "/ready", "/live", "/ping", "/version", "/metrics", "/load"})


class Front:
    """A WSGI application around another."""

    def __init__(self, wsgi_app: Callable[..., Iterable[bytes]], service: Service, metrics: Metrics):
        self._wsgi_app = wsgi_app
        self._service = service
        self._metrics = metrics

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        path = re.sub("/+", "/", environ.get("PATH_INFO", "/"))
        environ["PATH_INFO"] = path.rstrip("/") or "/"
        environ[REQUEST_ID] = make_request_id(environ.get("HTTP_X_REQUEST_ID", ""))
        call = _Call(environ, start_response, self._end)
        self._service.enter()
        try:
            call.pieces = self._wsgi_app(environ, call.start_response)
        except BaseException:
            call.close()
            raise
        return call

    def _end(self, call: _Call) -> None:
        """Machines ask the probes every second: seen at debug, and not counted, as in vLLM."""
        self._service.leave()
        environ, seconds = call.environ, round(time.monotonic() - call.started, 6)
        method, path = environ.get("REQUEST_METHOD", "")[:16], environ["PATH_INFO"][:200]
        what = "".join(char if char.isprintable() else "?" for char in f"{method} {path}")
        level = logging.DEBUG if path in PROBES else logging.INFO
        facts = {"method": method, "path": path, "status": call.status, "seconds": seconds, "bytes": call.num_bytes}
        log_access(environ[REQUEST_ID], what, level, call.is_whole, **facts)
        if path not in PROBES:
            handler = environ.get(HANDLER, NO_HANDLER)
            self._metrics.observe_call(handler, method, call.status, seconds, _length(environ), call.num_bytes)


def _length(environ: dict[str, Any]) -> int:
    """Of the body that came; 0 when it was not said."""
    text = str(environ.get("CONTENT_LENGTH") or "0")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else 0


class _Call:
    """One answer on its way out."""

    def __init__(self, environ: dict[str, Any], start_response: Any, on_end: Callable[[_Call], None]):
        self.environ = environ
        self.started = time.monotonic()
        self.status = 500  # unless the application says something
        self.num_bytes = 0
        self.is_whole = False
        self.pieces: Iterable[bytes] = ()
        self._start_response = start_response
        self._on_end: Callable[[_Call], None] | None = on_end
        self._iterator: Iterator[bytes] | None = None

    def start_response(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        """The application's answer begins."""
        self.status = int(status[:3])
        return self._start_response(status, [*headers, ("X-Request-Id", self.environ[REQUEST_ID])], exc_info)

    def __iter__(self) -> _Call:
        self._iterator = iter(self.pieces)
        return self

    def __next__(self) -> bytes:
        assert self._iterator is not None
        piece = next(self._iterator, None)
        if piece is None:
            self.is_whole = True
            raise StopIteration
        self.num_bytes += len(piece)
        return piece

    def close(self) -> None:
        """However it ended, once."""
        try:
            if hasattr(self.pieces, "close"):
                self.pieces.close()
        finally:
            on_end, self._on_end = self._on_end, None
            if on_end is not None:
                on_end(self)
