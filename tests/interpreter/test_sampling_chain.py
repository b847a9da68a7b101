"""The sampler's kernels in the engine's order draw the engine's tokens, with its log-probabilities."""

import pytest

from tests.kernels.sampling_chain import assert_the_engine_says_the_same


@pytest.mark.parametrize("vocab_size", [100, 8193])
def test_a_step_of_all_kinds_of_requests(vocab_size: int):
    assert_the_engine_says_the_same(vocab_size, "triton")
