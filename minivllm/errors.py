"""Every exception that minivllm raises on purpose.

    MiniVLLMError
    ├── ClientError(message, *, parameter=None, code=None)   the caller's fault: HTTP 4xx
    │   ├── InvalidRequestError      400   a parameter is wrong
    │   ├── ContextLengthError       400   the prompt does not fit (code context_length_exceeded)
    │   ├── ModelNotFoundError       404   no such model
    │   ├── AuthenticationError      401   no or wrong key
    │   └── OverloadedError          429   try again later (retry_after_seconds)
    └── ServerError                          ours: HTTP 5xx
        ├── EngineDeadError          503   the engine loop has ended
        └── ConfigError                    start-up only: names the flag, the value, the allowed range

Messages say what was expected, what came, and what to do. This module knows nothing of HTTP: the
numbers are for the layer that answers. Twin in vLLM: vllm/exceptions.py.
"""

from typing import Any


class MiniVLLMError(Exception):
    """Root of every deliberate exception."""


class ClientError(MiniVLLMError, ValueError):
    """The request is at fault. `parameter` names the field, `code` is a machine-readable reason."""

    status = 400

    def __init__(self, message: str, *, parameter: str | None = None, code: str | None = None):
        super().__init__(message)
        self.message = message
        self.parameter = parameter
        self.code = code


class InvalidRequestError(ClientError):
    """A parameter has a wrong type or is out of its range."""


class ContextLengthError(ClientError):
    """Prompt and requested output do not fit the model's context or the KV cache."""

    def __init__(self, message: str, *, parameter: str | None = "prompt", code: str | None = "context_length_exceeded"):
        super().__init__(message, parameter=parameter, code=code)


class ModelNotFoundError(ClientError):
    """The named model is neither a folder, nor a GGUF file, nor reachable by its id."""

    status = 404

    def __init__(self, message: str, *, parameter: str | None = "model", code: str | None = "model_not_found"):
        super().__init__(message, parameter=parameter, code=code)


class AuthenticationError(ClientError):
    """No key, or a wrong one."""

    status = 401


class OverloadedError(ClientError):
    """The queue is full; the caller should come back after `retry_after_seconds`."""

    status = 429

    def __init__(self, message: str, *, retry_after_seconds: int = 1):
        super().__init__(message, code="queue_full")
        self.retry_after_seconds = retry_after_seconds


class ServerError(MiniVLLMError, RuntimeError):
    """The engine is at fault."""

    status = 500


class EngineDeadError(ServerError):
    """The engine loop has ended; no request can be answered."""

    status = 503


class ConfigError(ServerError):
    """A start-up setting or a model folder cannot be used. Names the setting, its value, the allowed range."""

    def __init__(self, message: str, *, parameter: str | None = None):
        super().__init__(message)
        self.message = message
        self.parameter = parameter


def show(value: Any, max_chars: int = 200) -> str:
    """A value for a message: short, and never an exception (Python does not print an integer of 5000 digits)."""
    try:
        text = repr(value)
    except Exception:
        return f"an unprintable {type(value).__name__}"
    return text if len(text) <= max_chars else f"{text[:max_chars]}..."
