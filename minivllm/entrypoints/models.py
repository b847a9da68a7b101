"""GET: which models are served, whether the server is well, what it can do.

Called by app.py. Twin in vLLM: vllm/entrypoints/openai/models/serving.py and vllm/entrypoints/serve/instrumentator/.
"""

from __future__ import annotations

from typing import Any

from flask import Response

from minivllm.entrypoints.answers import json_response
from minivllm.entrypoints.protocol import BODIES, field_states
from minivllm.entrypoints.service import Service
from minivllm.version import __version__


def list_models(service: Service) -> Response:
    """Every name of every model."""
    names = (*service.model_names, *service.embedding_model_names)
    return json_response({"object": "list", "data": [_card(service, name) for name in names]})


def get_model(service: Service, name: str) -> Response:
    """Raises ModelNotFoundError."""
    service.check_model(name)
    return json_response(_card(service, name))


def _card(service: Service, name: str) -> dict[str, Any]:
    model = service.engine_named(name).engine.config.model
    permission = {
        "id": "modelperm-0",
        "object": "model_permission",
        "created": service.started_at,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    return {
        "id": name,
        "object": "model",
        "created": service.started_at,
        "owned_by": "minivllm",
        "root": model.name,
        "parent": None,
        "max_model_len": model.max_model_len,
        "permission": [permission],
    }


def show_health(service: Service) -> Response:
    """Raises ServerError when the engine has ended or hangs."""
    service.check_healthy()
    return json_response({"status": "ok"})


def show_ready(service: Service) -> Response:
    """Raises ServerError or OverloadedError while new work is not taken."""
    service.check_healthy()
    service.check_accepting()
    return json_response({"status": "ok"})


def show_alive() -> Response:
    """The process answers; nothing else is looked at."""
    return json_response({"status": "ok"})


def show_load(service: Service) -> Response:
    """How much there is to do: requests that run or wait."""
    return json_response({"server_load": sum(engine.num_unfinished_requests for engine in service.engines)})


def show_version() -> Response:
    return json_response({"version": __version__})


def show_capabilities(service: Service) -> Response:
    """Every field of every endpoint: implemented, no-op, refused. Others are ignored, and named in the headers."""
    model = service.engine.engine.config.model
    fields = {path: field_states(kind) for path, kind in BODIES.items()}
    return json_response(
        {
            "model": service.model_names[0],
            "generates_text": not model.is_pooling,
            "embeds": True,
            "embedding_model": service.names_of(service.embedding_engine)[0],
            "max_model_len": model.max_model_len,
            "endpoints": fields,
            "unknown_fields": "ignored, and named in the header X-Minivllm-Ignored",
        }
    )
