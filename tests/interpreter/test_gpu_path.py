"""The GPU path on Triton's kernels, in the interpreter: graphs are stand-ins that call again (tests/worker/graphs.py).

The kernels read the persistent buffers, padding rows are real rows of real launches, the sampler is Triton's too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from golden.cases import Case
from minivllm import LLM, SamplingParams
from minivllm.kernels.paged_attention import AttentionMetadata, kernel, paged_attention, split
from minivllm.models.layers import KVCacheSpec
from minivllm.worker import gpu
from minivllm.worker.gpu import GPUPath, Limits
from minivllm.worker.input_batch import InputBatch
from tests.interpreter.test_engine import NUM_TOKENS, short_cases
from tests.kernels.helpers import random_values
from tests.worker.graphs import CPU, Repeats, put_on_gpu_path

SCHEDULES: dict[str, dict[str, Any]] = {
    "batched": {},
    "chunked": {"max_num_batched_tokens": 9, "long_prefill_token_threshold": 5},
    "preempted": {"num_gpu_blocks_override": 6, "max_num_batched_tokens": 64, "max_model_len": 64},
    "batch-invariant": {"batch_invariant": True},
}


def first_tokens(model: Path, cases: list[Case], **options: Any) -> tuple[list[list[int]], Repeats]:
    llm = LLM(str(model), dtype="float32", impl="triton", kv_cache_memory_bytes=4 << 20, max_num_seqs=5, **options)
    runner = llm.llm_engine._executor._runner
    assert runner is not None
    capture = Repeats()
    budget = options.get("max_num_batched_tokens", 1024)
    put_on_gpu_path(runner, capture, max_num_seqs=5, impl="triton", max_num_batched_tokens=budget)
    params = [
        SamplingParams(**case["params"] | {"max_tokens": NUM_TOKENS, "logprobs": 1, "prompt_logprobs": None})
        for case in cases
    ]
    outputs = llm.generate([{"prompt_token_ids": case["prompt"]} for case in cases], params, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs], capture


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_tokens_are_those_of_transformers(name: str, tiny_model: Callable[[str], Path]):
    """Four requests at most, and graphs of 1, 2, 4 and 5 rows: three rows are padded."""
    cases = short_cases(name)[:3]
    tokens, capture = first_tokens(tiny_model(name), cases)
    assert tokens == [case["steps"]["token_ids"][:NUM_TOKENS] for case in cases]
    assert len(capture.replayed) == NUM_TOKENS - 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_schedule_changes_a_token(schedule: str, tiny_model: Callable[[str], Path]):
    cases = short_cases("llama")
    tokens, capture = first_tokens(tiny_model("llama"), cases, **SCHEDULES[schedule])
    assert tokens == [case["steps"]["token_ids"][:NUM_TOKENS] for case in cases]
    assert capture.replayed


# ------------------------------------------------------------------ the cut of a context is part of the key
NUM_HEADS, HEAD_SIZE, BLOCK_SIZE, NUM_BLOCKS, LONGEST = 2, 16, 16, 64, 400


class OneLayer(torch.nn.Module):
    """Attention over what is in the cache; a query per token id."""

    hidden_size = NUM_HEADS * HEAD_SIZE

    def __init__(self) -> None:
        super().__init__()
        self.kv_cache_specs = [KVCacheSpec(1, HEAD_SIZE)]
        self.queries = random_values(9, NUM_HEADS, HEAD_SIZE, dtype=torch.float32)

    def forward(
        self,
        input_ids: torch.Tensor,  # [num_tokens]
        positions: torch.Tensor,  # [num_tokens]
        kv_caches: Any,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:  # [num_tokens, hidden_size]
        query = self.queries[input_ids]
        return paged_attention(query, *kv_caches[0], metadata, scale=0.25, impl="triton").flatten(1)


def decode_batch(seq_lens: list[int]) -> InputBatch:
    num_reqs, width = len(seq_lens), -(-max(seq_lens) // BLOCK_SIZE)
    ids = torch.randperm(NUM_BLOCKS - 1, generator=torch.Generator().manual_seed(0))[:width] + 1
    rows = torch.arange(num_reqs)
    return InputBatch(
        states=[],
        input_ids=rows,
        positions=rows,
        logits_indices=rows,
        sampling_states=[],
        attention=AttentionMetadata(
            query_start_loc=list(range(num_reqs + 1)),
            seq_lens=seq_lens,
            block_table=ids.int().expand(num_reqs, -1),
            slot_mapping=torch.full((num_reqs,), -1),
            block_size=BLOCK_SIZE,
        ),
    )


@pytest.fixture
def cut_path(monkeypatch: pytest.MonkeyPatch) -> GPUPath:
    """On a GPU of two multiprocessors, so that a context of a few hundred tokens is cut."""
    for module in (kernel, gpu, split):
        monkeypatch.setattr(module, "num_multiprocessors", lambda device: 2)
    torch.manual_seed(0)
    caches = [tuple(torch.randn(1, NUM_BLOCKS, BLOCK_SIZE, HEAD_SIZE) for _ in "kv")]
    return GPUPath(OneLayer(), caches, CPU, Limits(4, 64, LONGEST, BLOCK_SIZE), Repeats())  # type: ignore[arg-type]


def difference(path: GPUPath, seq_lens: list[int]) -> float:
    """Between a replay and the same rows by the reference. Padding rows, which see no key, become 0."""
    batch = decode_batch(seq_lens)
    got = path.forward(path.prepare(batch))
    num_rows = path.key_of(batch.attention).num_rows  # type: ignore[union-attr]
    assert not path.hidden_states[len(seq_lens) : num_rows].any()
    caches, queries = path.kv_caches, path.model.queries[: len(seq_lens)]
    wanted = paged_attention(queries, *caches[0], batch.attention, scale=0.25, impl="reference").flatten(1)
    return float((got - wanted).abs().max())


def test_contexts_of_every_bucket_and_cut_are_read_whole(cut_path: GPUPath):
    assert len({key.cuts for key in cut_path.graphs}) > 2
    for seq_lens in ([1], [256], [257], [LONGEST], [5, 300], [LONGEST, 1], [1, 2, 3], [LONGEST, 130, 257]):
        assert cut_path.key_of(decode_batch(seq_lens).attention) in cut_path.graphs
        assert difference(cut_path, seq_lens) < torch.finfo(torch.float32).eps * 64


def test_a_graph_of_a_shorter_bucket_would_leave_keys_unread(cut_path: GPUPath):
    """The key rule can be broken, and it shows."""
    assert difference(cut_path, [LONGEST]) < torch.finfo(torch.float32).eps * 64
    cut_path.keys[1, LONGEST] = cut_path.keys[1, 256]
    assert difference(cut_path, [LONGEST]) > 0.01
