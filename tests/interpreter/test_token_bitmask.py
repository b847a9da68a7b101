"""token_bitmask in the interpreter: the reference's bits, and nothing else is touched."""

import pytest
import torch

from minivllm.kernels.token_bitmask import token_bitmask
from tests.kernels.sampling_helpers import VOCAB_SIZES, GuardedLogits, assert_same_bits, random_bitmask


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_the_reference_gives_the_same_bits(vocab_size: int):
    """Row 1 allows everything; row 2 everything but one token."""
    guarded, bitmask = GuardedLogits(4, vocab_size), random_bitmask(4, vocab_size)
    bitmask[1:3] = -1
    bitmask[2, vocab_size // 64] &= ~(1 << vocab_size // 2 % 32) if vocab_size // 2 % 32 < 31 else 2**31 - 1
    guarded.logits[3, :: max(1, vocab_size // 9)] = torch.nan
    expected = guarded.logits.clone()
    token_bitmask(expected, bitmask, impl="reference")
    token_bitmask(guarded.logits, bitmask, impl="triton")
    assert_same_bits(guarded.logits, expected)
    guarded.assert_guards_are_untouched()
    assert int((guarded.logits[2] == -torch.inf).sum()) == 1


def test_a_mask_with_gaps_between_its_words_is_read_right():
    guarded, bitmask = GuardedLogits(3, 100), random_bitmask(3, 100)
    expected = guarded.logits.clone()
    token_bitmask(expected, bitmask, impl="reference")
    token_bitmask(guarded.logits, bitmask.T.contiguous().T, impl="triton")
    assert_same_bits(guarded.logits, expected)


def test_bits_behind_the_vocabulary_mean_nothing():
    guarded = GuardedLogits(1, 33)
    before = guarded.logits.clone()
    token_bitmask(guarded.logits, torch.tensor([[-1, 1]], dtype=torch.int32), impl="triton")
    assert_same_bits(guarded.logits, before)


def test_offsets_beyond_two_to_the_31_are_right():
    """Rows that lie 2^27 values apart: only the touched pages exist."""
    stride, num_reqs = 2**27, 18
    memory = torch.empty((num_reqs - 1) * stride + 64)
    assert memory.numel() > 2**31
    logits = memory.as_strided((num_reqs, 64), (stride, 1))
    logits.fill_(1.0)
    bitmask = torch.full((num_reqs, 2), -1, dtype=torch.int32)
    bitmask[-1, 1] = 1
    token_bitmask(logits, bitmask, impl="triton")
    assert logits[:-1].eq(1.0).all()
    assert logits[-1].isfinite().nonzero()[:, 0].tolist() == list(range(33))


@pytest.mark.parametrize("shape", [(0, 8), (2, 0)])
def test_nothing_to_mask_is_no_launch(shape: tuple[int, int]):
    token_bitmask(torch.empty(shape), torch.empty(shape[0], -(-shape[1] // 32), dtype=torch.int32), impl="triton")
