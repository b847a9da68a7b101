"""With speculative decoding on, still what transformers says: ids, logprobs, ends, whoever guesses and however it runs.

n-gram lookup is right now and then, a model that drafts for itself always, another one of the same vocabulary hardly
ever. Cache slots that nobody has written are NaN, in both caches.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from golden.cases import Case, read_cases
from golden.tiny import DECODERS
from minivllm import LLM, LLMEngine, RequestOutput
from tests.golden.compare import compare_case, sampling_params

GUESSERS = ("ngram", "itself", "another")
SCHEDULES: dict[str, dict[str, Any]] = {
    "batched": {},
    "chunked": {"max_num_batched_tokens": 13, "long_prefill_token_threshold": 9},
    "preempted": {"num_gpu_blocks_override": 10},
    "alone": {"max_num_seqs": 1, "block_size": 4},
}


def speculative_config(guesser: str, name: str, tiny_model: Callable[[str], Path]) -> dict[str, Any]:
    """On for any batch, and never paused."""
    always = {"num_speculative_tokens": 3, "disable_by_batch_size": 64, "min_acceptance_rate": 0.0}
    if guesser == "ngram":
        return {"method": "ngram", "prompt_lookup_max": 3, "prompt_lookup_min": 1, **always}
    draft = name if guesser == "itself" else "llama" if name != "llama" else "qwen3"
    return {"method": "draft_model", "model": str(tiny_model(draft)), **always}


def run(engine: LLMEngine, cases: list[Case]) -> int:
    """All of them at once, compared. Returns how often somebody was preempted."""
    names = [engine.add_request({"prompt_token_ids": case["prompt"]}, sampling_params(case)) for case in cases]
    finished: dict[str, RequestOutput] = {}
    while engine.has_unfinished_requests():
        finished.update((output.request_id, output) for output in engine.step())
    for case, request_id in zip(cases, names, strict=True):
        tie = compare_case(case, finished[request_id])
        if tie is not None:
            print(tie)
    engine.scheduler.check_integrity()
    return engine.scheduler.num_preemptions


def make_engine(name: str, guesser: str, schedule: str, tiny_model: Callable[[str], Path]) -> LLMEngine:
    config = speculative_config(guesser, name, tiny_model)
    options = {"kv_cache_memory_bytes": 4 << 20, **SCHEDULES[schedule]}
    return LLMEngine.from_model(tiny_model(name), dtype="float32", speculative_config=config, poison=True, **options)


def check_rate(engine: LLMEngine, guesser: str) -> None:
    """Drafts were verified, and so many of them came true as the guesser promises: penalties and masks cost some."""
    stats = engine.stats.spec_decode
    assert stats is not None and stats.num_drafts > 10
    rate = stats.num_accepted_tokens / stats.num_draft_tokens
    lowest, highest = {"ngram": (0.001, 0.98), "itself": (0.5, 1.0), "another": (0.0, 0.2)}[guesser]
    assert lowest <= rate <= highest, rate


@pytest.mark.parametrize("name", [name for name in DECODERS if name != "llama"])
def test_guesses_change_no_token_and_no_logprob(name: str, tiny_model: Callable[[str], Path]) -> None:
    """Every third greedy case, each model on a schedule of its own."""
    for index, guesser in enumerate(("ngram", "itself")):
        schedule = list(SCHEDULES)[(index + DECODERS.index(name)) % len(SCHEDULES)]
        engine = make_engine(name, guesser, schedule, tiny_model)
        run(engine, read_cases(name, "greedy")[index::3])
        check_rate(engine, guesser)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("guesser", GUESSERS)
def test_no_schedule_changes_a_guessed_token(guesser: str, schedule: str, tiny_model: Callable[[str], Path]) -> None:
    engine = make_engine("llama", guesser, schedule, tiny_model)
    cases = read_cases("llama", "greedy")
    num_preemptions = run(engine, cases)
    assert (num_preemptions > 0) == (schedule == "preempted")
    num_hits = engine.scheduler.num_prefix_cache_hits
    run(engine, cases[::3])  # the second time, the prefix cache knows the prompts, and so does the draft model's cache
    assert engine.scheduler.num_prefix_cache_hits > num_hits
    check_rate(engine, guesser)


def test_the_default_model_copies_what_it_read() -> None:
    """Four of the 32 golden prompts, n-gram lookup on: the ids of transformers."""
    cases = [case for case in read_cases("default") if case["prompt_steps"] is None][:4]
    llm = LLM(
        dtype="float32",
        max_model_len=512,
        kv_cache_memory_bytes=128 << 20,
        speculative_config={"method": "ngram", "num_speculative_tokens": 6},
    )
    prompts = [{"prompt_token_ids": case["prompt"]} for case in cases]
    outputs = llm.generate(prompts, [sampling_params(case) for case in cases], use_tqdm=False)
    for case, output in zip(cases, outputs, strict=True):
        tie = compare_case(case, output)
        if tie is not None:
            print(tie)
    stats = llm.llm_engine.stats.spec_decode
    assert stats is not None and stats.num_accepted_tokens > 0
