"""POST /v1/chat/completions: a conversation in, a message out, whole or as a stream.

Called by app.py. Twin in vLLM: vllm/entrypoints/openai/chat_completion/serving.py.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from flask import Response

from minivllm.entrypoints import logprobs, sse
from minivllm.entrypoints.answers import Envelope, json_response
from minivllm.entrypoints.generation import IsGone, Usage, collect, job_headers, renaming, start_job
from minivllm.entrypoints.output_format import field_of, from_body, naming
from minivllm.entrypoints.protocol import ChatRequest
from minivllm.entrypoints.service import Service
from minivllm.entrypoints.turn import (
    ContentDelta,
    Delta,
    Message,
    MessageReader,
    ReasoningDelta,
    Turn,
    begin_turn,
    read_message,
)
from minivllm.errors import InvalidRequestError
from minivllm.outputs import CompletionOutput, RequestOutput


def create_chat_completion(service: Service, body: ChatRequest, is_gone: IsGone) -> Response:
    """Raises ClientError, ServerError before anything is sent."""
    sse.check_stream_options(body.stream, body.stream_options)
    num_top = _num_top_logprobs(body)
    names = {"logprobs": "top_logprobs"}  # what the layers below call a field that has another name here
    if body.max_completion_tokens is not None:
        names["max_tokens"] = "max_completion_tokens"
    with renaming(names), naming(field_of(body) or ("tools" if body.tools else None)):
        turn = _begin_turn(service, body)
        max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        wanted = {**turn.sampling_fields, "max_tokens": max_tokens, "logprobs": num_top}
        job = start_job(service, body, [turn.prompt], "messages", is_gone, **wanted)
    headers = job_headers(job, body)
    writer = ChatWriter(service, body, turn, job.requests[0].prompt_token_ids, num_top or 0)
    if body.stream:
        return sse.stream_response(job, writer, body.stream_options, headers)
    usage = Usage(job, dict(enumerate(collect(job))))
    return json_response(writer.whole(usage), headers)


def _begin_turn(service: Service, body: ChatRequest) -> Turn:
    return begin_turn(
        service,
        body.messages,
        tools=[tool.model_dump(exclude_unset=True) for tool in body.tools or ()],
        tool_choice=body.tool_choice,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        structured_outputs=from_body(body),
        documents=body.documents,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        add_special_tokens=bool(body.add_special_tokens),
        chat_template_kwargs=body.chat_template_kwargs,
        may_be_cut=body.truncate_prompt_tokens is not None,
    )


def _num_top_logprobs(body: ChatRequest) -> int | None:
    """Chat says in two fields what SamplingParams says in one."""
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs: true.", parameter="top_logprobs")
    return None


class ChatWriter:
    """Turns outputs into chat bodies and chunks."""

    def __init__(
        self, service: Service, body: ChatRequest, turn: Turn, prompt_token_ids: list[int], num_top_logprobs: int
    ):
        self._tokenizer = service.engine.engine.tokenizer
        self._envelope = Envelope(service, "chatcmpl")
        self._prompt_token_ids = prompt_token_ids if body.return_token_ids else None
        self._with_token_ids = bool(body.return_token_ids)
        self._num_choices = body.n or 1
        self._num_top_logprobs = num_top_logprobs
        self._is_forced = turn.choice.kind in ("required", "named") and turn.thinking == "none"
        self._new_reader = turn.new_reader
        self._readers: defaultdict[int, MessageReader] = defaultdict(turn.new_reader)  # of choices that stream
        self._cursors: defaultdict[int, sse.Cursor] = defaultdict(sse.Cursor)

    # ------------------------------------------------------------------ whole
    def whole(self, usage: Usage) -> dict[str, Any]:
        """The body of an answer that is complete."""
        (output,) = usage.newest.values()
        return {
            **self._envelope.open("chat.completion"),
            "choices": [self._choice(completion) for completion in output.outputs],
            "service_tier": None,
            "system_fingerprint": None,
            "usage": usage.as_dict(),
            "prompt_logprobs": logprobs.prompt_logprobs(output.prompt_logprobs),
            "prompt_token_ids": self._prompt_token_ids,
        }

    def _choice(self, completion: CompletionOutput) -> dict[str, Any]:
        reader = self._new_reader()
        message = read_message(reader, completion.text)
        return {
            "index": completion.index,
            "message": _message_body(message),
            "logprobs": self._logprobs(completion),
            "finish_reason": finish_reason(reader, completion),
            "stop_reason": completion.stop_reason,
            "token_ids": completion.token_ids if self._with_token_ids else None,
        }

    def _logprobs(self, completion: CompletionOutput) -> dict[str, Any] | None:
        return logprobs.chat_logprobs(
            self._tokenizer, completion.token_ids, completion.logprobs, self._num_top_logprobs
        )

    # ------------------------------------------------------------------ in chunks
    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """The envelope around choices."""
        return {**self._envelope.open("chat.completion.chunk"), "choices": choices}

    def opening(self) -> list[dict[str, Any]]:
        """The role of every choice. An answer that must be a call has no text, not an empty one: SDK 6 shows that."""
        delta = {"role": "assistant", "content": None if self._is_forced else ""}
        return [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            for index in range(self._num_choices)
        ]

    def choices(self, prompt_index: int, output: RequestOutput) -> list[dict[str, Any]]:
        """What is new, with the reason where it ends. A step without text is silent, unless its tokens count."""
        found = []
        for completion in output.outputs:
            news = self._cursors[completion.index].advance(completion)
            if news is not None:
                found += self._chunk_choices(news)
        return found

    def _chunk_choices(self, news: CompletionOutput) -> list[dict[str, Any]]:
        """One choice for each thing that the new text says; logprobs, tokens and the end go with the last one."""
        is_last = news.finish_reason is not None
        reader = self._readers[news.index]
        deltas = [_delta_body(delta) for delta in reader.advance(news.text, is_last)]
        if not deltas:
            if not is_last and news.logprobs is None and not self._with_token_ids:
                return []
            deltas = [{} if is_last else {"content": ""}]
        elif is_last and "tool_calls" in deltas[-1]:
            deltas.append({})
        choices: list[dict[str, Any]]
        choices = [{"index": news.index, "delta": delta, "logprobs": None, "finish_reason": None} for delta in deltas]
        choices[-1]["logprobs"] = self._logprobs(news)
        if is_last:
            choices[-1]["finish_reason"] = finish_reason(reader, news)
            choices[-1]["stop_reason"] = news.stop_reason
        if self._with_token_ids:
            choices[-1]["token_ids"] = news.token_ids
        return choices


# ------------------------------------------------------------------ shapes
def finish_reason(reader: MessageReader, completion: CompletionOutput) -> str | None:
    """The engine's, unless the reader knows better why the answer stopped."""
    if completion.finish_reason == "stop" and reader.finish_reason is not None:
        return reader.finish_reason
    return completion.finish_reason


def _message_body(message: Message) -> dict[str, Any]:
    body: dict[str, Any] = {"role": "assistant", "content": message.content, "refusal": None, "annotations": None}
    body |= {"audio": None, "function_call": None, "reasoning": message.reasoning or None}
    if message.reasoning:
        body["reasoning_content"] = message.reasoning  # the older name
    if message.tool_calls or message.reasoning:
        body["content"] = message.content or None
    if message.tool_calls:
        body["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    return body


def _delta_body(delta: Delta) -> dict[str, Any]:
    if isinstance(delta, ContentDelta):
        return {"content": delta.text}
    if isinstance(delta, ReasoningDelta):
        return {"reasoning": delta.text, "reasoning_content": delta.text}
    call: dict[str, Any] = {"index": delta.index}
    if delta.id is not None:
        call |= {"id": delta.id, "type": "function"}
    function = (
        {"arguments": delta.arguments} if delta.name is None else {"name": delta.name, "arguments": delta.arguments}
    )
    return {"tool_calls": [{**call, "function": function}]}
