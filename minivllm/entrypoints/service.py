"""What the whole server shares: its settings, the engine behind it, whether it is going down, who is being answered.

Knows no HTTP. Made by app.py, ended by server.py, read by every endpoint. Twin in vLLM:
vllm/entrypoints/openai/engine/serving.py and vllm/entrypoints/launcher.py.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from minivllm.engine.async_engine import AsyncEngine
from minivllm.entrypoints.reasoning import REASONING_PARSERS
from minivllm.entrypoints.response_store import ResponseStore
from minivllm.entrypoints.tool_calls import TOOL_CALL_PARSERS
from minivllm.errors import ConfigError, EngineDeadError, InvalidRequestError, ModelNotFoundError, ServerError
from minivllm.sampling_params import MAX_LOGPROBS, SamplingParams

STUCK_SECONDS = 60.0  # work, and no step for so long: /health says so


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """The server's own settings; the engine has its own.

    served_model_names: what a request may call the model; answers carry the first. Empty: the model's own name.
    served_embedding_model_names: the same for the embedding model beside it.
    api_keys: any of them opens the server; none: it is open to all.
    allowed_origins: web pages from there may call; "*" is all of them, () switches CORS off.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_names: tuple[str, ...] = ()
    served_embedding_model_names: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    max_body_bytes: int = 2**20
    tool_call_parser: str = "auto"  # how the model writes tool calls; auto: as its chat template shows
    reasoning_parser: str = "auto"  # whether it thinks first
    max_logprobs: int = MAX_LOGPROBS  # alternatives per token that a request may ask for
    max_stored_responses: int = 1024  # of /v1/responses; 0: none is remembered
    max_stored_bytes: int = 64 * 2**20
    shutdown_timeout_seconds: float = 30.0
    keep_alive_seconds: float = 10.0  # a comment in a stream that has nothing else to say
    client_timeout_seconds: float = 30.0  # for a request to arrive whole, and for a write to find its reader
    protect_metrics: bool = False  # /metrics needs a key as well
    log_requests: bool = False  # bodies go into the log
    poll_seconds: float = 0.2  # how often a waiting thread looks whether its client is still there
    max_watchers: int = 8  # of /v1/engine/events
    state_interval_seconds: float = 0.1  # between two states that watchers see

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be in [0, 65535], got {self.port}.", parameter="port")
        if self.max_body_bytes < 1024:
            raise ConfigError(
                f"max_body_bytes must be at least 1024, got {self.max_body_bytes}.", parameter="max_body_bytes"
            )
        for name, known in (("tool_call_parser", TOOL_CALL_PARSERS), ("reasoning_parser", REASONING_PARSERS)):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"{name} must be one of {', '.join(sorted(known))}, got {getattr(self, name)!r}.", parameter=name
                )
        if not 0 <= self.max_logprobs <= MAX_LOGPROBS:
            raise ConfigError(
                f"max_logprobs must be in [0, {MAX_LOGPROBS}], got {self.max_logprobs}.", parameter="max_logprobs"
            )
        for name in ("max_stored_responses", "max_stored_bytes"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be 0 or more, got {getattr(self, name)}.", parameter=name)
        if not self.shutdown_timeout_seconds >= 0:
            raise ConfigError(
                f"shutdown_timeout must be 0 or more seconds, got {self.shutdown_timeout_seconds}.",
                parameter="shutdown_timeout",
            )
        if not self.client_timeout_seconds > 0:
            raise ConfigError(
                f"client_timeout must be more than 0 seconds, got {self.client_timeout_seconds}.",
                parameter="client_timeout",
            )
        if not all(self.api_keys):
            raise ConfigError("api_key must not be empty: leave it out to run without keys.", parameter="api_key")


class Service:
    """One engine being served, and perhaps a second one beside it that only gives vectors.

    Attributes:
        embedding_engine: who embeds where a request names nobody; without a second model the same engine.
        draining: no new work is taken.
        aborting: what still runs is to end now.
        responses: what /v1/responses remembers.
    """

    def __init__(self, engine: AsyncEngine, config: ServerConfig, embedding_engine: AsyncEngine | None = None):
        self.engine = engine
        self.embedding_engine = embedding_engine or engine
        self.config = config
        self._check_names()
        self.started_at = int(time.time())
        self.responses = ResponseStore(config.max_stored_responses, config.max_stored_bytes)
        self.draining = threading.Event()
        self.aborting = threading.Event()
        self._lock = threading.Lock()
        self._num_in_flight = 0

    @property
    def model_names(self) -> tuple[str, ...]:
        return self.config.served_model_names or (self.engine.engine.config.model.name,)

    @property
    def embedding_model_names(self) -> tuple[str, ...]:
        """Of the model beside; () when there is none."""
        if self.embedding_engine is self.engine:
            return ()
        return self.config.served_embedding_model_names or (self.embedding_engine.engine.config.model.name,)

    @property
    def engines(self) -> tuple[AsyncEngine, ...]:
        return (self.engine,) if self.embedding_engine is self.engine else (self.engine, self.embedding_engine)

    @property
    def is_alive(self) -> bool:
        return all(engine.is_alive for engine in self.engines)

    def _check_names(self) -> None:
        parameter = "served_embedding_model_names"
        if self.config.served_embedding_model_names and not self.embedding_model_names:
            raise ConfigError(f"{parameter} must be empty: there is no embedding model.", parameter=parameter)
        both = sorted(set(self.model_names) & set(self.embedding_model_names))
        if both:
            raise ConfigError(
                f"{parameter} must differ from served_model_names: {both[0]!r} is the name of both.",
                parameter=parameter,
            )

    @property
    def num_in_flight(self) -> int:
        """Answers that are not complete."""
        return self._num_in_flight

    def enter(self) -> None:
        with self._lock:
            self._num_in_flight += 1

    def leave(self) -> None:
        with self._lock:
            self._num_in_flight -= 1

    def check_model(self, name: str | None, *, generates: bool = False) -> None:
        """Raise ModelNotFoundError unless the name is served; no name means the model that is there.

        generates: text is wanted. Raises InvalidRequestError for the name of the embedding model beside.
        """
        names = (*self.model_names, *self.embedding_model_names)
        if name and name not in names:
            raise ModelNotFoundError(f"The model {name[:200]!r} does not exist; served: {', '.join(names)}.")
        if generates and name in self.embedding_model_names:
            raise InvalidRequestError(
                f"The model {name!r} gives embeddings and generates no text; {', '.join(self.model_names)} does.",
                parameter="model",
            )

    def engine_named(self, name: str | None, *, embeds: bool = False) -> AsyncEngine:
        """Who answers. embeds: vectors are wanted, which without a name are the embedding model's."""
        if name in self.embedding_model_names or (embeds and not name):
            return self.embedding_engine
        return self.engine

    def names_of(self, engine: AsyncEngine) -> tuple[str, ...]:
        return self.model_names if engine is self.engine else self.embedding_model_names

    def check_logprobs(self, params: SamplingParams) -> None:
        """Raise InvalidRequestError when more alternatives are asked for than this server gives."""
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(params, name) or 0) > self.config.max_logprobs:
                raise InvalidRequestError(
                    f"{name} must be at most {self.config.max_logprobs} on this server, got {getattr(params, name)}.",
                    parameter=name,
                )

    def check_healthy(self) -> None:
        """Raise ServerError when the engine has ended or hangs."""
        if not self.is_alive:
            raise EngineDeadError("The engine has ended; this server must be started again.")
        if any(engine.seconds_without_progress > STUCK_SECONDS for engine in self.engines):
            raise EngineDeadError(f"The engine has work and made no step for {STUCK_SECONDS:.0f} s.")

    def check_accepting(self, *engines: AsyncEngine) -> None:
        """Raise ServerError or OverloadedError when new work cannot be taken. engines: by these; else by all."""
        if self.draining.is_set():
            raise ShuttingDownError("The server is shutting down.")
        if not self.is_alive:
            raise EngineDeadError("The engine has ended; this server must be started again.")
        for engine in engines or self.engines:
            engine.check_room()


class LoadingError(ServerError):
    """Come back when the model is there."""

    status = 503


class ShuttingDownError(ServerError):
    """Come back later, or to another server."""

    status = 503


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""
