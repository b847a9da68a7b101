"""What the whole server shares: its settings, the engine behind it, whether it is going down, who is being answered.

Knows no HTTP. Made by app.py, ended by server.py, read by every endpoint. Twin in vLLM:
vllm/entrypoints/openai/engine/serving.py and vllm/entrypoints/launcher.py.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from minivllm.engine.async_engine import AsyncEngine
from minivllm.errors import ConfigError, EngineDeadError, ModelNotFoundError, ServerError

STUCK_SECONDS = 60.0  # work, and no step for so long: /health says so


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """The server's own settings; the engine has its own.

    served_model_names: what a request may call the model; answers carry the first. Empty: the model's own name.
    api_keys: any of them opens the server; none: it is open to all.
    allowed_origins: web pages from there may call; "*" is all of them, () switches CORS off.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_names: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    max_body_bytes: int = 2**20
    shutdown_timeout_seconds: float = 30.0
    keep_alive_seconds: float = 10.0  # a comment in a stream that has nothing else to say
    poll_seconds: float = 0.2  # how often a waiting thread looks whether its client is still there

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be in [0, 65535], got {self.port}.", parameter="port")
        if self.max_body_bytes < 1024:
            raise ConfigError(
                f"max_body_bytes must be at least 1024, got {self.max_body_bytes}.", parameter="max_body_bytes"
            )
        if not self.shutdown_timeout_seconds >= 0:
            raise ConfigError(
                f"shutdown_timeout must be 0 or more seconds, got {self.shutdown_timeout_seconds}.",
                parameter="shutdown_timeout",
            )
        if not all(self.api_keys):
            raise ConfigError("api_key must not be empty: leave it out to run without keys.", parameter="api_key")


class Service:
    """One engine being served.

    Attributes:
        draining: no new work is taken.
        aborting: what still runs is to end now.
    """

    def __init__(self, engine: AsyncEngine, config: ServerConfig):
        self.engine = engine
        self.config = config
        self.started_at = int(time.time())
        self.draining = threading.Event()
        self.aborting = threading.Event()
        self._lock = threading.Lock()
        self._num_in_flight = 0

    @property
    def model_names(self) -> tuple[str, ...]:
        return self.config.served_model_names or (self.engine.engine.config.model.name,)

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

    def check_model(self, name: str | None) -> None:
        """Raise ModelNotFoundError unless the name is served; no name means the model that is there."""
        if name and name not in self.model_names:
            raise ModelNotFoundError(f"The model {name[:200]!r} does not exist; served: {', '.join(self.model_names)}.")

    def check_healthy(self) -> None:
        """Raise ServerError when the engine has ended or hangs."""
        if not self.engine.is_alive:
            raise EngineDeadError("The engine has ended; this server must be started again.")
        if self.engine.seconds_without_progress > STUCK_SECONDS:
            raise EngineDeadError(f"The engine has work and made no step for {STUCK_SECONDS:.0f} s.")

    def check_accepting(self) -> None:
        """Raise ServerError or OverloadedError when new work cannot be taken."""
        if self.draining.is_set():
            raise ShuttingDownError("The server is shutting down.")
        if not self.engine.is_alive:
            raise EngineDeadError("The engine has ended; this server must be started again.")
        self.engine.check_room()


class ShuttingDownError(ServerError):
    """Come back later, or to another server."""

    status = 503


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""
