"""Ids of calls: what the client sent in X-Request-Id, made harmless, and always something of our own.

A client's id alone would not do: some send one and the same with every call, or kilobytes of anything.
Called by front.py, loading.py and connection.py; answers.py builds the ids of answers on them.
Twin in vLLM: vllm/entrypoints/openai/engine/serving.py (_base_request_id).
"""

from __future__ import annotations

import re
import uuid
from typing import Any

MAX_CLIENT_CHARS = 64
REQUEST_ID = "minivllm.request_id"  # of the WSGI environment, set by front.py


def make_request_id(sent: str) -> str:
    """Letters, digits and -_. only, at most 81 characters; 16 hexadecimal digits are ours, and new."""
    harmless = re.sub(r"[^A-Za-z0-9_.-]", "", sent[: 16 * MAX_CLIENT_CHARS])[:MAX_CLIENT_CHARS]
    return "-".join(part for part in (harmless, uuid.uuid4().hex[:16]) if part)


def request_id_of(environ: dict[str, Any]) -> str:
    """The id of the call that a WSGI environment belongs to; it gets one if nobody gave it any."""
    return str(environ.setdefault(REQUEST_ID, make_request_id("")))
