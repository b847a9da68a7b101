"""CLS, MEAN and LAST over chunks equal the same over the whole."""

import pytest
import torch

from minivllm.worker.pooling import POOLING_TYPES, accumulate, finish
from tests.tolerances import UNIT_LENGTH_ATOL


@pytest.mark.parametrize("pooling_type", POOLING_TYPES)
@pytest.mark.parametrize("cuts", [[7], [1, 6], [3, 3, 1]])
def test_chunks_pool_to_the_same_vector(pooling_type: str, cuts: list[int]):
    rows = torch.randn(7, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
    expected = {"CLS": rows[0], "LAST": rows[-1], "MEAN": rows.mean(0)}[pooling_type]
    expected = expected / expected.norm()
    pooled = None
    for chunk in rows.split(cuts):
        pooled = accumulate(pooling_type, pooled, chunk)
    assert torch.allclose(torch.tensor(finish(pooling_type, pooled, 7)), expected, atol=UNIT_LENGTH_ATOL)
