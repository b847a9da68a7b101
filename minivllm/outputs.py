"""The records that cross a border between layers. Plain Python: no torch, no numpy, no behaviour.

    scheduler ── SchedulerOutput ──▶ worker ── ModelRunnerOutput ──▶ scheduler
    engine ── RequestOutput / EmbeddingRequestOutput ──▶ llm.py, cli/, the HTTP layer

This module knows nobody; everybody may import it.
Twin in vLLM: vllm/v1/core/sched/output.py, vllm/v1/outputs.py and vllm/outputs.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from minivllm.sampling_params import SamplingParams


# ------------------------------------------------------------------ scheduler -> worker
@dataclass(slots=True)
class NewRequestData:
    """Everything the worker must know of a request that it has not seen, or that it forgot."""

    request_id: str
    token_ids: list[int]  # prompt, plus the output so far when the request resumes after a preemption
    num_prompt_tokens: int
    block_ids: list[int]
    num_computed_tokens: int
    sampling_params: SamplingParams | None  # None: a pooling request
    seed: int = 0  # decided by the engine when the caller gave none
    stop_token_ids: frozenset[int] = frozenset()  # eos and stop ids, masked while below min_tokens
    bad_words_token_ids: list[list[int]] = field(default_factory=list)


@dataclass(slots=True)
class CachedRequestData:
    """The difference since the last step, for a request that the worker knows."""

    request_id: str
    new_block_ids: list[int]
    num_computed_tokens: int
    new_token_ids: list[int] = field(default_factory=list)  # that it has not drawn itself


PROMISED_DRAFT = -1  # a draft whose token id the worker's draft model has yet to write


class Decision(NamedTuple):
    """One choice of the scheduler. The sentence is only formed when somebody reads `reason`."""

    request_id: str
    action: str  # a key of DECISION_REASONS
    num_scheduled_tokens: int
    facts: tuple[Any, ...] = ()

    @property
    def reason(self) -> str:
        return DECISION_REASONS[self.action].format(*self.facts)


DECISION_REASONS = {
    "decode": "runs on: its newest token is computed and the next one drawn",
    "forced": "runs on: its newest token and the {0} behind it that its grammar leaves no choice about are computed "
    "together, and the next one drawn",
    "verify": "runs on: its {0} missing token(s) and {1} draft(s) behind them are computed together, and the drafts "
    "that would have been drawn anyway are kept",
    "prefill": "admitted or continued: the rest of its tokens ({0}, after {1} already in the cache) "
    "fits this step's budget",
    "chunk": "computes {0} of {1} missing tokens; {2}",
    "wait_blocks": "waits for blocks: needs {0}, {1} are free",
    "wait_budget": "waits for budget: {0} tokens left in this step, {1} needed (chunked prefill is {2})",
    "wait_seqs": "waits for a place: {0} of {0} sequences are running",
    "wait_preemption": "waits: {0} was preempted in this step, so nobody new is admitted",
    "wait_line": "waits in line behind {0}",
    "preempt": "preempted so that {0} can grow: {1} blocks were free, {2} needed; "
    "it keeps its output and resumes first",
}


@dataclass(slots=True)
class SchedulerOutput:
    """One step: who computes how many tokens, and where their keys and values go.

    `num_scheduled_tokens` fixes the order of the requests in the batch.
    """

    step: int
    scheduled_new_reqs: list[NewRequestData]
    scheduled_cached_reqs: list[CachedRequestData]
    num_scheduled_tokens: dict[str, int]
    total_num_scheduled_tokens: int
    preempted_req_ids: list[str]
    finished_req_ids: list[str]  # since the last step; the worker forgets them
    decisions: list[Decision]
    # Drafts behind the newest token of a request, counted in num_scheduled_tokens. PROMISED_DRAFT: the worker fills in.
    draft_token_ids: dict[str, list[int]] = field(default_factory=dict)


# ------------------------------------------------------------------ worker -> scheduler
# The error of a request whose own fields contradict each other: its caller's, where every other one is the engine's.
NO_TOKEN_LEFT = "No token can be drawn: the masks (grammar, allowed_token_ids, bad_words, min_tokens) leave none."


@dataclass(slots=True)
class Logprob:
    """The log-probability of one token at one position. rank 1 is the most likely token."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class TokenLogprobs:
    """Log-probabilities at one position: the token itself first, then the most likely ones, best first."""

    token_ids: list[int]  # [1 + num_logprobs]
    logprobs: list[float]  # [1 + num_logprobs]
    rank: int  # of the token itself, 1-based


@dataclass(slots=True)
class ModelRunnerOutput:
    """What one step produced. A request that sampled nothing (a prefill chunk) is absent from the dicts.

    A request with drafts samples one token more than it accepts drafts: 1 to 1 + len(drafts) of them.
    """

    sampled_token_ids: dict[str, list[int]]
    logprobs: dict[str, list[TokenLogprobs]]  # one entry per sampled token, for requests that asked
    prompt_logprobs: dict[str, list[TokenLogprobs]]  # the positions computed in this step, in order
    pooler_output: dict[str, list[float]]
    errors: dict[str, str] = field(default_factory=dict)  # request -> why it cannot go on (its logits are NaN)


# ------------------------------------------------------------------ scheduler -> engine
@dataclass(slots=True)
class EngineCoreOutput:
    """What one step meant for one request. finish_reason is None while it runs."""

    request_id: str
    new_token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None  # stop | length | abort | error
    stop_reason: int | None = None
    num_cached_tokens: int = 0
    pooler_output: list[float] | None = None
    error: str | None = None


# ------------------------------------------------------------------ engine -> caller
@dataclass(slots=True)
class CompletionOutput:
    """One generated sequence. finish_reason: stop | length | abort | error; None while it runs.

    stop_reason is the stop string or stop token id that ended it, None for eos.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """The answer to one prompt so far. prompt_logprobs[0] is None: nothing predicts the first token."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)  # arrival, first token, finish: seconds
    error: str | None = None  # why finish_reason is "error"


@dataclass(slots=True)
class EmbeddingOutput:
    embedding: list[float]  # [hidden_size], L2-normalised


@dataclass(slots=True)
class EmbeddingRequestOutput:
    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    finished: bool = True
    error: str | None = None


@dataclass(slots=True)
class ScoringOutput:
    score: float  # cosine similarity in [-1, 1]


@dataclass(slots=True)
class ScoringRequestOutput:
    request_id: str
    outputs: ScoringOutput
    prompt_token_ids: list[int]
    finished: bool = True


@dataclass(slots=True)
class BeamSearchSequence:
    """tokens include the prompt; text does not."""

    tokens: list[int]
    cum_logprob: float
    text: str = ""
    finish_reason: str = "length"  # stop when the beam ended in eos
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)


@dataclass(slots=True)
class BeamSearchOutput:
    sequences: list[BeamSearchSequence]  # best first
