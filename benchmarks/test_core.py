"""What the scheduler and the block pool cost per step: pytest benchmarks/test_core.py -n 0 --benchmark-columns=median

Figures only; test_growth.py holds the laws that they must keep, on the same work.
"""

from collections.abc import Callable
from typing import Any

import pytest

from minivllm import SamplingParams
from minivllm.config import CacheConfig, SchedulerConfig
from minivllm.core.block_pool import BlockPool
from minivllm.core.request import Request
from minivllm.core.scheduler import Scheduler
from minivllm.outputs import ModelRunnerOutput


def decoding(num_running: int, num_waiting: int = 0) -> Scheduler:
    """A scheduler whose requests are past their prompts, with others in line behind them."""
    config = SchedulerConfig(max_num_seqs=num_running, max_num_batched_tokens=8192, max_model_len=100_000)
    scheduler = Scheduler(config, CacheConfig(), num_blocks=num_running * 6300)
    params = SamplingParams(max_tokens=90_000, temperature=0)
    for index in range(num_running + num_waiting):
        scheduler.add_request(Request(f"r{index}", list(range(64)), params, max_tokens=90_000, arrival=index))
    while len(scheduler.running) < num_running:
        step(scheduler)
    return scheduler


def step(scheduler: Scheduler) -> None:
    """Everything but the model: one token for each request that has caught up."""
    output = scheduler.schedule()
    drawn = {
        request.request_id: [7]
        for request in scheduler.running
        if request.num_computed_tokens + output.num_scheduled_tokens.get(request.request_id, 0) == request.num_tokens
    }
    scheduler.update_from_output(output, ModelRunnerOutput(drawn, {}, {}, {}))


@pytest.mark.parametrize("num_running", [1, 16, 64, 256])
def test_a_step_of_running_requests(benchmark: Any, num_running: int) -> None:
    benchmark.extra_info["requests"] = num_running
    benchmark(step, decoding(num_running))


@pytest.mark.parametrize("num_waiting", [1, 64, 4096])
def test_a_step_with_others_in_line(benchmark: Any, num_waiting: int) -> None:
    benchmark(step, decoding(16, num_waiting))


def take_and_free(num_blocks: int) -> Callable[[], None]:
    """100 times: a block is taken from a pool of `num_blocks` and freed."""
    pool = BlockPool(num_blocks)

    def turn() -> None:
        for _ in range(100):
            pool.free(pool.get_new_blocks(1))

    return turn


def revive_and_free(num_blocks: int) -> Callable[[], None]:
    """100 times: a cached block is taken out of the middle of the free queue and freed."""
    pool = BlockPool(num_blocks)
    block = pool.get_new_blocks(num_blocks // 2)[-1]
    pool.cache(block, b"prefix")
    pool.free([block])

    def turn() -> None:
        for _ in range(100):
            pool.touch([block])
            pool.free([block])

    return turn


@pytest.mark.parametrize("num_blocks", [1_000, 100_000])
@pytest.mark.parametrize("work", [take_and_free, revive_and_free])
def test_blocks(benchmark: Any, work: Callable[[int], Callable[[], None]], num_blocks: int) -> None:
    benchmark(work(num_blocks))
