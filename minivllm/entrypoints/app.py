"""The web application: who may call, which endpoint answers, and one shape for every error.

    request ── tidy path ── key ── route ── JSON body ── fields ──▶ endpoint ──▶ answer
                              └──────┴─────────┴─────────┴────────────┴──▶ {"error": {message, type, param, code}}

Default deny: with keys set, an endpoint that is not in OPEN needs one, and so does a path that does not exist.
Called by server.py, and by tests and notebooks. Twin in vLLM: vllm/entrypoints/openai/api_server.py.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
from collections.abc import Callable
from typing import Any

from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException

from minivllm.engine.async_engine import AsyncEngine
from minivllm.entrypoints import models
from minivllm.entrypoints.answers import json_response
from minivllm.entrypoints.chat import create_chat_completion
from minivllm.entrypoints.completions import create_completion
from minivllm.entrypoints.compression import compress
from minivllm.entrypoints.embeddings import create_embedding
from minivllm.entrypoints.engine_state import show_state, stream_events
from minivllm.entrypoints.front import HANDLER, NO_HANDLER, Front
from minivllm.entrypoints.logs import log_body
from minivllm.entrypoints.metrics import Metrics
from minivllm.entrypoints.page import Page
from minivllm.entrypoints.protocol import (
    BODIES,
    Body,
    DetokenizeRequest,
    SamplingBody,
    TokenizeRequest,
    VectorBody,
    describe_error,
    error_body,
    parse,
    parse_json,
)
from minivllm.entrypoints.responses import cancel_response, create_response, delete_response, get_response
from minivllm.entrypoints.score import create_score
from minivllm.entrypoints.service import ClientGoneError, ServerConfig, Service
from minivllm.entrypoints.state_feed import StateFeed
from minivllm.entrypoints.tokenize import detokenize, show_tokenizer_info, tokenize
from minivllm.errors import AuthenticationError, MiniVLLMError, OverloadedError

OPEN = frozenset({"health", "ready", "live", "ping", "version", "page", "metrics"})  # endpoints that need no key
MAX_SHOWN_FIELDS = 16
ALLOWED_HEADERS = "Authorization, Content-Type, X-Request-Id"
EXPOSED_HEADERS = "X-Minivllm-Ignored, X-Minivllm-Clamped, X-Minivllm-Truncated, X-Request-Id, Retry-After"
CLIENT_CLOSED_REQUEST = 499  # nobody reads it


def create_app(
    engine: AsyncEngine, config: ServerConfig | None = None, embedding_engine: AsyncEngine | None = None
) -> Flask:
    """The application in front of an engine, and of one for embeddings beside it; its Service is
    app.extensions["minivllm"]."""
    service = Service(engine, config or ServerConfig(), embedding_engine)
    app = Flask("minivllm.entrypoints", static_folder=None)
    app.config.update(MAX_CONTENT_LENGTH=service.config.max_body_bytes, PROVIDE_AUTOMATIC_OPTIONS=False)
    app.extensions["minivllm"] = service
    metrics = Metrics(service)
    _add_routes(app, service)
    _add_probes(app, service, metrics)
    _add_guards(app, service)
    _add_error_handlers(app, metrics)
    inner = app.wsgi_app
    app.wsgi_app = Front(inner, service, metrics)  # type: ignore[method-assign]
    return app


# ------------------------------------------------------------------ routes
def _add_routes(app: Flask, service: Service) -> None:
    def get(endpoint: str, view: Callable[..., Response], *paths: str, methods: tuple[str, ...] = ("GET",)) -> None:
        for path in paths:
            app.add_url_rule(path, endpoint, view, methods=list(methods))

    def post(path: str, view: Callable[[Any], Response], *aliases: str) -> None:
        def answer() -> Response:
            return _with_body(service, BODIES[path], view)

        for rule in (path, *aliases):
            app.add_url_rule(rule, path, answer, methods=["POST"])

    get("health", lambda: models.show_health(service), "/health", "/v1/health")
    get("ready", lambda: models.show_ready(service), "/ready")
    get("live", models.show_alive, "/live")
    get("ping", lambda: models.show_health(service), "/ping", methods=("GET", "POST"))
    get("version", models.show_version, "/version")
    get("models", lambda: models.list_models(service), "/v1/models", "/v1/v1/models")
    get("model", lambda name: models.get_model(service, name), "/v1/models/<path:name>")
    feed = StateFeed(service.engine, service.config.max_watchers, service.config.state_interval_seconds)
    page = Page.load()
    get("page", page.show, "/")
    get("state", lambda: show_state(service, feed, _client_is_gone()), "/v1/engine/state")
    get("events", lambda: stream_events(service, feed, _client_is_gone(), _num_unsent_bytes()), "/v1/engine/events")
    get("capabilities", lambda: models.show_capabilities(service), "/v1/engine/capabilities")
    post("/v1/chat/completions", lambda body: create_chat_completion(service, body, _client_is_gone()))
    post("/v1/completions", lambda body: create_completion(service, body, _client_is_gone()))
    post("/v1/responses", lambda body: create_response(service, body, _client_is_gone()))
    stored = "/v1/responses/<name>"
    get("response", lambda name: get_response(service, name, request.args), stored)
    get("delete_response", lambda name: delete_response(service, name), stored, methods=("DELETE",))
    get("cancel_response", lambda name: cancel_response(service, name), f"{stored}/cancel", methods=("POST",))
    post("/v1/embeddings", lambda body: create_embedding(service, body, _client_is_gone()))
    post("/v1/score", lambda body: create_score(service, body, _client_is_gone()), "/score")
    post("/tokenize", lambda body: tokenize(service, body))
    post("/detokenize", lambda body: detokenize(service, body))


def _add_probes(app: Flask, service: Service, metrics: Metrics) -> None:
    """What watchers ask."""
    views: dict[str, Callable[[], Response]] = {
        "metrics": metrics.show,
        "load": lambda: models.show_load(service),
        "tokenizer_info": lambda: show_tokenizer_info(service),
    }
    for name, view in views.items():
        app.add_url_rule(f"/{name}", name, view, methods=["GET"])


def _client_is_gone() -> Callable[[], bool]:
    """Asks the server that carries this request; the development server and the test client cannot tell."""
    return request.environ.get("waitress.client_disconnected", bool)


def _num_unsent_bytes() -> Callable[[], int]:
    """The same for how much of the answer is still here."""
    return request.environ.get("minivllm.num_unsent_bytes", int)


def _with_body(service: Service, kind: type[Body], view: Callable[[Any], Response]) -> Response:
    """Read and check the body, answer, and name what was ignored."""
    if kind not in (TokenizeRequest, DetokenizeRequest):  # these need no engine
        embeds = issubclass(kind, VectorBody)
        service.check_accepting(service.engine_named(None, embeds=embeds))  # before anything is read or computed
    if not request.is_json:
        raise UnsupportedMediaTypeError(
            f"Content-Type must be application/json, got {(request.mimetype or 'none')[:80]!r}."
        )
    coding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if coding not in ("identity", ""):
        raise UnsupportedMediaTypeError(f"Content-Encoding must be left out, got {coding[:80]!r}: send plain JSON.")
    raw = request.get_data(cache=False)
    if service.config.log_requests:
        log_body(raw)
    body, unknown = parse(kind, parse_json(raw))
    service.check_model(body.model, generates=issubclass(kind, SamplingBody))
    response = view(body)
    if unknown:
        names = [re.sub(r"[^A-Za-z0-9_.-]", "?", name)[:64] for name in unknown]
        more = [f"and {len(names) - MAX_SHOWN_FIELDS} more"] if len(names) > MAX_SHOWN_FIELDS else []
        ignored = [*response.headers.getlist("X-Minivllm-Ignored"), *names[:MAX_SHOWN_FIELDS], *more]
        response.headers["X-Minivllm-Ignored"] = ", ".join(ignored)
        logging.getLogger(__name__).warning("ignored fields: %s", response.headers["X-Minivllm-Ignored"])
    return response


class UnsupportedMediaTypeError(MiniVLLMError):
    """The body is not said to be JSON, or it is packed."""

    status = 415


# ------------------------------------------------------------------ keys and origins
def _add_guards(app: Flask, service: Service) -> None:
    digests = [hashlib.sha256(key.encode("utf-8")).digest() for key in service.config.api_keys]
    origins = frozenset(service.config.allowed_origins)
    is_open = OPEN - {"metrics"} if service.config.protect_metrics else OPEN

    def allowed_origin() -> str | None:
        origin = request.headers.get("Origin")
        return origin if origin is not None and ("*" in origins or origin in origins) else None

    @app.before_request
    def guard() -> Response | None:
        request.environ[HANDLER] = request.url_rule.rule if request.url_rule is not None else NO_HANDLER
        is_preflight = request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers
        if is_preflight and allowed_origin() is not None:
            methods = {"Access-Control-Allow-Methods": "GET, POST, DELETE, OPTIONS", "Access-Control-Max-Age": "600"}
            return Response(status=204, headers={**methods, "Access-Control-Allow-Headers": ALLOWED_HEADERS})
        if digests and request.endpoint not in is_open and not _knows_a_key(digests):
            raise AuthenticationError("A valid API key is needed: Authorization: Bearer KEY.", code="invalid_api_key")
        return None

    @app.after_request
    def name_origin(response: Response) -> Response:
        origin = allowed_origin()
        if origin is not None:
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = EXPOSED_HEADERS
        if origins:
            response.headers.add("Vary", "Origin")
        return response

    @app.after_request
    def make_smaller(response: Response) -> Response:
        compress(response, request.headers.get("Accept-Encoding", ""))
        return response


def _knows_a_key(digests: list[bytes]) -> bool:
    """Takes equally long whatever was sent: all keys are compared, as hashes. Header bytes arrive as Latin-1."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    digest = hashlib.sha256(token.strip().encode("latin-1", "replace")).digest()
    matches = [hmac.compare_digest(digest, known) for known in digests]
    return scheme.lower() == "bearer" and any(matches)


# ------------------------------------------------------------------ errors
def _add_error_handlers(app: Flask, metrics: Metrics) -> None:
    @app.errorhandler(HTTPException)
    def refuse(error: HTTPException) -> Response:
        """What flask itself refuses: no such path, wrong method, body too long."""
        status = error.code or 500
        messages = {
            404: f"There is no {request.path[:200]} here.",
            405: f"{request.path[:200]} does not take {request.method}.",
            413: f"The body must have at most {app.config['MAX_CONTENT_LENGTH']} bytes.",
        }
        headers = {"Allow": ", ".join(sorted(error.valid_methods or ()))} if hasattr(error, "valid_methods") else {}
        message = messages.get(status, str(error.name))
        return json_response(error_body(message, status), headers, status)

    @app.errorhandler(UnsupportedMediaTypeError)
    def refuse_media_type(error: UnsupportedMediaTypeError) -> Response:
        headers = {"Accept-Encoding": "identity"}
        return json_response(error_body(str(error), error.status), headers, error.status)

    @app.errorhandler(ClientGoneError)
    def forget(error: ClientGoneError) -> Response:
        return Response(status=CLIENT_CLOSED_REQUEST)

    @app.errorhandler(Exception)
    def report(error: Exception) -> Response:
        if isinstance(error, OverloadedError):
            metrics.count_rejection()
        if not isinstance(error, MiniVLLMError):
            logging.getLogger(__name__).error("%s %s failed", request.method, request.path, exc_info=error)
        status, body, headers = describe_error(error)
        return json_response(body, headers, status)
