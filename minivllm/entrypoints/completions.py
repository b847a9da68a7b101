"""POST /v1/completions: prompts in, their continuations out, whole or as a stream.

With echo the prompt is part of the text; with echo and logprobs its tokens are part of the lists, which is what an
evaluation harness needs to score a given text: prompt + max_tokens entries, the first one null.

Called by app.py. Twin in vLLM: vllm/entrypoints/openai/completion/serving.py.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Any

from flask import Response

from minivllm.entrypoints import logprobs, sse
from minivllm.entrypoints.answers import Envelope, json_response
from minivllm.entrypoints.generation import IsGone, Usage, collect, job_headers, start_job
from minivllm.entrypoints.protocol import CompletionRequest, prompts_of
from minivllm.entrypoints.service import Service
from minivllm.errors import InvalidRequestError
from minivllm.outputs import CompletionOutput, Logprob, RequestOutput

DEFAULT_MAX_TOKENS = 16


def create_completion(service: Service, body: CompletionRequest, is_gone: IsGone) -> Response:
    """Raises ClientError, ServerError before anything is sent."""
    sse.check_stream_options(body.stream, body.stream_options)
    prompts = prompts_of(body.prompt, "prompt")
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    only_echo = max_tokens == 0 and bool(body.echo)
    wanted = {"max_tokens": 1 if only_echo else max_tokens}
    if body.echo and body.logprobs is not None:
        if body.prompt_logprobs not in (None, body.logprobs):
            raise InvalidRequestError("prompt_logprobs must equal logprobs with echo.", parameter="prompt_logprobs")
        wanted["prompt_logprobs"] = body.logprobs
    job = start_job(service, body, prompts, "prompt", is_gone, **wanted)
    headers = job_headers(job, body)
    writer = CompletionWriter(service, body, only_echo)
    if body.stream:
        return sse.stream_response(job, writer, body.stream_options, headers)
    usage = Usage(job, dict(enumerate(collect(job))))
    return json_response(writer.whole(usage), headers)


class CompletionWriter:
    """Turns outputs into completion bodies and chunks.

    only_echo: max_tokens 0. The engine always draws a token; it is dropped.
    """

    def __init__(self, service: Service, body: CompletionRequest, only_echo: bool):
        self._engine = service.engine.engine
        self._envelope = Envelope(service, "cmpl")
        self._body = body
        self._only_echo = only_echo
        self._num_choices = body.n or 1
        self._cursors: defaultdict[int, sse.Cursor] = defaultdict(sse.Cursor)
        self._offsets: defaultdict[int, int] = defaultdict(int)  # characters of each choice's tokens so far

    # ------------------------------------------------------------------ whole
    def whole(self, usage: Usage) -> dict[str, Any]:
        """The body of an answer that is complete."""
        choices = []
        for prompt_index, output in sorted(usage.newest.items()):
            for completion in output.outputs:
                choice = self._choice(prompt_index, output, completion, is_first=True)
                choice["prompt_logprobs"] = (
                    logprobs.prompt_logprobs(output.prompt_logprobs) if self._body.prompt_logprobs is not None else None
                )
                choices.append(choice)
        return {
            **self._envelope.open("text_completion"),
            "choices": choices,
            "service_tier": None,
            "system_fingerprint": None,
            "usage": usage.as_dict(),
        }

    # ------------------------------------------------------------------ in chunks
    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """The envelope around choices."""
        return {**self._envelope.open("text_completion"), "choices": choices}

    def opening(self) -> list[dict[str, Any]]:
        """Nothing: completions have no role."""
        return []

    def choices(self, prompt_index: int, output: RequestOutput) -> list[dict[str, Any]]:
        """New text, with the reason where it ends; the prompt in front of the first when it is echoed."""
        num_known = len(output.prompt_logprobs or ())
        if output.prompt_logprobs is not None and num_known < len(output.prompt_token_ids) and not output.finished:
            return []  # a sibling with a cached prompt is ahead of the one that computes the prompt's logprobs
        found = []
        for completion in output.outputs:
            index = self._index(prompt_index, completion)
            is_first = index not in self._cursors
            news = self._cursors[index].advance(completion)
            if news is None:
                if is_first:
                    del self._cursors[index]  # nothing was sent: the next one is the first
                continue
            choice = self._choice(prompt_index, output, news, is_first)
            if choice["text"] or choice["logprobs"] or choice["finish_reason"] or self._body.return_token_ids:
                found.append(choice)
        return found

    # ------------------------------------------------------------------ both
    def _index(self, prompt_index: int, completion: CompletionOutput) -> int:
        return prompt_index * self._num_choices + completion.index

    def _choice(
        self, prompt_index: int, output: RequestOutput, completion: CompletionOutput, is_first: bool
    ) -> dict[str, Any]:
        """is_first: nothing of this choice was sent before."""
        if self._only_echo:
            no_logprobs: list[dict[int, Logprob]] | None = None if completion.logprobs is None else []
            completion = dataclasses.replace(completion, text="", token_ids=[], logprobs=no_logprobs)
        echoes = bool(self._body.echo) and is_first
        text = completion.text
        if echoes:
            prompt = output.prompt
            text = (
                self._engine.decode(output.prompt_token_ids, skip_special_tokens=False) if prompt is None else prompt
            ) + text
        with_token_ids = bool(self._body.return_token_ids)
        return {
            "index": self._index(prompt_index, completion),
            "text": text,
            "logprobs": self._logprobs(self._index(prompt_index, completion), output, completion, echoes),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
            "token_ids": completion.token_ids if with_token_ids else None,
            "prompt_token_ids": output.prompt_token_ids if with_token_ids and is_first else None,
        }

    def _logprobs(
        self, index: int, output: RequestOutput, completion: CompletionOutput, echoes: bool
    ) -> dict[str, Any] | None:
        if completion.logprobs is None:
            return None
        token_ids, positions = completion.token_ids, list[dict[int, Logprob] | None](completion.logprobs)
        if echoes:
            token_ids = [*output.prompt_token_ids, *token_ids]
            positions = [*(output.prompt_logprobs or ()), *positions]
        found = logprobs.completion_logprobs(self._engine.tokenizer, token_ids, positions, self._offsets[index])
        self._offsets[index] += sum(map(len, found["tokens"])) if found else 0
        return found
