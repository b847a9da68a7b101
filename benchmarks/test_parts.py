"""What the parts of a step cost: pytest benchmarks/test_parts.py -n 0 --benchmark-columns=median

Shapes of SmolLM2-135M. Compare rows of one run only.
"""

from typing import Any

import pytest
import torch

from minivllm import SamplingParams
from minivllm.kernels.paged_attention import AttentionMetadata, paged_attention
from minivllm.kernels.rms_norm import rms_norm
from minivllm.models.linear import Linear, ModelOptions
from minivllm.sample import SamplingMetadata, SamplingRow, sample

HIDDEN, HEADS, KV_HEADS, HEAD, VOCAB = 576, 9, 3, 64, 49_152
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])


@DTYPES
@pytest.mark.parametrize("num_rows", [1, 8, 32, 256])
def test_the_linears_of_a_layer(benchmark: Any, num_rows: int, dtype: torch.dtype) -> None:
    options = ModelOptions(dtype)
    shapes = [(960, HIDDEN), (HIDDEN, HIDDEN), (3072, HIDDEN), (HIDDEN, 1536)]
    layers = [Linear.from_plain(torch.randn(shape).to(dtype), None, options) for shape in shapes]
    rows = [torch.randn(num_rows, columns).to(dtype) for _, columns in shapes]
    with torch.inference_mode():
        benchmark(lambda: [layer(row) for layer, row in zip(layers, rows, strict=True)])


@DTYPES
@pytest.mark.parametrize(("num_reqs", "seq_len"), [(1, 256), (1, 4096), (32, 256)])
@pytest.mark.parametrize("scattered", [False, True], ids=["in a row", "scattered"])
def test_decode_attention(benchmark: Any, num_reqs: int, seq_len: int, scattered: bool, dtype: torch.dtype) -> None:
    blocks_each = seq_len // 16
    ids = torch.arange(num_reqs * blocks_each) + 1
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))] if scattered else ids
    cache = torch.randn(KV_HEADS, len(ids) + 1, 16, HEAD).to(dtype)
    query = torch.randn(num_reqs, HEADS, HEAD).to(dtype)
    metadata = AttentionMetadata(
        query_start_loc=list(range(num_reqs + 1)),
        seq_lens=[seq_len] * num_reqs,
        block_table=ids.view(num_reqs, blocks_each).int(),
        slot_mapping=torch.zeros(num_reqs, dtype=torch.int64),
        block_size=16,
    )
    with torch.inference_mode():
        benchmark(lambda: paged_attention(query, cache, cache, metadata, scale=0.125))


@DTYPES
@pytest.mark.parametrize("num_rows", [1, 32])
def test_a_norm(benchmark: Any, num_rows: int, dtype: torch.dtype) -> None:
    rows, weight = torch.randn(num_rows, HIDDEN).to(dtype), torch.ones(HIDDEN, dtype=dtype)
    with torch.inference_mode():
        benchmark(lambda: rms_norm(rows, weight, 1e-5, residual=rows))


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 50},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 0.0, "logprobs": 5},
        {"temperature": 0.7, "repetition_penalty": 1.1},
    ],
    ids=["greedy", "temperature", "top_k", "top_p", "logprobs", "repetition"],
)
def test_drawing_a_token(benchmark: Any, params: dict[str, Any]) -> None:
    logits = torch.randn(1, VOCAB) * 4
    row = SamplingRow(SamplingParams(**params), seed=1, vocab_size=VOCAB, prompt_token_ids=list(range(200)))
    benchmark(lambda: sample(logits.clone(), SamplingMetadata.from_requests([row])))
