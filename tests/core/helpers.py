"""Short ways to build what the tests of core talk about. Prompts are ranges of ints: token ids are only names here."""

from __future__ import annotations

from collections.abc import Iterable

from minivllm.config import CacheConfig, SchedulerConfig
from minivllm.core.block_pool import KVCacheBlock
from minivllm.core.request import Request
from minivllm.core.scheduler import Scheduler
from minivllm.outputs import Decision, EngineCoreOutput, ModelRunnerOutput, SchedulerOutput
from minivllm.sampling_params import SamplingParams

EOS = 2
DRAWN = 7  # what the runner of these tests draws unless told otherwise


def make_request(request_id: str, prompt: Iterable[int], *, max_tokens: int = 16, **fields) -> Request:
    """A generating request. `min_tokens` goes the way it goes in the engine: through SamplingParams."""
    params = SamplingParams(max_tokens=None, min_tokens=fields.pop("min_tokens", 0))
    return Request(request_id, list(prompt), params, max_tokens=max_tokens, **fields)


def make_scheduler(num_blocks: int = 11, block_size: int = 4, enable_prefix_caching: bool = True, **limits) -> Scheduler:
    """Ten usable blocks of four tokens (block 0 is the null block), and a budget that binds only where a test says so."""
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
    scheduler: Scheduler, step: SchedulerOutput, token_ids: dict[str, int] | None = None, **result
) -> ModelRunnerOutput:
    """What the runner answers: one token (DRAWN, or as given) for each request whose last token was computed."""
    sampled = {}
    for request_id, num_tokens in step.num_scheduled_tokens.items():
        request = scheduler.requests.get(request_id)
        if request is not None and request.num_computed_tokens + num_tokens == request.num_tokens:
            sampled[request_id] = [(token_ids or {}).get(request_id, DRAWN)]
    return ModelRunnerOutput(sampled, {}, {}, result.pop("pooler_output", {}), **result)


def run_step(
    scheduler: Scheduler, token_ids: dict[str, int] | None = None, **result
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
