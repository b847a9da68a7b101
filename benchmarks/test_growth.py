"""How cost may grow, as laws that pass or fail: pytest benchmarks/test_growth.py -n 0 -s

Ratios of times taken in turns, always of the fastest run, so that a machine which is only sometimes busy does not
decide. Not among the ordinary tests, which hold no timed assertion. The first two and the last one run the default
model, for several minutes on two cores; -s shows how far they are.
"""

import random
import time
from collections.abc import Callable, Generator, Iterator
from functools import partial

import pytest
from test_core import decoding, revive_and_free, step, take_and_free

from minivllm import LLM, SamplingParams
from minivllm.engine.llm_engine import LLMEngine

# requests -> at most so many times the step of one: 1.6 for 8, from there as the requests
BATCHES = {1: 1.0, 8: 1.6, 32: 6.4, 64: 12.8}
CONTEXTS = (128, 1024, 4096, 8000)
LINE = 1.15  # a step at the longest context, of what the line through the others says
BLOCKS = 1.5  # block operations at 100,000 blocks, of those at 1,000
WAITING = 1.5  # a step with 4,096 in line, of one with 1
MICROSECONDS_PER_REQUEST = 5.0
OUTPUT_TOKENS = 4000
TURNS = 50
OUTPUT = 1.1  # a step after many output tokens, of one at the same context after a prompt


@pytest.fixture(scope="module")
def engine() -> Iterator[LLMEngine]:
    yield LLM(max_model_len=8192, max_num_seqs=64, enable_prefix_caching=False).llm_engine


def prompt(num_tokens: int) -> dict[str, list[int]]:
    return {"prompt_token_ids": [random.randrange(20, 49_000) for _ in range(num_tokens)]}


def start_decoding(engine: LLMEngine, num_requests: int, context: int, num_steps: int) -> Generator[float, None, None]:
    """Seconds of each of `num_steps` steps that only decode, with prompts of `context` tokens."""
    # A prompt that is done already decodes while the others are read.
    params = SamplingParams(temperature=0, max_tokens=num_steps + num_requests + 10, ignore_eos=True)
    ids = [engine.add_request(prompt(context), params) for _ in range(num_requests)]
    try:
        while len(engine.step()) < num_requests:
            pass
        for _ in range(num_steps):
            start = time.perf_counter()
            engine.step()
            yield time.perf_counter() - start
    finally:
        for request_id in ids:
            engine.abort_request(request_id)


def fastest(run: Callable[[], object], repeats: int = 300) -> float:
    """Seconds of the fastest of `repeats` runs."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def test_a_step_of_a_batch(engine: LLMEngine) -> None:
    """The weights are read once for all."""
    best = dict.fromkeys(BATCHES, float("inf"))
    for turn in range(3):
        for num_requests in BATCHES:
            best[num_requests] = min(best[num_requests], *start_decoding(engine, num_requests, 64, 10))
        print(f"\nturn {turn + 1} of 3, ms:", {n: round(1000 * seconds, 1) for n, seconds in best.items()}, flush=True)
    ratios = {num_requests: seconds / best[1] for num_requests, seconds in best.items()}
    print("times one request:", {n: round(ratio, 2) for n, ratio in ratios.items()})
    assert all(ratios[num_requests] <= most for num_requests, most in BATCHES.items()), ratios


def test_a_step_at_a_long_context(engine: LLMEngine) -> None:
    """A token more costs the reading of its keys and values, no matter how many there are: a line, no parabola."""
    best = dict.fromkeys(CONTEXTS, float("inf"))
    for turn in range(2):
        for context in CONTEXTS:
            best[context] = min(best[context], *start_decoding(engine, 1, context, 20))
            print(f"\nturn {turn + 1} of 2, context {context}: {1000 * best[context]:.2f} ms", flush=True)
    first, _, third, last = CONTEXTS
    line = best[first] + (best[third] - best[first]) * (last - first) / (third - first)
    print(f"the line says {1000 * line:.2f} ms")
    assert best[last] <= LINE * line


@pytest.mark.parametrize("work", [take_and_free, revive_and_free])
def test_blocks_cost_the_same_among_many(work: Callable[[int], Callable[[], None]]) -> None:
    few, many = fastest(work(1_000)), fastest(work(100_000))
    print(f"\n{work.__name__}: {1e6 * few / 100:.2f} and {1e6 * many / 100:.2f} microseconds, {many / few:.2f} times")
    assert many <= BLOCKS * few


def test_those_in_line_cost_nothing() -> None:
    """Schedule and update of 16 running requests."""
    seconds = {n: fastest(partial(step, decoding(16, n))) for n in (1, 64, 4096)}
    print("\nmicroseconds a step, by requests in line:", {n: round(1e6 * value, 1) for n, value in seconds.items()})
    assert max(seconds.values()) <= WAITING * seconds[1]


@pytest.mark.parametrize("num_running", [16, 64, 256])
def test_a_running_request_costs_little(num_running: int) -> None:
    scheduler = decoding(num_running)
    microseconds = 1e6 * fastest(partial(step, scheduler)) / num_running
    print(f"\n{num_running} running: {microseconds:.2f} microseconds each")
    assert microseconds <= MICROSECONDS_PER_REQUEST


def test_a_step_late_in_an_answer(engine: LLMEngine) -> None:
    """Step k and step k + 1000 differ by their context alone: nothing walks over what was already written.

    Two engines: one is in a long answer, the other one gets a prompt of that length, and they step in turns.
    """
    other = LLM(max_model_len=8192, enable_prefix_caching=False).llm_engine
    writing = start_decoding(engine, 1, 16, OUTPUT_TOKENS + 200)
    ratios = {}
    for done in range(1000, OUTPUT_TOKENS + 1, 1000):
        for _ in range(1000 - TURNS):
            next(writing)
        fresh = start_decoding(other, 1, 16 + done - TURNS, TURNS)
        late, early = zip(*((next(writing), next(fresh)) for _ in range(TURNS)), strict=True)
        fresh.close()
        ratios[done] = min(late) / min(early)
        print(
            f"\nafter {done} tokens {1000 * min(late):.2f} ms, {ratios[done]:.3f} times that after a prompt", flush=True
        )
    writing.close()
    assert max(ratios.values()) <= OUTPUT, ratios
