"""GET /v1/engine/state and /v1/engine/events: what the engine is doing, once or as it goes on.

    event: state     the snapshot of engine/snapshot.py, some times a second while something changes
    : keep-alive     nothing has changed
    event: end       the server is shutting down
    event: error     the engine has ended or hangs: an error body

A watcher that reads slowly misses states, and nothing else: the next one leaves when the last one has left.

Called by app.py. Twin in vLLM: none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from flask import Response

from minivllm.entrypoints.protocol import describe_error, to_json
from minivllm.entrypoints.service import ClientGoneError, Service
from minivllm.entrypoints.sse import KEEP_ALIVE
from minivllm.entrypoints.state_feed import Frame, StateFeed
from minivllm.errors import MiniVLLMError


def show_state(service: Service, feed: StateFeed, is_gone: Callable[[], bool]) -> Response:
    """One snapshot, true when it is sent. Raises ServerError, ClientGoneError."""

    def check() -> None:
        service.check_healthy()
        if is_gone():
            raise ClientGoneError

    check()
    frame = feed.current(check, service.config.poll_seconds)
    return Response(frame.to_json(), mimetype="application/json", headers={"Cache-Control": "no-store"})


def stream_events(
    service: Service, feed: StateFeed, is_gone: Callable[[], bool], num_unsent_bytes: Callable[[], int]
) -> Response:
    """Become a watcher. Raises OverloadedError, ServerError before anything is sent."""
    service.check_healthy()
    leave = feed.enter()
    response = Response(events(service, feed, is_gone, num_unsent_bytes), mimetype="text/event-stream")
    response.headers.update({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
    response.call_on_close(leave)
    return response


def events(
    service: Service, feed: StateFeed, is_gone: Callable[[], bool], num_unsent_bytes: Callable[[], int]
) -> Iterator[bytes]:
    """Until the watcher leaves or the server ends. num_unsent_bytes: written before, and not yet taken."""
    shown: Frame | None = None
    wrote_at = time.monotonic()
    yield KEEP_ALIVE  # the headers leave at once
    while not service.draining.is_set():
        if is_gone():
            return
        try:
            service.check_healthy()
        except MiniVLLMError as error:
            yield event("error", to_json(describe_error(error)[1]))
            return
        frame, silence_seconds = feed.newest(), time.monotonic() - wrote_at
        if num_unsent_bytes():
            if silence_seconds >= service.config.client_timeout_seconds:
                return
            service.draining.wait(feed.interval_seconds)
            continue
        if frame is not None and frame is not shown:
            shown, wrote_at = frame, time.monotonic()
            yield event("state", frame.to_json())
        elif silence_seconds >= service.config.keep_alive_seconds:
            wrote_at = time.monotonic()
            yield KEEP_ALIVE
        feed.wait(frame, feed.interval_seconds)
    if not num_unsent_bytes():
        yield event("end", to_json({"reason": "The server is shutting down."}))


def event(name: str, data: bytes) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"
