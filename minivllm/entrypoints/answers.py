"""What every answer is wrapped in.

Called by the endpoints. Twin in vLLM: none.
"""

from __future__ import annotations

import time
from typing import Any

from flask import Response, request

from minivllm.entrypoints.protocol import to_json
from minivllm.entrypoints.request_ids import request_id_of
from minivllm.entrypoints.service import Service


def json_response(value: Any, headers: dict[str, str] | None = None, status: int = 200) -> Response:
    return Response(to_json(value), status=status, mimetype="application/json", headers=headers)


class Envelope:
    """id, time and model: the same in every chunk of one answer. Made inside the call, whose id it takes."""

    def __init__(self, service: Service, prefix: str, model: str | None = None):
        self._id = f"{prefix}-{request_id_of(request.environ)}"
        self._created = int(time.time())
        self._model = model or service.model_names[0]

    def open(self, kind: str) -> dict[str, Any]:
        """The fields in front."""
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}
