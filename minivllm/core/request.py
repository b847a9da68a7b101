"""Request: one sequence on its way through the engine, as the scheduler sees it.

A request is behind by `num_tokens - num_computed_tokens`; a step lets it catch up. That one counter stands
for prefill, chunk, decode and resume after a preemption alike.

Knows no text, no tensor, no block (kv_cache_manager.py owns those). Made by engine/llm_engine.py.
Twin in vLLM: vllm/v1/request.py.
"""

from __future__ import annotations

import enum

from minivllm.sampling_params import SamplingParams


class FinishReason(enum.StrEnum):
    """Why a request ended, in the words of the wire."""

    STOP = "stop"  # eos, a stop token id, or (told by the engine) a stop string
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class RequestStatus(enum.Enum):
    """WAITING -> RUNNING -> FINISHED, with RUNNING -> PREEMPTED -> RUNNING any number of times."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    PREEMPTED = enum.auto()
    FINISHED = enum.auto()


class Request:
    """State of one sequence.

    Args:
        sampling_params: None makes it a pooling request: it ends when its last token is computed.
        max_tokens: output limit, already clamped to the context.
        stop_token_ids: end the output; the caller's own, reported as stop_reason.
        eos_token_ids: end the output silently; empty with ignore_eos.
        seed: of the request's draws.
        arrival: a counter; smaller came first.
        skip_prefix_cache: every position must be computed (prompt logprobs, mean pooling).
    """

    __slots__ = (
        "all_token_ids",
        "arrival",
        "bad_words_token_ids",
        "block_hashes",
        "cache_salt",
        "draft_token_ids",
        "eos_token_ids",
        "finish_reason",
        "max_tokens",
        "min_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_preemptions",
        "num_prompt_logprobs_done",
        "num_prompt_tokens",
        "priority",
        "request_id",
        "sampling_params",
        "seed",
        "skip_prefix_cache",
        "status",
        "stop_reason",
        "stop_token_ids",
        "untold_token_ids",
    )

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        sampling_params: SamplingParams | None,
        *,
        max_tokens: int = 0,
        eos_token_ids: frozenset[int] = frozenset(),
        stop_token_ids: frozenset[int] = frozenset(),
        bad_words_token_ids: list[list[int]] | None = None,
        seed: int = 0,
        priority: int = 0,
        arrival: int = 0,
        cache_salt: str | None = None,
        skip_prefix_cache: bool = False,
    ):
        self.request_id = request_id
        self.all_token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(prompt_token_ids)
        self.sampling_params = sampling_params
        self.max_tokens = max_tokens
        self.min_tokens = sampling_params.min_tokens if sampling_params else 0
        self.eos_token_ids = eos_token_ids
        self.stop_token_ids = stop_token_ids
        self.bad_words_token_ids = bad_words_token_ids or []
        self.seed = seed
        self.priority = priority
        self.arrival = arrival
        self.cache_salt = cache_salt
        self.skip_prefix_cache = skip_prefix_cache

        self.status = RequestStatus.WAITING
        self.num_computed_tokens = 0  # tokens whose keys and values are in the cache
        self.num_cached_tokens = 0  # of these, found in the prefix cache at the first admission
        self.num_preemptions = 0
        self.num_prompt_logprobs_done = 0  # reported; a resumed request computes its prompt a second time
        self.untold_token_ids: list[int] = []  # appended without being drawn; the worker learns them with the next step
        self.draft_token_ids: list[int] = []  # guesses of what follows, for the next step only
        self.block_hashes: list[bytes] = []  # of the full blocks, extended as tokens arrive
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.all_token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.all_token_ids[self.num_prompt_tokens :]

    @property
    def is_pooling(self) -> bool:
        return self.sampling_params is None

    @property
    def is_finished(self) -> bool:
        return self.status is RequestStatus.FINISHED

    def finish(self, reason: FinishReason, stop_reason: int | None = None) -> None:
        self.status = RequestStatus.FINISHED
        self.finish_reason = reason
        self.stop_reason = stop_reason

    def append_output_token(self, token_id: int, max_model_len: int) -> bool:
        """Add one drawn token and say whether it ends the request.

        The order is eos, stop token ids, length; below min_tokens only the length can end it.
        """
        self.all_token_ids.append(token_id)
        num_output_tokens = len(self.all_token_ids) - self.num_prompt_tokens
        if num_output_tokens >= self.min_tokens:
            if token_id in self.eos_token_ids:
                self.finish(FinishReason.STOP)
                return True
            if token_id in self.stop_token_ids:
                self.finish(FinishReason.STOP, token_id)
                return True
        if num_output_tokens >= self.max_tokens or len(self.all_token_ids) >= max_model_len:
            self.finish(FinishReason.LENGTH)
            return True
        return False

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id!r}, {self.status.name.lower()}, computed {self.num_computed_tokens} of "
            f"{self.num_tokens} tokens, prompt {self.num_prompt_tokens})"
        )
