"""The draft model's cache: slot by slot what the target's cache holds, whatever happens to the requests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minivllm import LLMEngine, SamplingParams


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 12},
        {"num_gpu_blocks_override": 8},
        {"enable_prefix_caching": False, "block_size": 4},
    ],
    ids=str,
)
def test_a_model_and_its_own_copy_hold_the_same_bits_in_every_slot(
    options: dict[str, Any], tiny_model: Callable[[str], Path]
):
    """Chance and a strong bias make half of the drafts wrong; unwritten slots are NaN on both sides."""
    folder = tiny_model("llama")
    config = {"method": "draft_model", "model": str(folder), "num_speculative_tokens": 3, "min_acceptance_rate": 0.0}
    engine = LLMEngine.from_model(
        folder,
        dtype="float32",
        batch_invariant=True,
        speculative_config=config,
        poison=True,
        **{"num_gpu_blocks_override": 40, **options},
    )
    for turn in range(2):  # the second time with prefix cache hits
        for index in range(4):
            prompt = {"prompt_token_ids": list(range(5, 24 + index))}
            params = SamplingParams(temperature=0.3 * (index % 2), seed=index, max_tokens=20 + turn, ignore_eos=True)
            engine.add_request(prompt, params)
        while engine.has_unfinished_requests():
            engine.step()
            assert_same_bits(engine)
    stats = engine.stats.spec_decode
    assert stats is not None and 0 < stats.num_accepted_tokens < stats.num_draft_tokens
    assert (engine.scheduler.num_preemptions > 0) == (options.get("num_gpu_blocks_override") == 8)


def assert_same_bits(engine: LLMEngine) -> None:
    runner = engine._executor._runner
    assert runner is not None and runner.draft_model is not None
    for target, draft in zip(runner.kv_caches, runner.draft_model.path.kv_caches, strict=True):
        for ours, copy in zip(target, draft, strict=True):
            assert ((ours == copy) | (ours.isnan() & copy.isnan())).all()
            assert torch.isfinite(ours).any()
