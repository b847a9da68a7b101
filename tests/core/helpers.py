"""Short ways to build what the tests of core talk about. Prompts are ranges of ints: token ids are only names here."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

import minivllm.core
from minivllm.config import CacheConfig, SchedulerConfig
from minivllm.core.block_pool import KVCacheBlock
from minivllm.core.request import Request
from minivllm.core.scheduler import Scheduler
from minivllm.outputs import Decision, EngineCoreOutput, ModelRunnerOutput, SchedulerOutput
from minivllm.sampling_params import SamplingParams

CORE_FOLDER = minivllm.core.__path__[0]
EOS = 2
DRAWN = 7  # what the runner of these tests draws unless told otherwise


def make_request(request_id: str, prompt: Iterable[int], *, max_tokens: int = 16, **fields: Any) -> Request:
    """A generating request. `min_tokens` goes the way it goes in the engine: through SamplingParams."""
    params = SamplingParams(max_tokens=None, min_tokens=fields.pop("min_tokens", 0))
    return Request(request_id, list(prompt), params, max_tokens=max_tokens, **fields)


def make_scheduler(
    num_blocks: int = 11, block_size: int = 4, enable_prefix_caching: bool = True, **limits: Any
) -> Scheduler:
    """Ten usable blocks of four tokens (block 0 is the null block); the budget binds only where a test says so."""
    limits.setdefault("max_num_batched_tokens", 64)
    limits.setdefault("max_model_len", 64)
    cache_config = CacheConfig(block_size=block_size, enable_prefix_caching=enable_prefix_caching)
    return Scheduler(SchedulerConfig(**limits), cache_config, num_blocks)


def add(scheduler: Scheduler, *requests: Request) -> None:
    """Add requests in order; arrival counts up, as the engine's does."""
    for request in requests:
        request.arrival = len(scheduler.requests)
        scheduler.add_request(request)


def drawn(
    scheduler: Scheduler, step: SchedulerOutput, token_ids: dict[str, int] | None = None, **result: Any
) -> ModelRunnerOutput:
    """What the runner answers: one token (DRAWN, or as given) for each request whose last token was computed."""
    sampled = {}
    for request_id, num_tokens in step.num_scheduled_tokens.items():
        request = scheduler.requests.get(request_id)
        if request is not None and request.num_computed_tokens + num_tokens == request.num_tokens:
            sampled[request_id] = [(token_ids or {}).get(request_id, DRAWN)]
    return ModelRunnerOutput(sampled, {}, {}, result.pop("pooler_output", {}), **result)


def run_step(
    scheduler: Scheduler, token_ids: dict[str, int] | None = None, **result: Any
) -> tuple[SchedulerOutput, list[EngineCoreOutput]]:
    """One whole step: schedule, draw, update."""
    step = scheduler.schedule()
    return step, scheduler.update_from_output(step, drawn(scheduler, step, token_ids, **result))


def ids(blocks: Iterable[KVCacheBlock]) -> list[int]:
    return [block.block_id for block in blocks]


def running_ids(scheduler: Scheduler) -> list[str]:
    return [request.request_id for request in scheduler.running]


def waiting_ids(scheduler: Scheduler) -> list[str]:
    return [request.request_id for request in scheduler.waiting]


def block_ids(scheduler: Scheduler, request_id: str) -> list[int]:
    return scheduler.kv_cache.tables[request_id].block_ids


def decision(step: SchedulerOutput, request_id: str) -> Decision:
    """The only decision of this step about the request."""
    [found] = [d for d in step.decisions if d.request_id == request_id]
    return found


# ------------------------------------------------------------------ work, counted and not timed
def lines_executed(call: Callable[[], object]) -> int:
    """How many lines of core a call runs: the same on every machine, however busy. A loop inside C counts once.

    Other people's lines are not counted: the garbage collector may call back into Python at any moment.
    """
    count = 0

    def trace(frame: FrameType, event: str, _argument: object) -> Callable[..., Any]:
        nonlocal count
        count += event == "line" and frame.f_code.co_filename.startswith(CORE_FOLDER)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


class CountingQueue(OrderedDict):
    """A free queue that counts what is asked of it, and every entry that somebody walks past."""

    num_calls = 0
    num_entries_walked = 0

    def __setitem__(self, key: int, value: KVCacheBlock) -> None:
        self.num_calls += 1
        super().__setitem__(key, value)

    def __delitem__(self, key: int) -> None:
        self.num_calls += 1
        super().__delitem__(key)

    def popitem(self, last: bool = True) -> tuple[int, KVCacheBlock]:
        self.num_calls += 1
        return super().popitem(last)

    def move_to_end(self, key: int, last: bool = True) -> None:
        self.num_calls += 1
        super().move_to_end(key, last)

    def __iter__(self) -> Iterator[int]:
        for key in super().__iter__():
            self.num_entries_walked += 1
            yield key
