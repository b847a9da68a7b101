"""What the server says on standard error: one line for each call, and whatever else is logged, as text or as JSON.

    2026-01-31T12:00:00.123Z INFO 1f0c9a... POST /v1/chat/completions 200, 0.532 s, 1234 bytes
    {"time": ..., "level": "info", "logger": "minivllm.access", "message": ..., "request_id": ..., "status": 200, ...}

Neither a key nor a prompt is ever part of a line; with --log-requests the bodies are. Probes are logged at debug.
Called by cli/serving.py (where lines go) and front.py, app.py (what they say). Twin in vLLM: vllm/logger.py.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
from collections.abc import Iterator
from typing import Any, TextIO

from flask import has_request_context, request

from minivllm.errors import show

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("text", "json")
LOGGERS = ("minivllm", "waitress")
ACCESS, REQUESTS = "minivllm.access", "minivllm.requests"


def log_access(request_id: str, what: str, level: int, is_whole: bool, **facts: Any) -> None:
    """One line for one call, when its last byte was handed over. is_whole: nobody left before."""
    logger = logging.getLogger(ACCESS)
    if logger.isEnabledFor(level):
        line = "%s %d, %.3f s, %d bytes%s"
        cut = "" if is_whole else ", cut"
        extra = {"request_id": request_id, "fields": {**facts, "whole": is_whole}}
        logger.log(level, line, what, facts["status"], facts["seconds"], facts["bytes"], cut, extra=extra)


def log_body(raw: bytes) -> None:
    """What a client asked for, prompt and all: only on request."""
    logging.getLogger(REQUESTS).info("body %s", show(raw.decode("utf-8", "backslashreplace"), len(raw) + 2**20))


@contextlib.contextmanager
def logging_to(stream: TextIO, level: str = "info", form: str = "text", access: bool = True) -> Iterator[None]:
    """Send what is logged to a stream, until the block ends."""
    handler = logging.StreamHandler(stream)
    handler.addFilter(_add_request_id)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    loggers, access_logger = [logging.getLogger(name) for name in LOGGERS], logging.getLogger(ACCESS)
    before = [one.level for one in (*loggers, access_logger)]
    for one in loggers:
        one.addHandler(handler)
        one.setLevel(level.upper())
    access_logger.setLevel(logging.NOTSET if access else logging.CRITICAL)
    if level == "info":
        logging.getLogger("waitress").setLevel(logging.WARNING)  # the access line says when a client left
    try:
        yield
    finally:
        for one in loggers:
            one.removeHandler(handler)
        for one, old_level in zip((*loggers, access_logger), before, strict=True):
            one.setLevel(old_level)


def _add_request_id(record: logging.LogRecord) -> bool:
    """What is logged while a call is looked at bears its id."""
    if not hasattr(record, "request_id"):
        record.request_id = request.environ.get("minivllm.request_id") if has_request_context() else None
    return True


def _time_of(record: logging.LogRecord) -> str:
    moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class TextFormatter(logging.Formatter):
    """For people."""

    def format(self, record: logging.LogRecord) -> str:
        """Time, level, the call's id if there is one, message; a traceback follows on lines of its own."""
        parts = (_time_of(record), record.levelname, getattr(record, "request_id", None), record.getMessage())
        lines = [" ".join(part for part in parts if part)]
        if record.exc_info:
            lines.append(self.formatException(record.exc_info))
        return "\n".join(lines)


class JsonFormatter(logging.Formatter):
    """For machines: one object on one line."""

    def format(self, record: logging.LogRecord) -> str:
        """The keys are listed in this module's docstring; a traceback is the text of "exception"."""
        entry: dict[str, Any] = {"time": _time_of(record), "level": record.levelname.lower(), "logger": record.name}
        entry["message"] = record.getMessage()
        if getattr(record, "request_id", None):
            entry["request_id"] = record.request_id  # type: ignore[attr-defined]
        entry |= getattr(record, "fields", {})
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)
