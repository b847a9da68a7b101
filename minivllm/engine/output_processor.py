"""From drawn token ids to what the caller sees: text, logprobs, why it ended; n sequences merged into one answer.

    EngineCoreOutput ──▶ RequestState.update (detokenize, stop strings) ──▶ ParentRequest (n, best_of) ──▶ RequestOutput

Stop strings live here, because only here is there text. A match ends the sequence on this side, and its id is
returned so that the engine ends it in the core. Tokens are looked at one by one: tokens behind the one that completed
the stop string (a step may bring several) are dropped, so how many come at once changes nothing.

Knows no HTTP and no tensor. Called by llm_engine.py, from one thread.
Twin in vLLM: vllm/v1/engine/output_processor.py, parallel_sampling.py and logprobs.py.
"""

from __future__ import annotations

import copy
import enum
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from minivllm.engine.detokenizer import IncrementalDetokenizer, StopStringChecker
from minivllm.engine.input_processor import EngineCoreRequest
from minivllm.engine.stats import EngineStats, SequenceStats
from minivllm.engine.tokenizer import Tokenizer
from minivllm.errors import InvalidRequestError
from minivllm.outputs import (
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    EngineCoreOutput,
    Logprob,
    RequestOutput,
    SchedulerOutput,
    TokenLogprobs,
)
from minivllm.sampling_params import SamplingParams

AnyRequestOutput = RequestOutput | EmbeddingRequestOutput


class RequestOutputKind(enum.Enum):
    """What the outputs of one request hold."""

    CUMULATIVE = enum.auto()  # everything so far, after every step that brought a token
    DELTA = enum.auto()  # what is new since the last output
    FINAL_ONLY = enum.auto()  # one output, at the end


@dataclass(slots=True)
class ProcessedOutputs:
    """What one step means for the callers and for the core."""

    request_outputs: list[AnyRequestOutput]
    stopped_request_ids: list[str]  # ended here by a stop string (or a failure): the core must end them too


# ---------------------------------------------------------------------- one sequence
class RequestState:
    """Text, tokens and logprobs of one sequence.

    Attributes:
        token_ids: every generated token, also the one that ended it.
        finish_reason: stop | length | abort | error; None while it runs.
        stop_reason: the stop string or stop token id.
        cumulative_logprob: sum over token_ids; None when no logprobs were computed.
        error: why finish_reason is "error".
        stats: its sizes and times.
    """

    def __init__(self, request: EngineCoreRequest, tokenizer: Tokenizer | None, index: int = 0):
        params = request.sampling_params or SamplingParams()
        self.request_id = request.request_id
        self.index = index
        self.token_ids: list[int] = []
        self.logprobs: list[dict[int, Logprob]] | None = None if params.logprobs is None else []
        self.cumulative_logprob: float | None = None if params.logprobs is None else 0.0
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        if params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]
        self.num_cached_tokens = 0
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.error: str | None = None
        self.stats = SequenceStats(
            request.arrival_time, len(request.prompt_token_ids), request.max_tokens, is_first=index == 0
        )
        self._min_tokens = params.min_tokens
        self._include_stop = params.include_stop_str_in_output
        generates = request.sampling_params is not None  # a vector has no text to decode
        self._tokenizer = tokenizer if params.detokenize and generates else None
        self._detokenizer: IncrementalDetokenizer | None = None
        self._checker: StopStringChecker | None = None
        if self._tokenizer is not None:
            self._detokenizer = IncrementalDetokenizer(
                self._tokenizer,
                request.prompt_token_ids,
                params.skip_special_tokens,
                params.spaces_between_special_tokens,
            )
            if params.stop:
                self._checker = StopStringChecker(list(params.stop), self._include_stop)
        self._text = ""
        self._new_text: list[str] = []  # not yet in _text
        self._taken_chars = 0  # by the last delta
        self._taken_tokens = 0
        self._taken_end = False

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    def text(self) -> str:
        """Everything that may be shown so far."""
        if self._new_text:
            self._text += "".join(self._new_text)
            self._new_text.clear()
        return self._text

    def update(self, output: EngineCoreOutput) -> bool:
        """Take what a step brought. True: a stop string ended the sequence and the core does not know it yet."""
        self.num_cached_tokens = output.num_cached_tokens
        if output.prompt_logprobs and self.prompt_logprobs is not None:
            self.prompt_logprobs += [self._logprob_dict(entry) for entry in output.prompt_logprobs]
        last = len(output.new_token_ids) - 1
        for position, token_id in enumerate(output.new_token_ids):
            self.token_ids.append(token_id)
            if output.logprobs and self.logprobs is not None and self.cumulative_logprob is not None:
                entry = output.logprobs[position]
                self.logprobs.append(self._logprob_dict(entry))
                self.cumulative_logprob += entry.logprobs[0]
            # eos or a stop token id: its text is shown only on request (and then only if it is not special)
            is_stop_token = position == last and output.finish_reason == "stop"
            if not is_stop_token or self._include_stop:
                self._add_token_text(token_id)
                if self.is_finished:
                    return output.finish_reason is None
        if output.finish_reason is not None:
            self.finish(output.finish_reason, output.stop_reason, output.error)
        return False

    def finish(self, reason: str, stop_reason: int | None = None, error: str | None = None) -> None:
        """The sequence is over: show what was held back. A stop string that only this completes still counts."""
        if self._detokenizer is not None:
            self._show(self._detokenizer.flush())
            if self._checker is not None:
                self._new_text.append(self._checker.flush())
        if not self.is_finished:
            self.finish_reason, self.stop_reason, self.error = reason, stop_reason, error

    def fail(self, error: str) -> None:
        """An error of ours: keep what was shown, decode nothing more."""
        self.finish_reason, self.stop_reason, self.error = "error", None, error

    def _add_token_text(self, token_id: int) -> None:
        if self._detokenizer is not None:
            self._show(self._detokenizer.append((token_id,)))

    def _show(self, text: str) -> None:
        if not text:
            return
        if self._checker is None:
            self._new_text.append(text)
            return
        # Text of the first min_tokens tokens cannot complete a stop string (as in vLLM).
        may_stop = len(self.token_ids) > self._min_tokens
        self._new_text.append(self._checker.append(text, may_stop=may_stop))
        if self._checker.stopped is not None and not self.is_finished:
            self.finish_reason, self.stop_reason = "stop", self._checker.stopped

    def _logprob_dict(self, entry: TokenLogprobs) -> dict[int, Logprob]:
        """The token itself first, then the most likely ones with ranks 1, 2, ...; a token stands there once."""
        ranks = (entry.rank, *range(1, len(entry.token_ids)))
        found: dict[int, Logprob] = {}
        for token_id, logprob, rank in zip(entry.token_ids, entry.logprobs, ranks, strict=True):
            text = self._tokenizer.token_text(token_id) if self._tokenizer is not None else None
            found[token_id] = Logprob(logprob, rank, text)
        return found

    # ------------------------------------------------------------------ what the caller sees
    def has_news(self) -> bool:
        """Something came since the last `delta`."""
        if self.is_finished:
            return not self._taken_end
        return len(self.token_ids) > self._taken_tokens

    def snapshot(self) -> CompletionOutput:
        """Everything so far, as a copy that later steps do not change."""
        return CompletionOutput(
            index=self.index,
            text=self.text(),
            token_ids=list(self.token_ids),
            cumulative_logprob=self.cumulative_logprob,
            logprobs=None if self.logprobs is None else list(self.logprobs),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )

    def delta(self) -> CompletionOutput:
        """What is new since the last call; cumulative_logprob stays the sum over all tokens."""
        chars, tokens = self._taken_chars, self._taken_tokens
        text = self.text()
        self._taken_chars, self._taken_tokens, self._taken_end = len(text), len(self.token_ids), self.is_finished
        return CompletionOutput(
            index=self.index,
            text=text[chars:],
            token_ids=self.token_ids[tokens:],
            cumulative_logprob=self.cumulative_logprob,
            logprobs=None if self.logprobs is None else self.logprobs[tokens:],
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )


# ---------------------------------------------------------------------- n sequences, one answer
class ParentRequest:
    """One request of a caller and its n (or best_of) sequences.

    Child i has id "i_<request id>" and seed + i, and shares the prompt through the prefix cache; a single child is the
    request itself. With best_of > n the n best by cumulative logprob are kept, best first (ties: the earlier one),
    numbered 0..n-1; there is nothing to show before all have ended.

    Attributes:
        children: what the scheduler is to run.
    """

    def __init__(
        self,
        request: EngineCoreRequest,
        tokenizer: Tokenizer | None,
        kind: RequestOutputKind = RequestOutputKind.CUMULATIVE,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.request = request
        self.children = _fan_out(request)
        self.states = [RequestState(child, tokenizer, index) for index, child in enumerate(self.children)]
        params = request.sampling_params
        self._num_returned = params.n if params else 1
        self._hide_logprobs = params is not None and params.logprobs is None
        self._selects = self._num_returned < len(self.states)
        self._kind = RequestOutputKind.FINAL_ONLY if self._selects else kind
        self._clock = clock
        self._metrics: dict[str, float] = {"arrival_time": request.arrival_time}
        self._sent_prompt_logprobs = False

    @property
    def is_finished(self) -> bool:
        return all(state.is_finished for state in self.states)

    def unfinished_ids(self) -> list[str]:
        return [state.request_id for state in self.states if not state.is_finished]

    def make_output(self) -> RequestOutput | None:
        """The answer so far, in the form that was asked for; None when there is nothing to say yet."""
        if any(state.token_ids for state in self.states):
            self._metrics.setdefault("first_token_time", self._clock())
        if self.is_finished:
            self._metrics.setdefault("finished_time", self._clock())
        elif self._kind is RequestOutputKind.FINAL_ONLY:
            return None
        if self._kind is RequestOutputKind.DELTA:
            outputs = [state.delta() for state in self.states if state.has_news()]
        else:
            outputs = [state.snapshot() for state in self._selected()]
        if not self.is_finished and not any(output.token_ids or output.finish_reason for output in outputs):
            return None
        for index, output in enumerate(outputs):
            if self._selects:
                output.index = index
            if self._hide_logprobs:
                output.logprobs = None
        return RequestOutput(
            request_id=self.request.request_id,
            prompt=self.request.prompt,
            prompt_token_ids=self.request.prompt_token_ids,
            outputs=outputs,
            finished=self.is_finished,
            prompt_logprobs=self._prompt_logprobs(),
            num_cached_tokens=self.states[0].num_cached_tokens,
            metrics=dict(self._metrics),
            error=next((state.error for state in self.states if state.error is not None), None),
        )

    def _selected(self) -> list[RequestState]:
        if not self._selects:
            return self.states
        return sorted(self.states, key=_badness)[: self._num_returned]

    def _prompt_logprobs(self) -> list[dict[int, Logprob] | None] | None:
        """Of the first child: the others do not compute them. In deltas once, and whole: a child with a cached prompt
        may be ahead of the first."""
        logprobs = self.states[0].prompt_logprobs
        if logprobs is not None and self._kind is RequestOutputKind.DELTA:
            is_whole = self.is_finished or len(logprobs) == len(self.request.prompt_token_ids)
            if self._sent_prompt_logprobs or not is_whole:
                return None
            self._sent_prompt_logprobs = True
        return None if logprobs is None else list(logprobs)


def _badness(state: RequestState) -> tuple[bool, float, int]:
    """Sort key: complete sequences first, then the likelier, then the earlier."""
    logprob = state.cumulative_logprob
    if logprob is None or math.isnan(logprob):
        logprob = -math.inf
    return state.finish_reason in ("error", "abort"), -logprob, state.index


def _fan_out(request: EngineCoreRequest) -> list[EngineCoreRequest]:
    params = request.sampling_params
    if params is None or params.num_candidates == 1:
        return [request]
    children = []
    for index in range(params.num_candidates):
        child_params = copy.copy(params)
        child_params.n, child_params.best_of = 1, None
        if index > 0:
            child_params.prompt_logprobs = None
        if params.num_candidates > params.n and params.logprobs is None:
            child_params.logprobs = 0  # the choice needs the sampled tokens' own
        child_id = f"{index}_{request.request_id}"
        seed = (request.seed + index + 2**63) % 2**64 - 2**63  # stays an int64
        children.append(replace(request, request_id=child_id, seed=seed, sampling_params=child_params))
    return children


# ---------------------------------------------------------------------- all requests
class OutputProcessor:
    """Keeps the text side of every request that the core runs.

    Args:
        tokenizer: None: outputs are token ids, text stays empty.
        clock: seconds, for RequestOutput.metrics and stats; the same one that stamps arrival_time.
        stats: is filled; None: a new one.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        clock: Callable[[], float] = time.monotonic,
        stats: EngineStats | None = None,
    ):
        self.stats = stats or EngineStats()
        self._tokenizer = tokenizer
        self._clock = clock
        self._parents: dict[str, ParentRequest] = {}
        self._running: dict[str, tuple[ParentRequest, RequestState]] = {}  # by child id

    @property
    def num_requests(self) -> int:
        return len(self._parents)

    def age_seconds(self, request_id: str) -> float:
        """Since the request of this sequence arrived; 0 when it is not there any more."""
        parent, _ = self._running.get(request_id, (None, None))
        return self._clock() - parent.request.arrival_time if parent is not None else 0.0

    def add_request(
        self, request: EngineCoreRequest, kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    ) -> list[EngineCoreRequest]:
        """Register a request; returns its sequences, which the scheduler is to run.

        Raises InvalidRequestError when the id is in use.
        """
        parent = ParentRequest(request, self._tokenizer, kind, self._clock)
        ids = [child.request_id for child in parent.children]
        if request.request_id in self._parents or any(child_id in self._running for child_id in ids):
            raise InvalidRequestError(f"request_id {request.request_id!r} is in use", parameter="request_id")
        self._parents[request.request_id] = parent
        self._running.update((state.request_id, (parent, state)) for state in parent.states)
        return parent.children

    def begin_step(self, step: SchedulerOutput) -> None:
        """Note what a step is about to compute, for the stats."""
        if step.total_num_scheduled_tokens:
            self.stats.iteration_tokens.observe(step.total_num_scheduled_tokens)
        now = self._clock() if step.scheduled_new_reqs else 0.0
        for new in step.scheduled_new_reqs:
            if new.request_id in self._running:  # a statistic must never be what ends the engine
                self.stats.add_scheduled(self._running[new.request_id][1].stats, new.num_computed_tokens, now)
        for request_id in step.preempted_req_ids:
            if request_id in self._running:
                self._running[request_id][1].stats.num_preemptions += 1

    def process_outputs(self, outputs: Iterable[EngineCoreOutput]) -> ProcessedOutputs:
        """Take one step's results. Outputs of requests that are not there any more are ignored.

        An exception while one sequence's text is made fails that sequence and no other.
        """
        processed = ProcessedOutputs([], [])
        touched: dict[str, ParentRequest] = {}
        now = self._clock()
        for output in outputs:
            parent, state = self._running.get(output.request_id, (None, None))
            if parent is None or state is None:
                continue
            if parent.request.sampling_params is None:
                processed.request_outputs.append(self._embedding(parent, state, output, now))
                continue
            touched[parent.request.request_id] = parent
            num_tokens = len(state.token_ids)
            try:
                must_stop = state.update(output)
            except Exception as error:
                state.fail(f"the output could not be processed ({type(error).__name__})")
                must_stop = output.finish_reason is None
            if len(state.token_ids) > num_tokens:
                self.stats.add_tokens(state.stats, len(state.token_ids) - num_tokens, now)
            if must_stop:
                processed.stopped_request_ids.append(output.request_id)
            if state.finish_reason is not None:
                del self._running[output.request_id]
                self.stats.add_finished(state.stats, state.finish_reason, now)
        for request_id, parent in touched.items():
            request_output = parent.make_output()
            if request_output is not None:
                processed.request_outputs.append(request_output)
            if parent.is_finished:
                del self._parents[request_id]
                params = parent.request.sampling_params or SamplingParams()
                self.stats.add_finished_request([state.stats for state in parent.states], params.n)
        return processed

    def abort_request(self, request_id: str) -> tuple[list[str], RequestOutput | None]:
        """Give a request up. Returns the ids that the core must end, and the last output (None for an embedding).

        ([], None) when the request is not there any more.
        """
        parent = self._parents.pop(request_id, None)
        if parent is None:
            return [], None
        unfinished = parent.unfinished_ids()
        for child_id in unfinished:
            _, state = self._running.pop(child_id)
            try:
                state.finish("abort")
            except Exception as error:
                state.fail(f"the output could not be processed ({type(error).__name__})")
            self.stats.add_finished(state.stats, "abort", self._clock())
        if parent.request.sampling_params is None:
            return unfinished, None
        return unfinished, parent.make_output()

    def _embedding(
        self, parent: ParentRequest, state: RequestState, output: EngineCoreOutput, now: float
    ) -> EmbeddingRequestOutput:
        self.stats.add_embedding(state.stats, output.finish_reason or "error", now)
        del self._running[output.request_id]
        del self._parents[parent.request.request_id]
        return EmbeddingRequestOutput(
            request_id=parent.request.request_id,
            outputs=EmbeddingOutput(output.pooler_output or []),
            prompt_token_ids=parent.request.prompt_token_ids,
            error=output.error,
        )
