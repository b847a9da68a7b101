"""A decode step's attention in a CUDA graph: captured once, replayed with other values."""

from __future__ import annotations

import pytest
import torch

from minivllm.kernels.paged_attention import paged_attention
from tests.gpu.conftest import REASON
from tests.kernels.helpers import Request, Shape, make_batch

if not torch.cuda.is_available():  # the interpreter has no graphs
    pytestmark = pytest.mark.skip(reason=REASON)


@pytest.mark.parametrize("num_reqs", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("context", [100, 3000], ids=["whole", "split"])
def test_a_replayed_step_gives_what_a_call_gives(num_reqs: int, context: int):
    requests = [Request(context - r, seed=r) for r in range(num_reqs)]
    batch = make_batch(requests, Shape(2, 4, 128, 16, torch.bfloat16))
    query, k_cache, v_cache = (tensor.cuda() for tensor in (batch.query, batch.k_cache, batch.v_cache))

    def step() -> torch.Tensor:  # [num_tokens, num_heads, head_size]
        return paged_attention(query, k_cache, v_cache, batch.metadata, scale=128**-0.5, impl="triton")

    step()  # compiles, and brings the step's lists to the device
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    query.copy_(query.flip(-1))
    graph.replay()
    assert torch.equal(out, step())
