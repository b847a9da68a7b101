"""FakeRunner: a worker without a model, which remembers what really lies in every slot of the cache.

    slots[block_id * block_size + offset] = (token id, position, digest of the whole prefix up to here)

Like a real step it writes the keys of all requests first and then reads each one's whole context; a slot that does
not hold exactly the right token of the right prefix is an error. A stale hash, a block given away too early, a table
with two writers or a wrong num_computed_tokens cannot pass. The next token is a function of prefix and seed only, so
the right output of a request is known without any engine (`expected_output`).

Drafts are verified as a real worker does it: written behind the newest token, and drawn from while they come true.

It also checks the protocol: new requests are unknown, continued ones are known, finished and preempted ones vanish.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass

from minivllm.core.request import FinishReason, Request
from minivllm.outputs import CachedRequestData, ModelRunnerOutput, NewRequestData, SchedulerOutput

VOCAB_SIZE = 6
TORN = "torn"  # what a step that broke, or a request with NaN logits, leaves in a slot
NAN = "the logits are not finite"


class CacheError(AssertionError):
    """The schedule made a request read or write a wrong slot, or broke the protocol."""


class StepFailed(RuntimeError):
    """The injected failure of a whole step."""


def root_digest(cache_salt: str | None) -> int:
    return zlib.crc32(repr(cache_salt).encode())


def extend_digest(digest: int, token_id: int) -> int:
    return (digest * 6364136223846793005 + (token_id + 1) * 1442695040888963407) % 2**64


def prefix_digest(cache_salt: str | None, token_ids: list[int]) -> int:
    digest = root_digest(cache_salt)
    for token_id in token_ids:
        digest = extend_digest(digest, token_id)
    return digest


def next_token_id(digest: int, seed: int) -> int:
    return (extend_digest(digest, seed) >> 33) % VOCAB_SIZE


def expected_output(request: Request, max_model_len: int) -> tuple[list[int], FinishReason]:
    """The sequential reference: one request alone, no cache, no scheduler; the stop rules written once more."""
    digest = prefix_digest(request.cache_salt, request.all_token_ids[: request.num_prompt_tokens])
    output: list[int] = []
    if request.is_pooling:
        return output, FinishReason.STOP
    while True:
        token_id = next_token_id(digest, request.seed)
        output.append(token_id)
        digest = extend_digest(digest, token_id)
        ends = token_id in request.eos_token_ids or token_id in request.stop_token_ids
        if ends and len(output) >= request.min_tokens:
            return output, FinishReason.STOP
        if len(output) == request.max_tokens or request.num_prompt_tokens + len(output) == max_model_len:
            return output, FinishReason.LENGTH


@dataclass
class RequestState:
    """What the worker keeps of a request."""

    token_ids: list[int]
    block_ids: list[int]
    num_computed_tokens: int
    seed: int
    is_pooling: bool
    draft_token_ids: list[int]  # of the running step


class FakeRunner:
    """`salt_of` tells the salt that a request was added with: part of what its slots must hold."""

    def __init__(self, num_blocks: int, block_size: int, salt_of: Callable[[str], str | None]):
        self.block_size = block_size
        self.salt_of = salt_of
        self.slots: list[tuple[int, int, int] | str | None] = [None] * (num_blocks * block_size)
        self.torn_now: set[int] = set()  # slots that a broken request wrote in the running step
        self.states: dict[str, RequestState] = {}

    def execute(
        self, step: SchedulerOutput, broken: Collection[str] = (), fail_after: int | None = None
    ) -> ModelRunnerOutput:
        """Run one step. `broken` requests compute NaN; with `fail_after` the step raises after that many slots."""
        self._update_states(step)
        self._write_all(step, broken, fail_after)
        result = ModelRunnerOutput({}, {}, {}, {})
        for request_id, num_tokens in step.num_scheduled_tokens.items():
            state = self.states[request_id]
            end = state.num_computed_tokens + num_tokens
            is_finite, digests = self._read_context(request_id, state, end)
            state.num_computed_tokens = end
            if not is_finite:
                result.errors[request_id] = NAN
            elif end < len(state.token_ids):
                continue
            elif state.is_pooling:
                result.pooler_output[request_id] = [float(digests[-1] % 1000)]
            else:
                result.sampled_token_ids[request_id] = self._draw(state, digests)
                state.num_computed_tokens = len(state.token_ids) - 1
        return result

    def _draw(self, state: RequestState, digests: list[int]) -> list[int]:
        """The next token, and another one behind each draft that it equals."""
        sampled = []
        for digest, draft in zip(digests[len(state.token_ids) - 1 :], [*state.draft_token_ids, None], strict=True):
            sampled.append(next_token_id(digest, state.seed))
            if sampled[-1] != draft:
                break
        state.token_ids += sampled
        return sampled

    def holds(self, block_id: int) -> list[tuple[int, int, int] | str | None]:
        """What lies in the slots of a block."""
        return self.slots[block_id * self.block_size : (block_id + 1) * self.block_size]

    def _update_states(self, step: SchedulerOutput) -> None:
        for request_id in step.finished_req_ids + step.preempted_req_ids:
            if self.states.pop(request_id, None) is None:
                raise CacheError(f"{request_id} ended or was preempted, but the worker never heard of it")
        for new in step.scheduled_new_reqs:
            self._add_state(new)
        for cached in step.scheduled_cached_reqs:
            self._continue_state(cached)
        for request_id, state in self.states.items():
            state.draft_token_ids = step.draft_token_ids.get(request_id, [])
        if not set(step.draft_token_ids) <= {cached.request_id for cached in step.scheduled_cached_reqs}:
            raise CacheError(f"drafts {step.draft_token_ids} for {step.num_scheduled_tokens}")
        told = [new.request_id for new in step.scheduled_new_reqs]
        told += [cached.request_id for cached in step.scheduled_cached_reqs]
        if sorted(told) != sorted(step.num_scheduled_tokens):
            raise CacheError(f"told of {told}, scheduled are {list(step.num_scheduled_tokens)}")

    def _add_state(self, new: NewRequestData) -> None:
        if new.request_id in self.states:
            raise CacheError(f"{new.request_id} is new, but the worker knows it")
        self.states[new.request_id] = RequestState(
            list(new.token_ids), list(new.block_ids), new.num_computed_tokens, new.seed, new.sampling_params is None, []
        )

    def _continue_state(self, cached: CachedRequestData) -> None:
        state = self.states.get(cached.request_id)
        if state is None:
            raise CacheError(f"{cached.request_id} goes on, but the worker does not know it")
        if state.num_computed_tokens != cached.num_computed_tokens:
            raise CacheError(f"{cached.request_id}: {cached.num_computed_tokens} computed, the worker has {state}")
        state.block_ids += cached.new_block_ids
        state.token_ids += cached.new_token_ids

    def _write_all(self, step: SchedulerOutput, broken: Collection[str], fail_after: int | None) -> None:
        num_written = 0
        written: set[int] = set()
        self.torn_now = set()
        for request_id, num_tokens in step.num_scheduled_tokens.items():
            state = self.states[request_id]
            start = state.num_computed_tokens
            digest = prefix_digest(self.salt_of(request_id), state.token_ids[:start])
            token_ids = state.token_ids + state.draft_token_ids
            for position in range(start, start + num_tokens):
                token_id = token_ids[position]
                digest = extend_digest(digest, token_id)
                slot = self._slot(request_id, state, position)
                if slot in written:
                    raise CacheError(f"{request_id} writes slot {slot}, which another request wrote in this step")
                written.add(slot)
                is_torn = request_id in broken or (fail_after is not None and num_written >= fail_after)
                self.slots[slot] = TORN if is_torn else (token_id, position, digest)
                if is_torn:
                    self.torn_now.add(slot)
                num_written += 1
        if fail_after is not None:
            raise StepFailed(f"after {fail_after} of {num_written} slots")

    def _slot(self, request_id: str, state: RequestState, position: int) -> int:
        index = position // self.block_size
        if index >= len(state.block_ids):
            raise CacheError(f"{request_id} has no block for position {position}: {state.block_ids}")
        if state.block_ids[index] == 0:
            raise CacheError(f"{request_id} uses the null block")
        return state.block_ids[index] * self.block_size + position % self.block_size

    def _read_context(self, request_id: str, state: RequestState, end: int) -> tuple[bool, list[int]]:
        """Check every slot of the context. NaN of this very step is read by requests that share the prefix and makes
        their logits NaN too; NaN of an earlier step must never be found again."""
        digest = root_digest(self.salt_of(request_id))
        digests: list[int] = []  # of the prefix that ends in each position
        token_ids = state.token_ids + state.draft_token_ids
        is_finite = True
        for position in range(end):
            token_id = token_ids[position]
            digest = extend_digest(digest, token_id)
            digests.append(digest)
            slot = self._slot(request_id, state, position)
            found = self.slots[slot]
            if slot in self.torn_now:
                is_finite = False
            elif found != (token_id, position, digest):
                wanted = (token_id, position, digest)
                raise CacheError(f"{request_id} reads {found} at position {position}, wanted {wanted}")
        return is_finite, digests
