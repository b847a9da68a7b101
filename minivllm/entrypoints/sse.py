"""Event streams: what is new in a growing answer, as `data: {json}` lines, ended by `data: [DONE]`.

The first bytes leave at once, so that the client has its headers while the request waits; `: keep-alive` comments
follow while there is nothing to say. An error after that is an event, as there is no status left to set.

Called by chat.py, completions.py and responses.py. Twin in vLLM: the generators of
vllm/entrypoints/openai/engine/serving.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from flask import Response

from minivllm.entrypoints.generation import AnyJob, Usage
from minivllm.entrypoints.protocol import StreamOptions, describe_error, to_json
from minivllm.entrypoints.service import ClientGoneError
from minivllm.errors import InvalidRequestError, MiniVLLMError
from minivllm.outputs import CompletionOutput, RequestOutput

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


class Writer(Protocol):
    """Knows the chunks of one endpoint."""

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """The envelope around choices."""

    def opening(self) -> list[dict[str, Any]]:
        """Choices that come before the engine has said anything."""

    def choices(self, prompt_index: int, output: RequestOutput) -> list[dict[str, Any]]:
        """What is new in an output."""


def frame(value: Any, name: str | None = None) -> bytes:
    """name: of the event, where events have one."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + to_json(value) + b"\n\n"


def check_stream_options(stream: bool | None, options: StreamOptions | None) -> None:
    """Raise InvalidRequestError where options could have no effect."""
    if options is None:
        return
    if not stream:
        raise InvalidRequestError("stream_options needs stream: true.", parameter="stream_options")
    if options.continuous_usage_stats and not options.include_usage:
        raise InvalidRequestError("continuous_usage_stats needs include_usage.", parameter="stream_options")


def stream_response(job: AnyJob, writer: Writer, options: StreamOptions | None, headers: dict[str, str]) -> Response:
    """Status and headers now, the answer as it comes."""
    return event_stream(events(job, writer, options or StreamOptions()), job.close, headers)


def event_stream(frames: Iterator[bytes], on_close: Callable[[], None], headers: dict[str, str]) -> Response:
    """on_close: called however it ends, also when nobody ever reads the first event."""
    response = Response(frames, mimetype="text/event-stream")
    response.headers.update({"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
    response.call_on_close(on_close)
    return response


def events(job: AnyJob, writer: Writer, options: StreamOptions) -> Iterator[bytes]:
    """Opening, deltas, the usage chunk on request, [DONE]; an error event in place of what is missing."""
    usage = Usage(job)

    def framed(choices: list[dict[str, Any]]) -> bytes:
        chunk = writer.chunk(choices)
        if options.include_usage and (options.continuous_usage_stats or not choices):
            chunk["usage"] = usage.as_dict()
        return frame(chunk)

    try:
        opening = writer.opening()
        yield b"".join(framed([choice]) for choice in opening) or KEEP_ALIVE
        for item in job.outputs():
            if item is None:
                yield KEEP_ALIVE
                continue
            usage.newest[item[0]] = item[1]
            news = writer.choices(*item)
            if news:  # of all choices in one write: a step is one packet
                yield b"".join(framed([choice]) for choice in news)
        if options.include_usage:
            yield framed([])
    except ClientGoneError:
        return
    except Exception as error:
        if not isinstance(error, MiniVLLMError):
            logging.getLogger(__name__).exception("a stream failed")
        yield frame(describe_error(error)[1])
    yield DONE


class Cursor:
    """How much of one choice was sent."""

    def __init__(self) -> None:
        self._num_chars = self._num_tokens = 0
        self._ended = False

    def advance(self, completion: CompletionOutput) -> CompletionOutput | None:
        """What is new, or None."""
        if self._ended or (len(completion.token_ids) == self._num_tokens and completion.finish_reason is None):
            return None
        news = CompletionOutput(
            index=completion.index,
            text=completion.text[self._num_chars :],
            token_ids=completion.token_ids[self._num_tokens :],
            logprobs=None if completion.logprobs is None else completion.logprobs[self._num_tokens :],
            finish_reason=completion.finish_reason,
            stop_reason=completion.stop_reason,
        )
        self._num_chars, self._num_tokens = len(completion.text), len(completion.token_ids)
        self._ended = completion.finish_reason is not None
        return news
