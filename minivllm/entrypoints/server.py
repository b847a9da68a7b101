"""The process that serves: waitress with limits, and an orderly end.

    SIGTERM ─▶ new work is refused (503) ─▶ running answers finish, at most shutdown_timeout ─▶ the rest gets an error
               event ─▶ exit 0.   A second signal skips the waiting. A dead engine ends the process with exit 1.

One thread per answer: more threads than the engine takes requests, or a full queue could not even be told so.
Called by cli.py. Twin in vLLM: vllm/entrypoints/launcher.py.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from flask import Flask
from waitress import wasyncore
from waitress.channel import HTTPChannel
from waitress.server import create_server
from waitress.task import ErrorTask, ThreadedTaskDispatcher

from minivllm.engine.async_engine import AsyncEngine
from minivllm.entrypoints.app import create_app
from minivllm.entrypoints.protocol import error_body, to_json
from minivllm.entrypoints.service import ServerConfig, Service
from minivllm.errors import ConfigError

SPARE_THREADS = 8
IDLE_CONNECTIONS = 512  # beside those that are being answered
MAX_HEADER_BYTES = 64 * 1024
OUT_BUFFER_BYTES = 64 * 1024
CHANNEL_TIMEOUT_SECONDS = 30
LOOK_SECONDS = 0.05
LAST_WORDS_SECONDS = 5.0  # for error events to leave


class JsonErrorTask(ErrorTask):
    """What waitress refuses before the application sees it, in the application's own shape."""

    def execute(self) -> None:
        """Answer and close: what follows in the connection cannot be told apart any more."""
        error = self.request.error
        body = to_json(error_body(f"{error.reason}: {error.body}"[:300], error.code))
        self.status = f"{error.code} {error.reason}"
        self.response_headers.extend([("Content-Type", "application/json"), ("Connection", "close")])
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class Channel(HTTPChannel):
    """A connection."""

    error_task_class = JsonErrorTask


class Server:
    """Serves an application from threads of its own. Raises ConfigError when the address cannot be used."""

    def __init__(self, app: Flask, num_threads: int):
        self.service: Service = app.extensions["minivllm"]
        config = self.service.config
        self._sockets: dict[int, Any] = {}
        self._num_threads = num_threads
        self._workers = ThreadedTaskDispatcher()
        try:
            self._server = create_server(
                app,
                map=self._sockets,
                _dispatcher=self._workers,
                host=config.host,
                port=config.port,
                connection_limit=num_threads + IDLE_CONNECTIONS,
                backlog=1024,
                channel_request_lookahead=1,  # or a client that left would not be noticed
                channel_timeout=CHANNEL_TIMEOUT_SECONDS,
                cleanup_interval=5,
                max_request_body_size=config.max_body_bytes + 1,  # one more than flask takes: flask says it better
                max_request_header_size=MAX_HEADER_BYTES,
                outbuf_high_watermark=OUT_BUFFER_BYTES,
                expose_tracebacks=False,
                ident="minivllm",
            )
        except (OSError, ValueError) as error:
            wasyncore.close_all(self._sockets, ignore_all=True)
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(f"cannot listen on {config.host}:{config.port}: {reason}.", parameter="port") from None
        for listener in self._sockets.values():
            if hasattr(listener, "channel_class"):
                listener.channel_class = Channel
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="minivllm-http", daemon=True)

    @property
    def url(self) -> str:
        host = self.service.config.host
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
        return f"http://{host}:{self.port}"

    @property
    def port(self) -> int:
        """The one that was given; with port 0, the one that was free."""
        if hasattr(self._server, "effective_listen"):  # several addresses, as localhost has
            return int(self._server.effective_listen[0][1])
        return int(self._server.effective_port)

    def start(self) -> None:
        self._workers.set_thread_count(self._num_threads)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping.is_set():
            wasyncore.loop(timeout=1.0, use_poll=True, map=self._sockets, count=1)
        wasyncore.close_all(self._sockets, ignore_all=True)

    def drain(self, timeout_seconds: float, is_urgent: Callable[[], bool] = bool) -> None:
        """Refuse new work, wait for what runs, then end what still does. is_urgent: do not wait any longer."""
        self.service.draining.set()
        self._wait_until_idle(timeout_seconds, is_urgent)
        self.service.aborting.set()
        self._wait_until_idle(LAST_WORDS_SECONDS, bool)

    def _wait_until_idle(self, timeout_seconds: float, is_urgent: Callable[[], bool]) -> None:
        """Until every answer has left, bytes included."""
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline and not is_urgent() and not self._is_idle():
            time.sleep(LOOK_SECONDS)

    def _is_idle(self) -> bool:
        channels = [socket for socket in list(self._sockets.values()) if isinstance(socket, HTTPChannel)]
        busy = any(channel.requests or channel.total_outbufs_len for channel in channels)
        return self.service.num_in_flight == 0 and not busy

    def stop(self) -> None:
        """Close every connection and end the threads."""
        self._stopping.set()
        for listener in list(self._sockets.values()):
            if hasattr(listener, "pull_trigger"):
                with contextlib.suppress(OSError):  # the loop came round by itself, and has closed it
                    listener.pull_trigger()
                break
        self._thread.join()
        self._workers.shutdown()


def make_server(engine: AsyncEngine, config: ServerConfig) -> Server:
    """A server for an engine: a thread for every request that the engine takes, and some more."""
    return Server(create_app(engine, config), engine.max_requests + SPARE_THREADS)


def serve(engine: AsyncEngine, config: ServerConfig, on_ready: Callable[[Server], None]) -> int:
    """Serve until a signal comes or the engine ends; returns the exit code. For the main thread only."""
    signals: list[int] = []  # a handler may not take a lock

    def note(number: int, _: FrameType | None) -> None:
        signals.append(number)

    server = make_server(engine, config)
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.start()
        on_ready(server)
        while not signals and engine.is_alive:
            time.sleep(LOOK_SECONDS)
        server.drain(config.shutdown_timeout_seconds if engine.is_alive else 0.0, lambda: len(signals) > 1)
        code = 0 if signals else 1
    finally:
        server.stop()
        engine.shutdown()
        for number, handler in before.items():
            signal.signal(number, handler)
    return code
