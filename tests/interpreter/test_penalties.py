"""penalties and logit_bias in the interpreter: the reference's bits, ids outside the vocabulary never reach memory."""

import pytest
import torch

from minivllm.kernels.penalties import logit_bias, penalties
from tests.kernels.sampling_helpers import VOCAB_SIZES, GuardedLogits, assert_same_bits, seen_lists

SETTINGS = ((1.0, 1.3, 0.7, 2.0), (0.5, -0.3, 2.0, 0.0), (-0.1, 0.9, 0.0, 1.1))


def row_settings() -> list[torch.Tensor]:  # 3 x [4] float64
    return [torch.tensor(values, dtype=torch.float64) for values in SETTINGS]


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("max_seen", [1, 16, 3000], ids="seen {}".format)
def test_the_reference_gives_the_same_bits(vocab_size: int, max_seen: int):
    """3,000 ids are more than one round of all programs of a row."""
    guarded = GuardedLogits(4, vocab_size)
    guarded.logits[:, ::3] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0])[:, None]
    seen = seen_lists(4, vocab_size, max_seen)
    expected = guarded.logits.clone()
    penalties(expected, *seen, *row_settings(), impl="reference")
    penalties(guarded.logits, *seen, *row_settings(), impl="triton")
    assert_same_bits(guarded.logits, expected)
    guarded.assert_guards_are_untouched()


def test_a_finite_logit_stays_finite():
    largest = torch.finfo(torch.float32).max
    logits = torch.tensor([[-largest, largest, 1.0]])
    ids, counts = torch.tensor([[0, 1, 2]], dtype=torch.int32), torch.tensor([[1, 0, 9]], dtype=torch.int32)
    settings = [torch.tensor([value], dtype=torch.float64) for value in (0.25, 1e300, 0.0)]
    expected = logits.clone()
    penalties(expected, ids, counts, torch.tensor([3], dtype=torch.int32), *settings, impl="reference")
    penalties(logits, ids, counts, torch.tensor([3], dtype=torch.int32), *settings, impl="triton")
    assert logits.tolist() == expected.tolist() == [[-largest, largest, -largest]]


@pytest.mark.parametrize("size", [5, 2**31 - 1])
def test_a_list_is_never_longer_than_its_memory(size: int):
    """num_seen beyond max_seen: row 1's ids are not row 0's."""
    logits, ids = torch.ones(2, 64), torch.arange(8, dtype=torch.int32).reshape(2, 4)
    settings = [torch.full((2,), value, dtype=torch.float64) for value in (1.0, 0.0, 1.0)]
    num_seen = torch.tensor([size, 0], dtype=torch.int32)
    penalties(logits, ids, torch.ones_like(ids), num_seen, *settings, impl="triton")
    assert logits[0].eq(0.0).nonzero()[:, 0].tolist() == [0, 1, 2, 3]
    assert logits[1].eq(1.0).all()


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_the_bias_is_the_references(vocab_size: int):
    guarded = GuardedLogits(3, vocab_size)
    ids, _, num_ids = seen_lists(3, vocab_size, 300)
    bias = GuardedLogits(3, 300, seed=1).logits.clone()
    expected = guarded.logits.clone()
    logit_bias(expected, ids, bias, num_ids, impl="reference")
    logit_bias(guarded.logits, ids, bias, num_ids, impl="triton")
    assert_same_bits(guarded.logits, expected)
    guarded.assert_guards_are_untouched()


def test_offsets_beyond_two_to_the_31_are_right():
    """Rows that lie 2^27 values apart: only the touched pages exist."""
    stride, num_reqs = 2**27, 18
    memory = torch.empty((num_reqs - 1) * stride + 64)
    assert memory.numel() > 2**31
    logits = memory.as_strided((num_reqs, 64), (stride, 1))
    logits.fill_(1.0)
    ids = torch.full((num_reqs, 2), 63, dtype=torch.int32)
    num_ids = torch.ones(num_reqs, dtype=torch.int32)
    settings = [torch.full((num_reqs,), value, dtype=torch.float64) for value in (0.5, 0.0, 0.0)]
    penalties(logits, ids, torch.ones_like(ids), num_ids, *settings, impl="triton")
    assert logits[:, 63].tolist() == [2.0] * num_reqs
    logit_bias(logits, ids, torch.ones(num_reqs, 2), num_ids, impl="triton")
    assert logits[:, 63].tolist() == [3.0] * num_reqs
    assert logits[:, :63].eq(1.0).all()


def test_empty_lists_are_no_launch():
    empty, none = torch.empty(2, 0, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    logits = torch.ones(2, 8)
    penalties(logits, empty, empty, none, *(torch.ones(2, dtype=torch.float64) for _ in range(3)), impl="triton")
    logit_bias(logits, empty, torch.empty(2, 0), none, impl="triton")
    assert logits.eq(1.0).all()
