"""The whole engine on Triton's kernels, in the interpreter: the tokens of transformers, however the steps are cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from golden.cases import Case, read_cases
from minivllm import LLM, SamplingParams

NUM_TOKENS = 6
NUM_CASES = 4
NAMES = ["llama", "llama-rope-yarn", "mistral", "qwen2", "qwen3", "gemma3", "gpt2", "opt"]
SCHEDULES: dict[str, dict[str, Any]] = {
    "batched": {},
    "chunked": {"max_num_batched_tokens": 9, "long_prefill_token_threshold": 5},
    "preempted": {"num_gpu_blocks_override": 6, "max_num_batched_tokens": 64, "max_model_len": 64},
    "one by one": {"max_num_seqs": 1},
    "small blocks": {"block_size": 4},
    "batch-invariant": {"batch_invariant": True},
    "guessed": {
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_min": 1,
            "disable_by_batch_size": 64,
        },
    },
}


def short_cases(name: str) -> list[Case]:
    cases = [case for case in read_cases(name, "greedy") if len(case["prompt"]) < 40]
    return [case for case in cases if case["params"].get("temperature", 0.0) == 0.0][:NUM_CASES]


def first_tokens(model: Path, cases: list[Case], **options: Any) -> list[list[int]]:
    llm = LLM(str(model), dtype="float32", impl="triton", kv_cache_memory_bytes=4 << 20, **options)
    params = [
        SamplingParams(**case["params"] | {"max_tokens": NUM_TOKENS, "logprobs": None, "prompt_logprobs": None})
        for case in cases
    ]
    outputs = llm.generate([{"prompt_token_ids": case["prompt"]} for case in cases], params, use_tqdm=False)
    assert llm.llm_engine.scheduler.num_preemptions > 0 or "num_gpu_blocks_override" not in options
    stats = llm.llm_engine.stats.spec_decode
    assert stats is None or stats.num_draft_tokens > 0
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_those_of_transformers(name: str, tiny_model: Callable[[str], Path]):
    cases = short_cases(name)
    expected = [case["steps"]["token_ids"][:NUM_TOKENS] for case in cases]
    assert first_tokens(tiny_model(name), cases) == expected


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_schedule_changes_a_token(schedule: str, tiny_model: Callable[[str], Path]):
    cases = short_cases("llama")
    expected = [case["steps"]["token_ids"][:NUM_TOKENS] for case in cases]
    assert first_tokens(tiny_model("llama"), cases, **SCHEDULES[schedule]) == expected


def test_a_cached_prefix_changes_no_token(tiny_model: Callable[[str], Path]):
    cases = short_cases("llama")
    llm = LLM(str(tiny_model("llama")), dtype="float32", impl="triton", block_size=4, kv_cache_memory_bytes=4 << 20)
    longest = max(cases, key=lambda case: len(case["prompt"]))
    prompt, params = {"prompt_token_ids": longest["prompt"]}, SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS)
    cold, warm = (llm.generate(prompt, params, use_tqdm=False)[0] for _ in range(2))
    assert warm.num_cached_tokens > 0
    assert warm.outputs[0].token_ids == cold.outputs[0].token_ids == longest["steps"]["token_ids"][:NUM_TOKENS]
