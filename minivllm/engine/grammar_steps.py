"""Requests with a grammar, around one step: which of them need a mask, and what the drawn tokens mean to them.

    masks_for(step)    before the step: the call that makes the rows, for those that draw a token (or verify drafts)
    follow(outputs)    after it: grammars take what was drawn; forced tokens are appended; what is complete ends

Where a grammar leaves only one text, its tokens are forced: the mask of each would hold nothing else, so they are
appended to the output at once and computed together in the next step, instead of one step for each. Nothing else
changes: the same tokens come as if each had been drawn, the next draw uses the seed's next position, and the
log-probability is 0, as behind such a mask (no other token is listed beside it: all would be at minus infinity). Tokens
that may end the request, or that a field of the request forbids, are left to the draw.

Knows no text and no model. Called by llm_engine.py.
Twin in vLLM: update_from_output in vllm/v1/core/sched/scheduler.py; it has no forced tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from minivllm.core.request import FinishReason, Request
from minivllm.core.scheduler import Scheduler
from minivllm.outputs import EngineCoreOutput, SchedulerOutput, TokenLogprobs
from minivllm.structured_output.manager import StructuredOutputManager

# {request id: tokens drawn so far in this step} -> {request id: [ceil(vocab_size / 32)] int32}, those with a grammar
MakeRows = Callable[[Mapping[str, Sequence[int]]], Mapping[str, np.ndarray]]


class GrammarSteps:
    """Args:
    eos_token_ids: of the model; a request may ignore them, a complete grammar may not.
    """

    def __init__(self, scheduler: Scheduler, grammars: StructuredOutputManager, eos_token_ids: frozenset[int]):
        self._scheduler = scheduler
        self._grammars = grammars
        self._eos_token_ids = eos_token_ids

    # ------------------------------------------------------------------ before the step
    def masks_for(self, step: SchedulerOutput) -> MakeRows | None:
        """Makes the rows of those who draw; None when nobody with a grammar does.

        The call is told what each of them has drawn in this very step: nothing at first, then accepted drafts.
        """
        if not len(self._grammars):
            return None
        drawing = set()
        for request_id, num_tokens in step.num_scheduled_tokens.items():
            request = self._scheduler.requests[request_id]
            is_last = request.num_computed_tokens + num_tokens >= request.num_tokens  # or it is a draft behind the last
            if is_last and request_id in self._grammars:
                drawing.add(request_id)
        if not drawing:
            return None
        return lambda drawn: self._grammars.bitmasks({key: drawn[key] for key in drawn if key in drawing})

    # ------------------------------------------------------------------ after the step
    def follow(self, outputs: list[EngineCoreOutput]) -> list[EngineCoreOutput]:
        """The outputs with what the grammars make of them."""
        ends = [self._follow(output) for output in outputs if output.request_id in self._grammars]
        return outputs + [end for end in ends if end is not None]

    def _follow(self, output: EngineCoreOutput) -> EngineCoreOutput | None:
        """Tell a request's grammar what was drawn. Returns one more output for a request that ends without eos."""
        grammars, request_id = self._grammars, output.request_id
        num_accepted = grammars.accept_tokens(request_id, output.new_token_ids)
        error = grammars.error(request_id)
        if error is None and num_accepted < len(output.new_token_ids):
            error = f"token {output.new_token_ids[num_accepted]} was drawn, which the grammar refuses"
        if error is not None:
            output.new_token_ids = output.new_token_ids[:num_accepted]
            output.logprobs = output.logprobs and output.logprobs[:num_accepted]
        elif output.finish_reason is None and output.new_token_ids:
            self._append_forced(output)
            error = None if output.finish_reason else grammars.error(request_id)
        if error is not None:
            self._scheduler.finish_request(request_id, FinishReason.ERROR)
            output.finish_reason, output.error = "error", f"structured_outputs cannot go on: {error}."
        if output.finish_reason is not None:
            return None
        if grammars.is_terminated(request_id):  # eos with ignore_eos: nothing could follow it
            self._scheduler.finish_request(request_id, FinishReason.STOP)
            output.finish_reason = "stop"
        elif grammars.is_complete(request_id) and not self._possible_eos(self._scheduler.requests[request_id]):
            self._scheduler.finish_request(request_id, FinishReason.STOP)
            return EngineCoreOutput(
                request_id, [], finish_reason="stop", num_cached_tokens=output.num_cached_tokens
            )  # by itself: the token before it is text, not eos
        return None

    # ------------------------------------------------------------------ forced tokens
    def _append_forced(self, output: EngineCoreOutput) -> None:
        """Append what need not be drawn: text, and behind a complete text the only eos there is."""
        request_id = output.request_id
        request = self._scheduler.requests[request_id]
        forced = itertools.takewhile(lambda t: _needs_no_draw(request, t), self._grammars.forced_tokens(request_id))
        self._append(output, request, list(forced))
        if output.finish_reason is None and self._grammars.is_complete(request_id):
            eos_token_ids = self._possible_eos(request)
            if len(eos_token_ids) == 1:
                self._append(output, request, list(eos_token_ids))

    def _append(self, output: EngineCoreOutput, request: Request, token_ids: list[int]) -> None:
        added = self._scheduler.append_tokens(request.request_id, token_ids)
        self._grammars.accept_tokens(request.request_id, added)
        output.new_token_ids = output.new_token_ids + added
        if output.logprobs is not None:
            output.logprobs = output.logprobs + [TokenLogprobs([token_id], [0.0], 1) for token_id in added]
        if request.finish_reason is not None:
            output.finish_reason, output.stop_reason = str(request.finish_reason), request.stop_reason

    def _possible_eos(self, request: Request) -> frozenset[int]:
        """What may be drawn behind a complete text: none while min_tokens or allowed_token_ids forbid it."""
        params = request.sampling_params
        if request.num_output_tokens < request.min_tokens:
            return frozenset()
        if params is None or params.allowed_token_ids is None:
            return self._eos_token_ids
        return self._eos_token_ids.intersection(params.allowed_token_ids)


def _needs_no_draw(request: Request, token_id: int) -> bool:
    """Whether this token, the only one that its grammar leaves, is also fine for every other mask."""
    params = request.sampling_params
    if params is None or request.bad_words_token_ids or token_id in request.eos_token_ids | request.stop_token_ids:
        return False
    return params.allowed_token_ids is None or token_id in params.allowed_token_ids
