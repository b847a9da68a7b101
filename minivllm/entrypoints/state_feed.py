"""StateFeed: the engine's newest snapshot for everybody who looks on, made only when somebody does.

    watcher ─┐                                    engine thread, between two steps
    watcher ─┼─ newest(): due? ── call_soon ────▶ take_snapshot
    GET ─────┘ ◀──────────────── Frame ◀──────────┘

All share one snapshot, and one JSON text of it. The next one is due when something has changed, and not before an
interval that grows with what the last one cost: looking on takes at most MAX_SHARE of the engine's time. Nobody holds
up the engine thread, and waiting for it holds up nobody else.

Knows no HTTP. Called by engine_state.py. Twin in vLLM: none.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from minivllm.engine.async_engine import AsyncEngine
from minivllm.engine.snapshot import take_snapshot
from minivllm.entrypoints.protocol import to_json
from minivllm.errors import OverloadedError, ServerError

MAX_SHARE = 0.02  # of the time may go into snapshots while somebody watches


class Frame:
    """One snapshot, and what it was worth when it was taken.

    Attributes:
        revision: of the engine at that moment.
        is_moving: it will change by itself, as tokens per second do when nothing happens any more.
    """

    def __init__(self, revision: int, snapshot: dict[str, Any], cost_seconds: float):
        self.revision = revision
        self.is_moving = any(snapshot["tokens_per_second"].values())
        self.taken_at = time.monotonic()
        self.cost_seconds = cost_seconds
        self._snapshot = {"revision": revision, **snapshot}
        self._lock = threading.Lock()
        self._json: bytes | None = None

    def to_json(self) -> bytes:
        """The same bytes for everybody, made by the first who asks."""
        with self._lock:
            if self._json is None:
                started = time.perf_counter()
                self._json = to_json(self._snapshot)
                self.cost_seconds += time.perf_counter() - started
            return self._json


class StateFeed:
    """Args:
    min_interval_seconds: between two snapshots.
    max_watchers: more are refused.
    """

    def __init__(self, engine: AsyncEngine, max_watchers: int, min_interval_seconds: float):
        self._engine = engine
        self._max_watchers = max_watchers
        self._min_interval_seconds = min_interval_seconds
        self._changed = threading.Condition()
        self._frame: Frame | None = None
        self._is_asked = False  # the engine thread has been asked, and has not answered
        self._num_taken = 0
        self._num_watchers = 0

    # ------------------------------------------------------------------ watchers
    @property
    def num_watchers(self) -> int:
        return self._num_watchers

    def enter(self) -> Callable[[], None]:
        """Become a watcher; call what is returned to leave, once or more. Raises OverloadedError."""
        with self._changed:
            if self._num_watchers >= self._max_watchers:
                raise OverloadedError(
                    f"{self._num_watchers} watchers are connected, at most {self._max_watchers} may be (max_watchers): "
                    "close another page, or ask /v1/engine/state now and then."
                )
            self._num_watchers += 1
        left = threading.Event()

        def leave() -> None:
            with self._changed:
                if not left.is_set():
                    left.set()
                    self._num_watchers -= 1

        return leave

    # ------------------------------------------------------------------ frames
    @property
    def interval_seconds(self) -> float:
        """Between two snapshots, as it is now."""
        cost_seconds = self._frame.cost_seconds if self._frame is not None else 0.0
        return max(self._min_interval_seconds, cost_seconds / MAX_SHARE)

    def newest(self) -> Frame | None:
        """The last frame that was taken. Asks for another when it is due; does not wait for it."""
        with self._changed:
            frame = self._frame
            if frame is None or (
                self._is_outdated(frame) and time.monotonic() - frame.taken_at >= self.interval_seconds
            ):
                self._ask()
            return frame

    def current(self, check: Callable[[], None], poll_seconds: float) -> Frame:
        """A frame that is true now: the last one if nothing has changed since, else one that is taken now.

        `check` is called every poll_seconds of waiting, and may raise. Raises ServerError.
        """
        with self._changed:
            if self._frame is not None and not self._is_outdated(self._frame):
                return self._frame
            self._ask()
            number = self._num_taken
            while not self._changed.wait_for(lambda: self._num_taken != number, poll_seconds):
                check()
            if self._frame is None:
                raise ServerError("the snapshot failed")
            return self._frame

    def wait(self, known: Frame | None, timeout_seconds: float) -> None:
        """Until there is another frame than a known one."""
        with self._changed:
            self._changed.wait_for(lambda: self._frame is not known, timeout_seconds)

    def _is_outdated(self, frame: Frame) -> bool:
        return frame.is_moving or frame.revision != self._engine.revision

    def _ask(self) -> None:
        if not self._is_asked:
            self._is_asked = True
            self._engine.call_soon(self._take)

    def _take(self) -> None:
        """In the engine thread."""
        frame = None
        try:
            started = time.perf_counter()
            snapshot = take_snapshot(self._engine.engine)
            frame = Frame(self._engine.revision, snapshot, time.perf_counter() - started)
        finally:
            with self._changed:
                self._frame, self._is_asked = frame, False
                self._num_taken += 1
                self._changed.notify_all()
