"""One model on two ranks, each a process: the same answers, and an end with words when one of them is gone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from golden.tiny import NATIVE_DECODERS
from minivllm import LLM, SamplingParams, StructuredOutputsParams
from minivllm.outputs import RequestOutput
from minivllm.worker import parallel_executor
from minivllm.worker.ranks import Ranks, connect
from tests.tolerances import PARALLEL_LOGPROB_ATOL

ROOT = Path(__file__).parents[2]
# impl: nothing is compiled when a process starts
SMALL: dict[str, Any] = {"dtype": "float32", "num_gpu_blocks_override": 64, "block_size": 4, "impl": "reference"}
PROMPTS = [{"prompt_token_ids": list(range(first, first + length))} for first, length in ((5, 1), (20, 40), (100, 23))]
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=5, prompt_logprobs=2)
Load = Callable[..., LLM]


@pytest.fixture(scope="module", params=["shared memory", "gloo"])
def two_ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    """Two processes that can load one model after the other."""
    num_threads = torch.get_num_threads()
    found = connect(2, "cpu", share_memory=request.param == "shared memory")
    yield found
    found.close()
    torch.set_num_threads(num_threads)


@pytest.fixture
def load(two_ranks: Ranks, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Load:
    """An LLM of a tiny model on both ranks."""
    monkeypatch.setattr(parallel_executor, "connect", lambda size, device_type: two_ranks)
    return lambda name, **options: LLM(tiny_model(name), **SMALL, tensor_parallel_size=2, **options)


def logprobs_of(output: RequestOutput) -> list[dict[int, float]]:
    """Of every prompt and output token: token id -> log-probability."""
    entries = [*(output.prompt_logprobs or [])[1:], *(output.outputs[0].logprobs or [])]
    return [{token_id: found.logprob for token_id, found in entry.items()} for entry in entries if entry]


@pytest.mark.parametrize("name", NATIVE_DECODERS)
def test_two_ranks_say_what_one_says(name: str, load: Load, tiny_model: Callable[[str], Path]):
    expected = LLM(tiny_model(name), **SMALL).generate(PROMPTS, GREEDY, use_tqdm=False)
    llm = load(name, max_num_batched_tokens=16)  # chunks
    found = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    for output, wanted in zip(found, expected, strict=True):
        assert output.outputs[0].token_ids == wanted.outputs[0].token_ids
        assert output.outputs[0].text == wanted.outputs[0].text
        assert len(logprobs_of(output)) == len(wanted.prompt_token_ids) - 1 + 16
        for ours, theirs in zip(logprobs_of(output), logprobs_of(wanted), strict=True):
            assert all(abs(ours[key] - theirs[key]) <= PARALLEL_LOGPROB_ATOL for key in ours.keys() & theirs.keys())
            assert len(ours.keys() & theirs.keys()) >= 2


def test_every_kind_of_request_follows(load: Load, tiny_model: Callable[[str], Path]):
    """Drawn tokens, drafts, forced tokens of a grammar, preemptions: the other rank hears of all of them."""
    options = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "min_acceptance_rate": 0.01}}
    params = [
        SamplingParams(temperature=0, max_tokens=30, ignore_eos=True),
        SamplingParams(temperature=0.9, seed=3, max_tokens=30, ignore_eos=True, presence_penalty=0.5),
        SamplingParams(temperature=0, max_tokens=30, structured_outputs=StructuredOutputsParams(regex="(ab|cd){3}xyz")),
    ]
    repeated = {"prompt_token_ids": [7, 8, 9, 10] * 8}
    prompts = [repeated, PROMPTS[1], PROMPTS[2]]
    crowded = {**SMALL, "num_gpu_blocks_override": 36}
    expected = LLM(tiny_model("llama"), **crowded).generate(prompts, params, use_tqdm=False)
    llm = load("llama", **options)
    for _ in range(2):  # the second time with prefixes from the cache
        found = llm.generate(prompts, params, use_tqdm=False)
        assert [o.outputs[0].token_ids for o in found] == [o.outputs[0].token_ids for o in expected]
    drafts = llm.llm_engine.stats.spec_decode
    assert drafts is not None and drafts.num_drafts > 0


def test_embeddings_of_a_decoder(load: Load, tiny_model: Callable[[str], Path]):
    (expected,) = LLM(tiny_model("qwen3-embedding"), **SMALL).embed(PROMPTS[1], use_tqdm=False)
    (found,) = load("qwen3-embedding").embed(PROMPTS[1], use_tqdm=False)
    difference = torch.tensor(found.outputs.embedding) - torch.tensor(expected.outputs.embedding)
    assert difference.abs().max() <= PARALLEL_LOGPROB_ATOL


def test_each_rank_has_its_heads_and_the_plan_counts_all(load: Load, tiny_model: Callable[[str], Path]):
    one, two = LLM(tiny_model("qwen3"), **SMALL).llm_engine, load("qwen3").llm_engine
    whole = one._executor.model.kv_cache_specs[0].num_kv_heads
    caches = two._executor._runner.kv_caches
    assert caches[0][0].shape[0] == two._executor.model.kv_cache_specs[0].num_kv_heads == whole // 2
    assert two.plan.bytes_per_token == one.plan.bytes_per_token
    assert one.plan.weight_bytes < two.plan.weight_bytes < 1.5 * one.plan.weight_bytes  # norms twice, and padded tiles


def test_more_than_one_message_of_a_call(load: Load):
    """Prompts of a step longer than the first message's 4096 bytes."""
    prompts = [{"prompt_token_ids": [100 + number] * 100} for number in range(20)]
    outputs = load("llama").generate(prompts, SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)
    assert all(len(output.outputs[0].token_ids) > 0 for output in outputs)
