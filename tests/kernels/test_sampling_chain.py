"""The sampler's operations in the engine's order are the engine's sampler."""

import pytest

from tests.kernels.sampling_chain import REQUESTS, assert_the_engine_says_the_same, step


@pytest.mark.parametrize("vocab_size", [100, 8193, 49152])
def test_a_step_of_all_kinds_of_requests(vocab_size: int):
    assert_the_engine_says_the_same(vocab_size, "reference")


def test_the_step_uses_every_part_of_the_metadata():
    _, metadata = step(100)
    parts = (metadata.allowed_token_ids, metadata.banned_token_ids, metadata.logit_bias, metadata.penalties)
    assert [sorted(part) for part in parts] == [[5], [1, 5], [4, 6], [2, 3, 6]]
    assert len(REQUESTS) == len(metadata.seeds)
