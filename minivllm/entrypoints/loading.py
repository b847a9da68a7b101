"""What the server answers while the model is being loaded: it lives, and one should come back.

Takes the place of the application, which cannot be made without a model. Called by server.py. Twin in vLLM: none,
there the connection is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from minivllm.entrypoints.protocol import describe_error, to_json
from minivllm.entrypoints.request_ids import make_request_id
from minivllm.entrypoints.service import LoadingError


def answer_while_loading(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    """200 to /live, 503 with Retry-After to everything else."""
    status, value, headers = describe_error(LoadingError("The model is being loaded."))
    if environ.get("PATH_INFO", "").strip("/") == "live":
        status, value, headers = 200, {"status": "ok"}, {}
    body = to_json(value)
    headers["X-Request-Id"] = make_request_id(environ.get("HTTP_X_REQUEST_ID", ""))
    headers |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
    start_response("200 OK" if status == 200 else "503 Service Unavailable", list(headers.items()))
    return [b"" if environ.get("REQUEST_METHOD") == "HEAD" else body]
