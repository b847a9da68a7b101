"""A client for any server that speaks OpenAI's API: its models, and answers as they are written.

    client = OpenAIClient("http://127.0.0.1:8000/v1")
    client.models()                                   # ["SmolLM2-135M-Instruct"]
    for piece in client.chat(messages, model=name):   # Piece(text="Hel"), Piece(text="lo"), ...

Standard library only: whoever talks to a server needs neither torch nor an SDK. Closing the iterator, also by Ctrl-C,
closes the connection, and the server stops computing. No proxy, no redirect, no second try: what fails is said.
Knows no terminal. Called by cli/remote.py, verify/remote.py. Twin in vLLM: vllm/entrypoints/cli/openai.py (over the
openai package).
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from minivllm.errors import InvalidRequestError, MiniVLLMError, show

DEFAULT_TIMEOUT_SECONDS = 600.0  # without a byte: a long prompt on a slow machine is silent for minutes
MAX_ERROR_BYTES = 64 * 1024
MAX_LINE_BYTES = 2**20


class RemoteError(MiniVLLMError):
    """The server cannot be reached, refuses, or breaks off. `status`: of its answer, None when there was none."""

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


class Piece(NamedTuple):
    """What one event adds to the answer."""

    text: str = ""
    reasoning: str = ""
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    usage: dict[str, Any] | None = None


class OpenAIClient:
    """Args:
    url: with or without its /v1; a path of its own is kept.
    api_key: sent as a bearer token.
    """

    def __init__(self, url: str, api_key: str | None = None, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS):
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            self._port, self._host = parts.port, parts.hostname
        except ValueError:
            self._host = None
        if parts.scheme not in ("http", "https") or not self._host or parts.username is not None:
            raise InvalidRequestError(f"url must be like http://127.0.0.1:8000/v1, got {show(url)}.", parameter="url")
        self._is_https = parts.scheme == "https"
        self._path = parts.path.rstrip("/") or "/v1"
        self.url = f"{parts.scheme}://{parts.netloc}{self._path}"
        self._headers = {"Content-Type": "application/json", "Accept": "text/event-stream, application/json"}
        if api_key:
            if not api_key.isascii() or not api_key.isprintable():
                raise InvalidRequestError("api_key must be printable ASCII.", parameter="api_key")
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout_seconds = timeout_seconds

    # ------------------------------------------------------------------ calls
    def models(self) -> list[str]:
        """Ids of what is served, in the server's order. Raises RemoteError."""
        with self._answer("GET", "/models") as response:
            try:
                return [str(entry["id"]) for entry in json.loads(response.read())["data"]]
            except (ValueError, TypeError, KeyError, RecursionError):
                raise RemoteError(f"{self.url}/models answers, but not as OpenAI's API does.") from None

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """One answer as a whole, from a path behind /v1 such as "/completions". Raises RemoteError."""
        with self._answer("POST", path, body) as response:
            try:
                found = json.loads(response.read())
            except (ValueError, RecursionError):
                found = None
        if not isinstance(found, dict):
            raise RemoteError(f"{self.url}{path} answers, but not with a JSON object.")
        return found

    def chat(self, messages: list[dict[str, Any]], *, model: str, **fields: Any) -> Iterator[Piece]:
        """The answer to a conversation, piece by piece. fields: of the request's body. Raises RemoteError."""
        return self._stream("/chat/completions", {"model": model, "messages": messages, **fields})

    def complete(self, prompt: str, *, model: str, **fields: Any) -> Iterator[Piece]:
        """The continuation of a text, piece by piece. Raises RemoteError."""
        return self._stream("/completions", {"model": model, "prompt": prompt, **fields})

    # ------------------------------------------------------------------ the wire
    def _stream(self, path: str, body: dict[str, Any]) -> Iterator[Piece]:
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        has_ended = False
        with self._answer("POST", path, body) as response:
            for event in _events(response):
                if event == "[DONE]":
                    has_ended = True
                    break
                piece = _piece_of(event)
                has_ended = has_ended or piece.finish_reason is not None
                yield piece
        if not has_ended:
            raise RemoteError(f"{self.url} ended the answer in the middle.")

    @contextmanager
    def _answer(self, method: str, path: str, body: Any = None) -> Iterator[http.client.HTTPResponse]:
        """A successful answer; the connection is closed behind it. Raises RemoteError."""
        kind = http.client.HTTPSConnection if self._is_https else http.client.HTTPConnection
        connection = kind(self._host or "", self._port, timeout=self._timeout_seconds)
        try:
            payload = None if body is None else json.dumps(body).encode()
            connection.request(method, self._path + path, payload, self._headers)
            with connection.getresponse() as response:  # it has the socket when the server is going to close it
                if response.status != 200:
                    raise _refusal(response)
                yield response
        except ConnectionRefusedError:
            raise RemoteError(
                f"nothing listens at {self.url}: start a server there (`minivllm serve`), or give its --url."
            ) from None
        except TimeoutError:
            raise RemoteError(f"{self.url} was silent for {self._timeout_seconds:.0f} s.") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise RemoteError(f"{self.url} cannot be asked: {reason}.") from None
        finally:
            connection.close()


def _refusal(response: http.client.HTTPResponse) -> RemoteError:
    """What the server says about its refusal, in whichever of the common shapes."""
    text = response.read(MAX_ERROR_BYTES).decode("utf-8", "replace")
    return RemoteError(f"the server says {response.status}: {_message_of(text) or response.reason}", response.status)


def _message_of(text: str) -> str:
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return " ".join(text.split())[:300]
    for name in ("error", "message", "detail"):
        if isinstance(body, dict) and name in body:
            body = body[name]
    return str(body)[:2000]


def _events(response: http.client.HTTPResponse) -> Iterator[str]:
    """The data of each event of a stream; comments and other fields are passed over."""
    lines: list[str] = []
    while line := response.readline(MAX_LINE_BYTES):
        text = line.decode("utf-8", "replace").rstrip("\r\n")
        if text.startswith("data:"):
            lines.append(text[5:].removeprefix(" "))
        elif not text and lines:
            yield "\n".join(lines)
            lines = []
    if lines:
        yield "\n".join(lines)


def _piece_of(event: str) -> Piece:
    """Raises RemoteError for an error event, and for one that is no JSON object."""
    try:
        data = json.loads(event)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise RemoteError(f"the server sent an event that is no JSON object: {show(event, 100)}")
    if "error" in data:
        raise RemoteError(f"the server broke off: {_message_of(event)}")
    choices = data.get("choices") or [{}]
    choice = choices[0]
    delta = choice.get("delta") or choice
    return Piece(
        text=delta.get("content") or delta.get("text") or "",
        reasoning=delta.get("reasoning_content") or delta.get("reasoning") or "",
        finish_reason=choice.get("finish_reason"),
        stop_reason=choice.get("stop_reason"),
        usage=data.get("usage"),
    )
