"""One crowded engine for the tests of a trace: three requests run at a time, and eleven blocks are all there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from minivllm import LLM, SamplingParams
from minivllm.trace import Trace

PROMPTS = ["the value is what the value", "the value is what the value for", "on the road", "red"]
PARAMS = SamplingParams(temperature=0.8, top_p=0.9, top_k=20, repetition_penalty=1.2, max_tokens=20, ignore_eos=True)


@pytest.fixture(scope="session")
def crowded(tiny_model: Callable[[str], Path]) -> Callable[[], LLM]:
    """A new engine with every call."""

    def make(**settings: object) -> LLM:
        chosen = {"num_gpu_blocks_override": 12, "max_num_seqs": 3, "block_size": 8, "max_num_batched_tokens": 24}
        return LLM(tiny_model("llama"), dtype="float32", seed=7, **(chosen | settings))

    return make


@pytest.fixture(scope="module")
def llm(crowded: Callable[[], LLM]) -> Iterator[LLM]:
    llm = crowded()
    yield llm
    assert llm.llm_engine._watcher is None and llm.llm_engine._executor._runner.watcher is None


@pytest.fixture(scope="module")
def trace(llm: LLM) -> Trace:
    return llm.trace(PROMPTS, PARAMS)
