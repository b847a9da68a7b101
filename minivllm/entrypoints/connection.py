"""One connection of the server: what waitress does with it, where its own ways are not enough.

    refused by waitress itself   -> the application's own shape of an error
    a request that does not come -> closed
    an answer that is not taken  -> closed: a write that waits for its reader holds a thread, and what it answers blocks

waitress's own timeout looks only at connections that are neither sending a request nor being answered, and a socket
that takes nothing never comes round to being closed.

Knows no engine. Used by server.py. Twin in vLLM: none (uvicorn's part).
"""

from __future__ import annotations

import time
from typing import Any

from waitress.channel import HTTPChannel
from waitress.task import ErrorTask, WSGITask

from minivllm.entrypoints.protocol import error_body, to_json
from minivllm.entrypoints.request_ids import make_request_id

UNREAD_SECONDS = 5.0  # nothing taken for so long: an orderly end does not wait for this reader


class JsonErrorTask(ErrorTask):
    """What waitress refuses before the application sees it, in the application's own shape."""

    def execute(self) -> None:
        """Answer and close: what follows in the connection cannot be told apart any more."""
        error = self.request.error
        body = to_json(error_body(f"{error.reason}: {error.body}"[:300], error.code))
        self.status = f"{error.code} {error.reason}"
        headers = {"Content-Type": "application/json", "Connection": "close", "X-Request-Id": make_request_id("")}
        self.response_headers.extend(headers.items())
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class Task(WSGITask):
    """A call of the application, which may ask how much of what it wrote is still here."""

    def get_environment(self) -> dict[str, Any]:
        environ: dict[str, Any] = super().get_environment()
        environ["minivllm.num_unsent_bytes"] = lambda: self.channel.total_outbufs_len
        return environ


class Channel(HTTPChannel):
    """A connection."""

    task_class = Task
    error_task_class = JsonErrorTask

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._arriving: Any = None  # the request that is not complete
        self._arriving_since = 0.0
        self._writing_since: float | None = None

    @property
    def is_busy(self) -> bool:
        """Something is being answered, or was and has not left. A reader who takes nothing any more does not count:
        whether its answer still runs is known elsewhere."""
        is_read = not self.total_outbufs_len or time.time() - self.last_activity < UNREAD_SECONDS
        return is_read and bool(self.requests or self.total_outbufs_len)

    def received(self, data: bytes) -> bool:
        """In the server's thread: a piece of a request, or several requests."""
        accepted = bool(super().received(data))
        if self.request is not self._arriving:
            self._arriving, self._arriving_since = self.request, time.monotonic()
        return accepted

    def write_soon(self, data: Any) -> int:
        """In the thread of an answer: waits while the out buffer is full."""
        self._writing_since = time.monotonic()
        try:
            return int(super().write_soon(data))
        finally:
            self._writing_since = None

    def close_if_stuck(self, timeout_seconds: float) -> None:
        """For the server's thread, once in a while. Whoever waits in write_soon gets ClientDisconnected."""
        now = time.monotonic()
        writing_since = self._writing_since
        if self.requests:  # what arrives meanwhile waits for us, not for the client
            self._arriving_since = now
            is_stuck = writing_since is not None and now - writing_since > timeout_seconds
        elif self.request is not None:
            is_stuck = now - self._arriving_since > timeout_seconds
        else:
            is_stuck = bool(self.total_outbufs_len) and time.time() - self.last_activity > timeout_seconds
        if is_stuck:
            self.handle_close()
