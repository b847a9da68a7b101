"""One call to the engine: its prompts are queued together, and waited for while somebody wants the answer.

    Job(prompts, params) ── outputs() ──▶ (prompt's number, newest output), or None: nothing new for a while

A Job reads samples, a BeamJob searches; whoever reads them sees no difference. Every wait looks at the client and at
the server's state, so a request ends within a moment when its client is gone, queued or running.

Knows no HTTP: `is_gone` is asked. Called by chat.py, completions.py and embeddings.py.
Twin in vLLM: vllm/entrypoints/openai/engine/serving.py and vllm/entrypoints/generate/beam_search/online.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from minivllm.engine.async_engine import AsyncEngine, RequestStream
from minivllm.engine.input_processor import EngineCoreRequest
from minivllm.entrypoints.output_format import field_of, from_body, naming
from minivllm.entrypoints.protocol import SAMPLING_FIELDS, GenerationBody, VectorBody
from minivllm.entrypoints.service import ClientGoneError, Service, ShuttingDownError
from minivllm.errors import ClientError, InvalidRequestError, OverloadedError, ServerError
from minivllm.outputs import NO_TOKEN_LEFT, CompletionOutput, Logprob, RequestOutput
from minivllm.sample.beam_search import beam_search
from minivllm.sampling_params import BeamSearchParams, SamplingParams

Outputs = Iterator[tuple[int, Any] | None]
IsGone = Callable[[], bool]
# What beams do not read. The first change how a token is drawn: beams draw none, so the answer is one without them, and
# its header names them. The others say what an answer must hold: without them it would be a wrong one.
DRAWING_FIELDS = frozenset(
    {"temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty"}
    | {"stop", "spaces_between_special_tokens"}
)
BEAM_FIELDS = frozenset(
    {"n", "best_of", "max_tokens", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "logprobs"}
)


# ------------------------------------------------------------------ sampling
class Job:
    """The prompts of one call, all of them checked before one is queued. Raises ClientError, ServerError.

    Args:
        params: None for embeddings.
        prompt_parameter: what the caller calls a prompt, or each of them; errors about it name that.
        engine: None: the generating one.
        max_queued: so many of them are in the engine at a time, and the others follow as there is room: a call may
            hold more than the queue. None: all at once, or the call is refused.
        was_accepted: it is part of a call that runs already, and waits for room instead of being refused.
        options: LLMEngine.process_input's.
    """

    ignored: Sequence[str] = ()  # fields that were set and change nothing here

    def __init__(
        self,
        service: Service,
        prompts: Sequence[Any],
        params: SamplingParams | None,
        prompt_parameter: str | Sequence[str],
        is_gone: IsGone,
        engine: AsyncEngine | None = None,
        max_queued: int | None = None,
        was_accepted: bool = False,
        **options: Any,
    ):
        self._service = service
        self._is_gone = is_gone
        self._engine = engine or service.engine
        self._max_queued = max_queued
        self._changed = threading.Condition()
        if not was_accepted:
            self._engine.check_room()  # before anything is tokenised
        names = [prompt_parameter] * len(prompts) if isinstance(prompt_parameter, str) else prompt_parameter
        self.requests: list[EngineCoreRequest] = []
        for prompt, name in zip(prompts, names, strict=True):
            with _naming(name):
                self.requests.append(self._engine.engine.process_input(prompt, params, **options))
        self._streams: list[RequestStream] = []
        with contextlib.ExitStack() as queued:
            for _ in self.requests[:max_queued]:
                if not self._queue_next(must=not was_accepted and (max_queued is None or not self._streams)):
                    break
                queued.enter_context(self._streams[-1])
            queued.pop_all()

    def _queue_next(self, *, must: bool) -> bool:
        """False when the queue is full. must: then raise OverloadedError."""
        try:
            request = self.requests[len(self._streams)]
            self._streams.append(self._engine.submit_processed(request, self._changed))
        except OverloadedError:
            if must:
                raise
            return False
        return True

    def _refill(self, waiting: dict[int, RequestStream]) -> None:
        """Queue more while there are any and there is room for them."""
        while len(self._streams) < len(self.requests) and len(waiting) < (self._max_queued or len(self.requests)):
            if not self._queue_next(must=False):
                return
            waiting[len(self._streams) - 1] = self._streams[-1]

    def outputs(self) -> Outputs:
        """The newest output of each prompt whenever there is one. Raises ClientGoneError, ServerError."""
        waiting = dict(enumerate(self._streams))
        try:
            while waiting or len(self._streams) < len(self.requests):
                self._refill(waiting)
                ready = self._wait(list(waiting.items()))
                if not ready:
                    yield None
                for index in ready:
                    output = waiting[index].next(0.0)
                    if output is None or output.finished:
                        del waiting[index]
                    if output is None:  # an embedding that was given up has no last output
                        raise ServerError("the request was aborted")
                    yield index, _checked(output)
        finally:
            self.close()

    def _wait(self, waiting: list[tuple[int, RequestStream]]) -> list[int]:
        """The prompts that have something new; [] when a keep-alive is due, or when there is nobody to wait for."""
        deadline = time.monotonic() + self._service.config.keep_alive_seconds
        while True:
            with self._changed:
                self._changed.wait_for(lambda: any(s.has_news for _, s in waiting), self._service.config.poll_seconds)
            if self._is_gone():
                raise ClientGoneError
            if self._service.aborting.is_set():
                raise ShuttingDownError("The server is shutting down.")
            ready = [index for index, stream in waiting if stream.has_news]
            if ready or not waiting or time.monotonic() >= deadline:
                return ready

    def close(self) -> None:
        """Give up what still runs. Must be called, also when nothing was read."""
        for stream in self._streams:
            stream.close()


@contextlib.contextmanager
def renaming(names: Mapping[str, str]) -> Iterator[None]:
    """Errors name the fields of the endpoint, where the layers below call them something else."""
    try:
        yield
    except ClientError as error:
        below = error.parameter or ""
        if below in names:
            error.message = re.sub(rf"^{below}\b", names[below], error.message)
            error.parameter = names[below]
        raise


@contextlib.contextmanager
def _naming(prompt_parameter: str) -> Iterator[None]:
    """Errors about the prompt name the field that it came in."""
    try:
        yield
    except ClientError as error:
        if error.parameter in ("prompt", "prompt_token_ids"):
            error.parameter = prompt_parameter
        raise


def _checked(output: Any) -> Any:
    """Raise if the engine failed the request. Why is for the log: it may speak of the inside."""
    if output.error == NO_TOKEN_LEFT:
        raise InvalidRequestError(output.error)
    if output.error is not None:
        logging.getLogger(__name__).error("request %s failed: %s", output.request_id, output.error)
        raise ServerError(output.error)
    if isinstance(output, RequestOutput) and any(c.finish_reason == "abort" for c in output.outputs):
        raise ServerError("the request was aborted")
    return output


# ------------------------------------------------------------------ beams
class BeamJob:
    """Beam search for each prompt of one call: one output per prompt, the n best beams. Raises like Job."""

    def __init__(
        self,
        service: Service,
        prompts: Sequence[Any],
        params: BeamSearchParams,
        num_returned: int,
        prompt_parameter: str,
        is_gone: IsGone,
        ignored: Sequence[str],
        with_logprobs: bool,
        **options: Any,
    ):
        self._service = service
        self._params = params
        self.ignored = ignored
        self._with_logprobs = with_logprobs
        self._num_returned = num_returned
        self._is_gone = is_gone
        self._beam_options = {name: options[name] for name in ("priority", "cache_salt") if name in options}
        service.engine.check_room()
        check = SamplingParams(temperature=0.0, max_tokens=params.max_tokens)
        with _naming(prompt_parameter):
            self.requests = [service.engine.engine.process_input(prompt, check, **options) for prompt in prompts]

    def outputs(self) -> Outputs:
        """One output per prompt, when its search is over."""
        for index, request in enumerate(self.requests):
            yield index, self._search(request)

    def close(self) -> None:
        """Nothing runs between two outputs."""

    def _search(self, request: EngineCoreRequest) -> RequestOutput:
        engine = self._service.engine.engine
        prompt_token_ids, params = request.prompt_token_ids, self._params
        step = SamplingParams(temperature=0.0, max_tokens=1, detokenize=self._with_logprobs, ignore_eos=True)
        step.logprobs = 2 * params.beam_width  # may be beyond what a caller may ask for; no more are shown

        def expand(sequences: Sequence[list[int]]) -> list[dict[int, Logprob]]:
            waits: dict[str, Any] = {"max_queued": self._service.engine.max_requests, "was_accepted": True}
            job = Job(self._service, sequences, step, "prompt", self._is_gone, **waits, **self._beam_options)
            found = collect(job)
            return [output.outputs[0].logprobs[0] for output in found]

        beams = beam_search(prompt_token_ids, params, request.max_tokens, engine.eos_token_ids, expand)
        completions = []
        for index, beam in enumerate(beams[: self._num_returned]):
            ended = beam.finish_reason == "stop" and not params.include_stop_str_in_output
            output_ids = beam.tokens[len(prompt_token_ids) :]
            text = engine.decode(output_ids[: -1 if ended else None], skip_special_tokens=params.skip_special_tokens)
            positions = beam.logprobs if self._with_logprobs else None
            completions.append(
                CompletionOutput(index, text, output_ids, beam.cum_logprob, positions, finish_reason=beam.finish_reason)
            )
        return RequestOutput(request.request_id, request.prompt, prompt_token_ids, completions, finished=True)


AnyJob = Job | BeamJob


def collect(job: AnyJob) -> list[Any]:
    """The last output of every prompt."""
    last: dict[int, Any] = {}
    for item in job.outputs():
        if item is not None:
            last[item[0]] = item[1]
    return [last[index] for index in range(len(job.requests))]


# ------------------------------------------------------------------ from a body
def start_job(
    service: Service,
    body: GenerationBody,
    prompts: Sequence[Any],
    prompt_parameter: str,
    is_gone: IsGone,
    **overrides: Any,
) -> AnyJob:
    """Queue what a body asks for. Raises ClientError, before anything is sent.

    overrides: sampling fields that the wire spells differently, or that the caller knows better than the body:
    structured_outputs among them replaces the body's own form of the answer.
    """
    with naming(None if "structured_outputs" in overrides else field_of(body)):
        wanted = {"structured_outputs": from_body(body), **overrides}
        return _start(service, body, prompts, prompt_parameter, is_gone, wanted)


def _start(
    service: Service,
    body: GenerationBody,
    prompts: Sequence[Any],
    prompt_parameter: str,
    is_gone: IsGone,
    overrides: dict[str, Any],
) -> AnyJob:
    fields = {name: getattr(body, name) for name in SAMPLING_FIELDS & type(body).model_fields.keys()}
    fields = {name: value for name, value in {**fields, **overrides}.items() if value is not None}
    fields.setdefault("max_tokens", None)
    if "logit_bias" in fields:
        fields["logit_bias"] = _by_token_id(fields["logit_bias"])
    if body.use_beam_search and fields.get("temperature") == 0:  # one sample is like the other; beams are not
        fields["temperature"] = 1.0
    params = service.engine.engine.input_processor.default_sampling_params(**fields)
    service.check_logprobs(params)
    if body.stream and params.num_candidates > params.n and not body.use_beam_search:
        raise InvalidRequestError("best_of must not be more than n in a stream.", parameter="best_of")
    if body.stream and body.prompt_logprobs is not None:
        raise InvalidRequestError("prompt_logprobs cannot be streamed.", parameter="prompt_logprobs")
    options = prompt_options(body)
    if not body.use_beam_search:
        if body.length_penalty not in (None, 1.0):
            raise InvalidRequestError("length_penalty needs use_beam_search.", parameter="length_penalty")
        return Job(service, prompts, params, prompt_parameter, is_gone, **options)
    beam_params = _beam_params(params, body.length_penalty)
    ignored, with_logprobs = _ignored_by_beams(fields), params.logprobs is not None
    return BeamJob(
        service, prompts, beam_params, params.n, prompt_parameter, is_gone, ignored, with_logprobs, **options
    )


def _ignored_by_beams(fields: dict[str, Any]) -> list[str]:
    """Fields of drawing that were set. Raises InvalidRequestError for one that beams would have to obey."""
    defaults = SamplingParams()
    given = sorted(name for name in fields.keys() - BEAM_FIELDS if fields[name] != getattr(defaults, name))
    for name in given:
        if name not in DRAWING_FIELDS:
            raise InvalidRequestError(f"{name} has no effect on beams: leave it out.", parameter=name)
    return given


def _beam_params(params: SamplingParams, length_penalty: float | None) -> BeamSearchParams:
    return BeamSearchParams(
        beam_width=params.num_candidates,
        max_tokens=2**31 - 1 if params.max_tokens is None else params.max_tokens,
        ignore_eos=params.ignore_eos,
        length_penalty=1.0 if length_penalty is None else length_penalty,
        include_stop_str_in_output=params.include_stop_str_in_output,
        skip_special_tokens=params.skip_special_tokens,
    )


def _by_token_id(logit_bias: dict[str, float]) -> dict[int, float]:
    """JSON has only strings for keys."""
    bad = [name for name in logit_bias if not (name.isascii() and name.isdigit() and len(name) < 11)]
    if bad:
        raise InvalidRequestError(
            f"logit_bias must be keyed by token ids, got {bad[0][:40]!r}.", parameter="logit_bias"
        )
    return {int(name): bias for name, bias in logit_bias.items()}


def prompt_options(body: GenerationBody | VectorBody) -> dict[str, Any]:
    """How a prompt is to be taken. Special tokens of a chat are its template's: its prompt comes as token ids."""
    return {
        "priority": body.priority or 0,
        "cache_salt": body.cache_salt,
        "add_special_tokens": body.add_special_tokens is not False,
        "truncate_prompt_tokens": body.truncate_prompt_tokens,
        "truncation_side": body.truncation_side,
    }


def job_headers(job: AnyJob, body: GenerationBody) -> dict[str, str]:
    """What of the request was not taken as it stood: said, not hidden."""
    ignored = {"X-Minivllm-Ignored": ", ".join(job.ignored)} if job.ignored else {}
    return _clamped_header(job, body) | truncated_header(job) | ignored


def truncated_header(job: AnyJob) -> dict[str, str]:
    """Prompts were cut, as was asked for: to how many tokens."""
    lengths = sorted({request.truncated_to for request in job.requests if request.truncated_to is not None})
    if not lengths:
        return {}
    num_cut = sum(request.truncated_to is not None for request in job.requests)
    logging.getLogger(__name__).info("%d of %d prompts were cut to %s tokens", num_cut, len(job.requests), lengths)
    return {"X-Minivllm-Truncated": ", ".join(f"prompt_tokens={length}" for length in lengths[:8])}


def _clamped_header(job: AnyJob, body: GenerationBody) -> dict[str, str]:
    """Less than what was asked for is generated."""
    if body.max_tokens is None and getattr(body, "max_completion_tokens", None) is None:
        return {}
    limits = sorted({request.max_tokens for request in job.requests if request.max_tokens_clamped})
    if not limits:
        return {}
    logging.getLogger(__name__).info("max_tokens was clamped to %s", limits)
    return {"X-Minivllm-Clamped": ", ".join(f"max_tokens={limit}" for limit in limits[:8])}


# ------------------------------------------------------------------ usage
@dataclasses.dataclass(slots=True)
class Usage:
    """Tokens of one call, from the newest outputs; the prompt counts once, however many answers it has."""

    job: AnyJob
    newest: dict[int, RequestOutput] = dataclasses.field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        num_prompt_tokens = sum(len(request.prompt_token_ids) for request in self.job.requests)
        completions = [completion for output in self.newest.values() for completion in output.outputs]
        num_completion_tokens = sum(len(completion.token_ids) for completion in completions)
        num_cached_tokens = sum(output.num_cached_tokens for output in self.newest.values())
        return {
            "prompt_tokens": num_prompt_tokens,
            "total_tokens": num_prompt_tokens + num_completion_tokens,
            "completion_tokens": num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": num_cached_tokens},
        }
