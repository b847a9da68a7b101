"""One answer of the Responses API, from its first event to its last, and as a whole at any time.

    in_progress ──▶ completed                 the model ended it
                ├─▶ incomplete                max_output_tokens, or the context was full
                ├─▶ cancelled                 somebody asked for that, or nobody listens any more
                └─▶ failed                    the engine could not go on

The first end is the only one. A stream and a body are made from the same steps, so they never differ. All methods may
be called from any thread: one thread feeds an answer while others read or cancel it.

Knows no HTTP. Called by responses.py. Twin in vLLM: ResponsesResponse in
vllm/entrypoints/openai/responses/protocol.py.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from minivllm.entrypoints.deltas import ContentDelta
from minivllm.entrypoints.generation import AnyJob, Usage
from minivllm.entrypoints.logprobs import chat_logprobs
from minivllm.entrypoints.protocol import ResponsesRequest, describe_error
from minivllm.entrypoints.response_output import Event, Logprobs, Output, new_id
from minivllm.entrypoints.service import Service
from minivllm.entrypoints.sse import Cursor
from minivllm.entrypoints.turn import Turn
from minivllm.outputs import CompletionOutput, RequestOutput

CANCELLED_CODE = "499"  # clients take three digits for the status that the call would have had; this one is not retried


class Answer:
    """An answer that grows.

    num_top_logprobs: None without logprobs.
    """

    def __init__(self, service: Service, body: ResponsesRequest, turn: Turn, job: AnyJob, num_top_logprobs: int | None):
        self.id = new_id("resp")
        self._engine = service.engine.engine
        self._job = job
        self._reader = turn.new_reader()
        self._cursor = Cursor()
        self._num_top_logprobs = num_top_logprobs or 0
        self._lock = threading.RLock()
        self._num_events = 0
        self._output = Output()
        self._waiting_logprobs: Logprobs = []  # of tokens that have not come out as text yet
        self._usage = Usage(job)
        self._status = "in_progress"
        self._incomplete_details: dict[str, Any] | None = None
        self._completed_at: int | None = None
        self._error: dict[str, Any] | None = None  # the error body
        self._request = _echo(service, body, job, self._num_top_logprobs)
        self._created_at = int(time.time())

    # ------------------------------------------------------------------ as a whole
    @property
    def is_running(self) -> bool:
        return self._status == "in_progress"

    def read(self) -> dict[str, Any]:
        """The body, as it is now."""
        with self._lock:
            error = self._error and {"code": "server_error", "message": self._error["message"]}
            return {
                "id": self.id,
                "object": "response",
                "created_at": self._created_at,
                "completed_at": self._completed_at,
                "status": self._status,
                "error": error,
                "incomplete_details": self._incomplete_details,
                "output": self._output.as_list(),
                "usage": None if self.is_running else self._usage_body(),
                **self._request,
            }

    def _usage_body(self) -> dict[str, Any]:
        usage = self._usage.as_dict()
        num_input, num_output = usage["prompt_tokens"], usage["completion_tokens"]
        num_cached = usage["prompt_tokens_details"]["cached_tokens"]
        cache = self._engine.config.cache
        num_cacheable = num_input // cache.block_size * cache.block_size if cache.enable_prefix_caching else 0
        thought = self._output.reasoning
        tokenizer = self._engine.tokenizer
        num_thought = len(tokenizer.encode(thought, False)) if thought and tokenizer else 0
        return {
            "input_tokens": num_input,
            "input_tokens_details": {
                "cached_tokens": num_cached,
                "cache_write_tokens": max(num_cacheable - num_cached, 0) if self._usage.newest else 0,
            },
            "output_tokens": num_output,
            "output_tokens_details": {"reasoning_tokens": min(num_thought, num_output)},
            "total_tokens": usage["total_tokens"],
        }

    # ------------------------------------------------------------------ in events
    def opening(self) -> list[Event]:
        """Before the engine has said anything."""
        return self._numbered([self._state("response.created"), self._state("response.in_progress")])

    def advance(self, output: RequestOutput) -> list[Event]:
        """What is new in an output. Nothing after the end."""
        with self._lock:
            news = self._cursor.advance(output.outputs[0])
            if news is None or not self.is_running:
                return []
            self._usage.newest[0] = output
            events = self._grow(news)
            if news.finish_reason is not None:
                events += self._finish(news.finish_reason)
            return self._numbered(events)

    def closing(self) -> list[Event]:
        """The last events, of an answer that has ended."""
        if self._status == "failed" and self._error is not None:
            return self._numbered([_error_event(self._error), self._state("response.failed")])
        if self._status == "cancelled":
            error = {"message": "The response was cancelled.", "type": "cancelled", "param": None}
            return self._numbered([_error_event({**error, "code": CANCELLED_CODE}), self._state("response.incomplete")])
        return self._numbered([self._state(f"response.{self._status}")])

    def _grow(self, news: CompletionOutput) -> list[Event]:
        """A token's logprob goes with the first text after it; those of calls and of thinking are nobody's."""
        deltas = self._reader.advance(news.text, news.finish_reason is not None)
        self._waiting_logprobs += self._logprobs(news)
        spoken = [delta for delta in deltas if isinstance(delta, ContentDelta)]
        events: list[Event] = []
        for delta in deltas:
            events += self._output.add(delta, self._waiting_logprobs if spoken and delta is spoken[-1] else None)
        if deltas:
            self._waiting_logprobs = []
        return events

    def _finish(self, finish_reason: str) -> list[Event]:
        """finish_reason: the engine's."""
        events: list[Event] = []
        if self._output.is_empty or (self._output.ends_in_message and self._waiting_logprobs):
            events += self._output.add(ContentDelta(""), self._waiting_logprobs)  # a message may say nothing
        is_cut = "length" in (finish_reason, self._reader.finish_reason)  # the second: inside of a call
        self._status = "incomplete" if is_cut else "completed"
        events += self._output.close(self._status)
        if is_cut:
            self._incomplete_details = {"reason": "max_output_tokens"}
        else:
            self._completed_at = int(time.time())
        return events

    def _logprobs(self, news: CompletionOutput) -> Logprobs:
        found = chat_logprobs(self._engine.tokenizer, news.token_ids, news.logprobs, self._num_top_logprobs)
        return found["content"] if found else []

    def _state(self, kind: str) -> Event:
        return {"type": kind, "response": self.read()}

    def _numbered(self, events: list[Event]) -> list[Event]:
        with self._lock:
            numbered = [
                {"type": event["type"], "sequence_number": number, **event}
                for number, event in enumerate(events, self._num_events)
            ]
            self._num_events += len(events)
            return numbered

    # ------------------------------------------------------------------ other ends
    def cancel(self) -> None:
        """End it now and give the request up, if it still runs."""
        with self._lock:
            if self.is_running:
                self._output.close("incomplete", quietly=True)
                self._status = "cancelled"
        self._job.close()

    def fail(self, error: Exception) -> None:
        """It cannot go on. Does nothing after another end."""
        with self._lock:
            if self.is_running:
                self._output.close("incomplete", quietly=True)
                self._status = "failed"
                self._error = describe_error(error)[1]["error"]


def _error_event(error: dict[str, Any]) -> Event:
    """Some clients read the flat half, some the nested one."""
    code = str(error["code"])
    flat = {"code": code, "message": error["message"], "param": error["param"]}
    return {"type": "error", **flat, "error": {"type": error["type"], **flat}}


def _echo(service: Service, body: ResponsesRequest, job: AnyJob, num_top_logprobs: int) -> dict[str, Any]:
    """What was asked for, with the defaults that were taken."""
    params = job.requests[0].sampling_params
    text = body.text
    return {
        "model": service.model_names[0],
        "instructions": body.instructions,
        "previous_response_id": body.previous_response_id,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "temperature": params.temperature if params else None,
        "top_p": params.top_p if params else None,
        "presence_penalty": params.presence_penalty if params else None,
        "frequency_penalty": params.frequency_penalty if params else None,
        "top_logprobs": num_top_logprobs,
        "text": {
            "format": (text and text.format) or {"type": "text"},
            "verbosity": (text and text.verbosity) or "medium",
        },
        "tools": [{"description": None, "parameters": None, "strict": None, **tool} for tool in body.tools or ()],
        "tool_choice": body.tool_choice or "auto",
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "reasoning": {"effort": None, "summary": None, **(body.reasoning or {})},
        "truncation": body.truncation or "disabled",
        "store": body.store is not False and service.responses.keeps_any,
        "background": False,
        "conversation": None,
        "prompt": None,
        "service_tier": "default",
        "metadata": body.metadata or {},
        "user": body.user,
        "safety_identifier": body.safety_identifier,
        "prompt_cache_key": body.prompt_cache_key,
    }
