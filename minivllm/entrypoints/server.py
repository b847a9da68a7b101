"""The process that serves: waitress with limits, a port that is bound before the model is loaded, an orderly end.

    SIGTERM ─▶ new work is refused (503) ─▶ running answers finish, at most shutdown_timeout ─▶ the rest gets an error
               event ─▶ exit 0.   A second signal skips the waiting. A dead engine ends the process with exit 1.

One thread per answer: more threads than the engine takes requests, or a full queue could not even be told so.
Called by cli/serving.py. Twin in vLLM: vllm/entrypoints/launcher.py.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from types import FrameType
from typing import Any

from flask import Flask
from waitress import wasyncore
from waitress.server import create_server
from waitress.task import ThreadedTaskDispatcher

from minivllm.engine.async_engine import AsyncEngine
from minivllm.entrypoints.app import create_app
from minivllm.entrypoints.connection import Channel
from minivllm.entrypoints.loading import answer_while_loading
from minivllm.entrypoints.service import ServerConfig, Service
from minivllm.errors import ConfigError, InvalidRequestError

SPARE_THREADS = 8
IDLE_CONNECTIONS = 512  # beside those that are being answered
MAX_HEADER_BYTES = 64 * 1024
OUT_BUFFER_BYTES = 64 * 1024
# Of a socket. The kernel's own would grow to megabytes, and a socket is writable again when a third of them is gone:
# from a slow line that looks like a reader who does not read.
SEND_BUFFER_BYTES = 128 * 1024
LOOK_SECONDS = 0.05
SWEEP_SECONDS = 1.0  # between two looks for connections that hang
LAST_WORDS_SECONDS = 5.0  # for error events to leave
REASON_SECONDS = 1.0  # for an engine that ends to tell its streams why; a dead rank is seen here before its step fails


class Server:
    """Listens at once, and serves an application from threads of its own when there is one.

    Raises ConfigError when the address cannot be used.
    """

    def __init__(self, config: ServerConfig):
        self.config = config
        self._application: Any = answer_while_loading
        self._service: Service | None = None
        self._sockets: dict[int, Any] = {}
        self._workers = ThreadedTaskDispatcher()
        try:
            self._server = create_server(
                lambda environ, start_response: self._application(environ, start_response),
                map=self._sockets,
                _dispatcher=self._workers,
                host=config.host,
                port=config.port,
                connection_limit=SPARE_THREADS + IDLE_CONNECTIONS,
                backlog=1024,
                channel_request_lookahead=1,  # or a client that left would not be noticed
                channel_timeout=math.ceil(config.client_timeout_seconds),  # of connections at rest
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
        no_delay = (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._server.adj.socket_options = [no_delay, (socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)]
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="minivllm-http", daemon=True)

    @property
    def url(self) -> str:
        host = self.config.host
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
        return f"http://{host}:{self.port}"

    @property
    def port(self) -> int:
        """The one that was given; with port 0, the one that was free."""
        if hasattr(self._server, "effective_listen"):  # several addresses, as localhost has
            return int(self._server.effective_listen[0][1])
        return int(self._server.effective_port)

    @property
    def service(self) -> Service:
        """What the application is about. Raises RuntimeError while there is none."""
        if self._service is None:
            raise RuntimeError("the server has no application yet")
        return self._service

    def start(self) -> None:
        """Answer; without an application, that there is none yet."""
        if self._service is None:
            self._workers.set_thread_count(SPARE_THREADS)
        self._thread.start()

    def serve_app(self, app: Flask, num_threads: int) -> None:
        """From now on, before or after start(). num_threads: answers at a time."""
        self._service = app.extensions["minivllm"]
        self._workers.set_thread_count(num_threads)
        self._server.adj.connection_limit = num_threads + IDLE_CONNECTIONS
        self._application = app

    def _run(self) -> None:
        interval = min(SWEEP_SECONDS, self.config.client_timeout_seconds / 4)
        swept_at = time.monotonic()
        while not self._stopping.is_set():
            wasyncore.loop(timeout=interval, use_poll=True, map=self._sockets, count=1)
            if time.monotonic() - swept_at >= interval:
                swept_at = time.monotonic()
                for channel in self._channels():
                    channel.close_if_stuck(self.config.client_timeout_seconds)
        for channel in self._channels():
            channel.handle_close()  # wakes a thread that waits for its reader
        wasyncore.close_all(self._sockets, ignore_all=True)

    def _channels(self) -> list[Channel]:
        return [one for one in list(self._sockets.values()) if isinstance(one, Channel)]

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
        return self.service.num_in_flight == 0 and not any(channel.is_busy for channel in self._channels())

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


Engines = AsyncEngine | tuple[AsyncEngine, AsyncEngine]  # who answers, and perhaps who gives embeddings beside it


def make_server(engine: AsyncEngine, config: ServerConfig, embedding_engine: AsyncEngine | None = None) -> Server:
    """A server for an engine that is there already, and perhaps one for embeddings beside it."""
    server = Server(config)
    _connect(server, engine, embedding_engine)
    return server


def _connect(server: Server, engine: AsyncEngine, embedding_engine: AsyncEngine | None = None) -> None:
    """A thread for every request that the engines take and every watcher, and some more."""
    _prepare_grammars(engine)
    max_requests = engine.max_requests + (embedding_engine.max_requests if embedding_engine is not None else 0)
    num_threads = max_requests + server.config.max_watchers + SPARE_THREADS
    server.serve_app(create_app(engine, server.config, embedding_engine), num_threads)


def _prepare_grammars(engine: AsyncEngine) -> None:
    """Read the vocabulary now, or the first structured output waits for it. A model that has none serves without."""
    if engine.engine.config.model.is_pooling:
        return
    try:
        engine.engine.structured_output.prepare()
    except InvalidRequestError as error:  # told again to whoever asks for one
        logging.getLogger(__name__).warning("%s", error)


def _in_a_thread_that_ends(load: Callable[[], Engines]) -> Engines:
    """load().

    OpenMP keeps worker threads for every thread that ever computed, as long as it lives. As soon as there are more of
    them than cores, all of them sleep between two operations instead of waiting awake, and a step takes a quarter to a
    third longer. So only the engine's own thread may have any.
    """
    done: Future[Engines] = Future()

    def run() -> None:
        try:
            done.set_result(load())
        except BaseException as error:
            done.set_exception(error)

    thread = threading.Thread(target=run, name="minivllm-load", daemon=True)
    thread.start()
    thread.join()
    return done.result()


def serve(load: Callable[[], Engines], config: ServerConfig, on_ready: Callable[[Server], None]) -> int:
    """Listen, load, serve until a signal comes or the engine ends; returns the exit code. For the main thread only.

    Raises ConfigError before anything is loaded when the port is taken, and what `load` raises. A signal while the
    model is loaded is a SystemExit with 0.
    """
    signals: list[int] = []  # a handler may not take a lock
    engines: tuple[AsyncEngine, ...] = ()

    def note(number: int, _: FrameType | None) -> None:
        signals.append(number)
        if not engines:
            raise SystemExit(0)

    server = Server(config)
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.start()
        loaded = _in_a_thread_that_ends(load)
        engines = loaded if isinstance(loaded, tuple) else (loaded,)
        _connect(server, *engines)
        on_ready(server)
        while not signals and server.service.is_alive:
            time.sleep(LOOK_SECONDS)
        patience = config.shutdown_timeout_seconds if server.service.is_alive else REASON_SECONDS
        server.drain(patience, lambda: len(signals) > 1)
        code = 0 if signals else 1
    finally:
        server.stop()
        for engine in engines:
            engine.shutdown()
        for number, handler in before.items():
            signal.signal(number, handler)
    return code
