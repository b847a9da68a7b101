"""An embedding engine beside a generating one: how much memory it takes, and that the other one leaves it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from minivllm import LLM
from minivllm.engine.beside import blocks_of_a_step, load_embedding_engine, memory_bytes
from minivllm.engine.llm_engine import LLMEngine
from minivllm.errors import ConfigError
from tests.tolerances import UNIT_LENGTH_ATOL


def embed(engine: LLMEngine, prompts: list[list[int]]) -> list[list[float]]:
    ids = [engine.add_request(prompt, embed=True) for prompt in prompts]
    found = {}
    while engine.has_unfinished_requests():
        found.update((output.request_id, output.outputs.embedding) for output in engine.step())
        assert not {"wait_blocks", "preempt"} & {decision.action for decision in engine.decisions()}
    return [found[request_id] for request_id in ids]


def test_an_encoder_keeps_no_cache(tiny_model: Callable[[str], Path]):
    engine = load_embedding_engine(tiny_model("bert-mean"), dtype="float32")
    assert engine.plan.pool_bytes == 0 and memory_bytes(engine) == engine.plan.weight_bytes > 0


@pytest.mark.parametrize(("max_num_seqs", "budget"), [(1, 16), (3, 48), (64, 1024)])
def test_the_cache_of_a_decoder_is_all_that_it_needs(tiny_model: Callable[[str], Path], max_num_seqs: int, budget: int):
    """Nobody ever waits for a block, whatever is asked at once; the vectors are those with room to spare."""
    engine = load_embedding_engine(
        tiny_model("qwen3-embedding"),
        dtype="float32",
        block_size=4,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        enable_prefix_caching=False,
    )
    size = engine.config.model.max_model_len
    assert engine.plan.num_blocks == blocks_of_a_step(size, 4, max_num_seqs, budget)
    lengths = [size, 1, 5, size, 3, 17, 4, size - 1, 2, 2, 2, 33, size]
    prompts = [[5 + (7 * place + length) % 90 for place in range(length)] for length in lengths]
    roomy = LLM(tiny_model("qwen3-embedding"), dtype="float32", num_gpu_blocks_override=512)
    expected = [output.outputs.embedding for output in roomy.embed(prompts, use_tqdm=False)]
    for mine, theirs in zip(embed(engine, prompts), expected, strict=True):
        assert mine == pytest.approx(theirs, abs=UNIT_LENGTH_ATOL)


def test_the_generating_model_leaves_the_memory_that_the_other_one_has(tiny_model: Callable[[str], Path]):
    folder = tiny_model("llama")
    alone = LLMEngine.from_model(folder, gpu_memory_utilization=0.01).plan
    block = alone.bytes_per_block
    beside = LLMEngine.from_model(folder, gpu_memory_utilization=0.01, reserved_memory_bytes=10 * block).plan
    assert beside.num_blocks == alone.num_blocks - 10
    assert f"minus the weights and {10 * block:,} bytes of others" in beside.rule
    with pytest.raises(ConfigError, match="no room for the key/value cache"):
        LLMEngine.from_model(folder, gpu_memory_utilization=0.01, reserved_memory_bytes=2**50)
    with pytest.raises(ConfigError, match="reserved_memory_bytes"):
        LLMEngine.from_model(folder, reserved_memory_bytes=-1)
