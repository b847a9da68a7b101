"""POST /v1/chat/completions: a conversation in, a message out, whole or as a stream.

Called by app.py. Twin in vLLM: vllm/entrypoints/openai/chat_completion/serving.py.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from flask import Response

from minivllm.entrypoints import logprobs, sse
from minivllm.entrypoints.answers import Envelope, json_response
from minivllm.entrypoints.generation import IsGone, Usage, clamped_header, collect, start_job
from minivllm.entrypoints.protocol import ChatRequest
from minivllm.entrypoints.service import Service
from minivllm.errors import InvalidRequestError
from minivllm.outputs import CompletionOutput, RequestOutput


def create_chat_completion(service: Service, body: ChatRequest, is_gone: IsGone) -> Response:
    """Raises ClientError, ServerError before anything is sent."""
    sse.check_stream_options(body.stream, body.stream_options)
    num_top = _num_top_logprobs(body)
    prompt = service.engine.engine.render_chat(
        body.messages,
        documents=body.documents,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        add_special_tokens=bool(body.add_special_tokens),
        chat_template_kwargs=body.chat_template_kwargs,
    )
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    job = start_job(service, body, [prompt], "messages", is_gone, max_tokens=max_tokens, logprobs=num_top)
    headers = clamped_header(job, body)
    writer = ChatWriter(service, body, job.requests[0].prompt_token_ids, num_top or 0)
    if body.stream:
        return sse.stream_response(job, writer, body.stream_options, headers)
    usage = Usage(job, dict(enumerate(collect(job))))
    return json_response(writer.whole(usage), headers)


def _num_top_logprobs(body: ChatRequest) -> int | None:
    """Chat says in two fields what SamplingParams says in one."""
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs: true.", parameter="top_logprobs")
    return None


class ChatWriter:
    """Turns outputs into chat bodies and chunks."""

    def __init__(self, service: Service, body: ChatRequest, prompt_token_ids: list[int], num_top_logprobs: int):
        self._tokenizer = service.engine.engine.tokenizer
        self._envelope = Envelope(service, "chatcmpl")
        self._prompt_token_ids = prompt_token_ids if body.return_token_ids else None
        self._with_token_ids = bool(body.return_token_ids)
        self._num_choices = body.n or 1
        self._num_top_logprobs = num_top_logprobs
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
        message = {"role": "assistant", "content": completion.text, "refusal": None, "annotations": None}
        return {
            "index": completion.index,
            "message": {**message, "audio": None, "function_call": None, "reasoning": None},
            "logprobs": self._logprobs(completion),
            "finish_reason": completion.finish_reason,
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
        """The role of every choice."""
        delta = {"role": "assistant", "content": ""}
        return [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            for index in range(self._num_choices)
        ]

    def choices(self, prompt_index: int, output: RequestOutput) -> list[dict[str, Any]]:
        """New text, with the reason where it ends. A step that brought none is silent, unless its tokens are wanted."""
        found = []
        for completion in output.outputs:
            news = self._cursors[completion.index].advance(completion)
            if news is None:
                continue
            silent = not news.text and news.logprobs is None and not self._with_token_ids
            if silent and news.finish_reason is None:
                continue
            choice = {
                "index": news.index,
                "delta": {"content": news.text} if news.text or news.finish_reason is None else {},
                "logprobs": self._logprobs(news),
                "finish_reason": news.finish_reason,
            }
            if news.finish_reason is not None:
                choice["stop_reason"] = news.stop_reason
            if self._with_token_ids:
                choice["token_ids"] = news.token_ids
            found.append(choice)
        return found
