"""/v1/responses: items in, items out, whole or as a stream of named events; and what is remembered of them.

    POST ── expand ── to_messages ── begin_turn ── start_job ──▶ Answer ──▶ body, or events
                └──────────── ResponseStore ◀──────────────────────┘
    GET, DELETE, cancel ── ResponseStore

What a client saw of a stream is remembered also when it left in the middle: its next call may refer to these items.
An answer with store: false is not remembered at all.

Called by app.py. Twin in vLLM: vllm/entrypoints/openai/responses/serving.py.
"""

from __future__ import annotations

import bisect
import contextlib
import logging
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from flask import Response

from minivllm.entrypoints import sse
from minivllm.entrypoints.answers import json_response
from minivllm.entrypoints.generation import AnyJob, IsGone, job_headers, renaming, start_job
from minivllm.entrypoints.output_format import field_of, from_body, from_text_format, naming
from minivllm.entrypoints.protocol import GenerationBody, ResponsesRequest
from minivllm.entrypoints.response_input import (
    expand,
    num_turns,
    to_chat_tool_choice,
    to_chat_tools,
    to_messages,
    without_turns,
)
from minivllm.entrypoints.response_object import Answer
from minivllm.entrypoints.response_output import Event
from minivllm.entrypoints.response_store import StoredResponse
from minivllm.entrypoints.service import ClientGoneError, Service
from minivllm.entrypoints.turn import Turn, begin_turn
from minivllm.errors import ClientError, ContextLengthError, InvalidRequestError, MiniVLLMError, show
from minivllm.sampling_params import StructuredOutputsParams

LOGPROBS = "message.output_text.logprobs"
INCLUDABLE = (LOGPROBS, "reasoning.encrypted_content")  # the second has no effect: thinking is never encrypted here
# Of GET: all that can be included is in an answer from the start, and nothing is ever padded.
KNOWN_QUERY = frozenset({"stream", "starting_after", "include", "include[]", "include_obfuscation"})
MAX_PAIRS, MAX_KEY_CHARS, MAX_VALUE_CHARS = 16, 64, 512  # of metadata
# What the layers below call a field that has another name here.
NAMES: Mapping[str, str] = MappingProxyType(
    {"messages": "input", "max_tokens": "max_output_tokens", "logprobs": "top_logprobs"}
)


# ------------------------------------------------------------------ POST
def create_response(service: Service, body: ResponsesRequest, is_gone: IsGone) -> Response:
    """Raises ClientError, ServerError before anything is sent."""
    _check(body)
    generation, num_top = body.as_generation(), _num_top_logprobs(body)
    items, num_earlier = expand(body.input, body.previous_response_id, service.responses)
    messages = to_messages(items, body.instructions, num_earlier)
    with _renaming():
        num_dropped = _num_turns_to_drop(service, body, generation, messages) if body.truncation == "auto" else 0
        turn, job = _begin(service, body, generation, without_turns(messages, num_dropped), is_gone)
    answer = Answer(service, body, turn, job, num_top)
    stored = StoredResponse(answer.id, tuple(items), answer.read, answer.cancel)
    headers = job_headers(job, generation)
    if num_dropped:
        headers["X-Minivllm-Truncated"] = f"turns={num_dropped}"
    if body.stream:
        return _stream(service, job, answer, stored if body.store is not False else None, headers)
    with contextlib.closing(job):
        for item in job.outputs():
            if item is not None:
                answer.advance(item[1])
    if body.store is not False:
        service.responses.put(stored.settled())
    return json_response(answer.read(), headers)


def _begin(
    service: Service, body: ResponsesRequest, generation: GenerationBody, messages: list[Any], is_gone: IsGone
) -> tuple[Turn, AnyJob]:
    """Queue it."""
    name, form = _form(body, generation)
    with naming(name or ("tools" if body.tools else None)):
        turn = _begin_turn(service, body, form, messages)
        wanted = {**turn.sampling_fields, "logprobs": _num_top_logprobs(body)}
        return turn, start_job(service, generation, [turn.prompt], "input", is_gone, **wanted)


def _begin_turn(
    service: Service, body: ResponsesRequest, form: StructuredOutputsParams | None, messages: list[Any]
) -> Turn:
    return begin_turn(
        service,
        messages,
        tools=to_chat_tools(body.tools),
        tool_choice=to_chat_tool_choice(body.tool_choice),
        parallel_tool_calls=body.parallel_tool_calls is not False,
        structured_outputs=form,
        chat_template_kwargs=body.chat_template_kwargs,
    )


def _num_turns_to_drop(
    service: Service, body: ResponsesRequest, generation: GenerationBody, messages: list[Any]
) -> int:
    """truncation: auto. As few of the oldest turns as make the rest fit; all but the newest when nothing fits."""
    form = _form(body, generation)[1]

    def fits(num_dropped: int) -> bool:
        try:
            turn = _begin_turn(service, body, form, without_turns(messages, num_dropped))
            return service.engine.engine.tokenize_prompt(turn.prompt)[1] > 0
        except ContextLengthError:
            return False

    return bisect.bisect_left(range(max(num_turns(messages) - 1, 0)), True, key=fits)


@contextlib.contextmanager
def _renaming() -> Iterator[None]:
    """Errors of the layers below speak of the fields of this endpoint."""
    try:
        with renaming(NAMES):
            yield
    except ClientError as error:
        if error.parameter == "tools":
            error.message = error.message.replace("].function.", "].")  # tools are flat here
        raise


def _form(body: ResponsesRequest, generation: GenerationBody) -> tuple[str | None, StructuredOutputsParams | None]:
    """The form of the answer, and the field that asks for it."""
    name, text_format = field_of(generation), body.text.format if body.text is not None else None
    form = from_text_format(text_format) if text_format is not None else None
    if form is None:
        return name, from_body(generation)
    if name is not None:
        raise InvalidRequestError(
            f"text.format and {name} exclude each other: the answer can have only one form. Leave one out.",
            parameter=name,
        )
    return "text.format", form


def _check(body: ResponsesRequest) -> None:
    """What neither the types nor the sampler check."""
    if body.stream_options is not None and not body.stream:
        raise InvalidRequestError("stream_options needs stream: true.", parameter="stream_options")
    if body.max_output_tokens is not None and body.max_output_tokens < 1:
        raise InvalidRequestError(
            f"max_output_tokens must be at least 1, got {show(body.max_output_tokens, 60)}.",
            parameter="max_output_tokens",
        )
    metadata = body.metadata or {}
    if len(metadata) > MAX_PAIRS or any(
        len(key) > MAX_KEY_CHARS or len(value) > MAX_VALUE_CHARS for key, value in metadata.items()
    ):
        raise InvalidRequestError(
            f"metadata must have at most {MAX_PAIRS} keys of {MAX_KEY_CHARS} characters with values of "
            f"{MAX_VALUE_CHARS}.",
            parameter="metadata",
        )


def _num_top_logprobs(body: ResponsesRequest) -> int | None:
    """Two fields here, one in SamplingParams. None: no logprobs."""
    for name in body.include or ():
        if name not in INCLUDABLE:
            raise InvalidRequestError(
                f"include may hold {' and '.join(INCLUDABLE)}, got {show(name, 60)}.", parameter="include"
            )
    if LOGPROBS in (body.include or ()):
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise InvalidRequestError(f'top_logprobs needs include: ["{LOGPROBS}"].', parameter="top_logprobs")
    return None


# ------------------------------------------------------------------ the stream
def _stream(
    service: Service, job: AnyJob, answer: Answer, stored: StoredResponse | None, headers: dict[str, str]
) -> Response:
    """Status and headers now, events as they come. stored: None when it is not to be remembered."""
    if stored is not None:
        service.responses.put(stored)

    def end() -> None:
        """However it ends, also when nobody ever reads the first event."""
        answer.cancel()
        if stored is not None:
            service.responses.refresh(stored.settled())

    return sse.event_stream(_events(service, job, answer, stored), end, headers)


def _events(service: Service, job: AnyJob, answer: Answer, stored: StoredResponse | None) -> Iterator[bytes]:
    """Every event has the name that is in it; the last one tells how it ended."""
    yield _framed(answer.opening())
    try:
        for item in job.outputs():
            if item is None:
                yield sse.KEEP_ALIVE
                continue
            events = answer.advance(item[1])
            if stored is not None and any(event["type"] == "response.output_item.added" for event in events):
                service.responses.refresh(stored)
            if events:
                yield _framed(events)
    except ClientGoneError:
        return
    except Exception as error:
        if not isinstance(error, MiniVLLMError):
            logging.getLogger(__name__).exception("a stream failed")
        answer.fail(error)
    yield _framed(answer.closing()) + sse.DONE


def _framed(events: list[Event]) -> bytes:
    return b"".join(sse.frame(event, event["type"]) for event in events)


# ------------------------------------------------------------------ what is remembered
def get_response(service: Service, response_id: str, query: Mapping[str, str]) -> Response:
    """As it is now, whether it still runs or not. Raises ClientError."""
    for name in ("stream", "starting_after"):
        if query.get(name, "false").lower() not in ("false", "0"):
            raise InvalidRequestError(
                f"{name} is not supported here: events are sent once, to the caller that asked for the answer. "
                "Leave it out to get the answer as it is now.",
                parameter=name,
            )
    response = service.responses.get(response_id, "response_id").read()
    unknown = sorted(set(query) - KNOWN_QUERY)
    headers = {"X-Minivllm-Ignored": ", ".join(re.sub(r"[^\w.-]", "?", name)[:64] for name in unknown[:16])}
    return json_response(response, headers if unknown else None)


def delete_response(service: Service, response_id: str) -> Response:
    """Forget it. If it still runs, its reader gets the rest all the same. Raises ClientError."""
    service.responses.delete(response_id, "response_id")
    return json_response({"id": response_id, "object": "response", "deleted": True})


def cancel_response(service: Service, response_id: str) -> Response:
    """End a stream from outside; a second time is as good as once. Raises ClientError."""
    stored = service.responses.get(response_id, "response_id")
    stored.cancel()
    response = stored.read()
    if response["status"] != "cancelled":
        raise InvalidRequestError(
            f"The response has ended, it is {response['status']}: only a running one can be cancelled.",
            parameter="response_id",
        )
    return json_response(response)
