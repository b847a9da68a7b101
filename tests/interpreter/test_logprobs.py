"""logprobs in the interpreter: the float64 reference's values, and exactly its ids and ranks."""

import pytest
import torch

from minivllm.kernels.logprobs import Logprobs, logprobs
from tests.interpreter.helpers import assert_right
from tests.kernels.helpers import as_bits, poisoned_memory
from tests.kernels.sampling_helpers import VOCAB_SIZES, GuardedLogits


def assert_agree(logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> Logprobs:
    """Returns what the kernel gave. logits: [num_reqs, vocab_size], token_ids: [num_reqs]."""
    with poisoned_memory():
        kernel = logprobs(logits, token_ids, num_top, impl="triton")
    reference = logprobs(logits, token_ids, num_top, impl="reference")
    exact = logprobs(logits.double(), token_ids, num_top, impl="reference")
    assert torch.equal(kernel.ranks, exact.ranks)
    assert torch.equal(kernel.top_token_ids, exact.top_token_ids)
    for name in ("logprobs", "top_logprobs"):
        three = [getattr(output, name) for output in (kernel, reference, exact)]
        kept = three[2].isfinite()
        assert torch.equal(three[0][~kept].double().nan_to_num(1), three[2][~kept].nan_to_num(1))  # NaN, -inf
        assert_right(*(values[kept] for values in three))
    return kernel


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_every_vocabulary(vocab_size: int):
    """Token ids at both ends, in the middle, and outside."""
    guarded = GuardedLogits(5, vocab_size)
    token_ids = torch.tensor([0, vocab_size - 1, vocab_size // 2, vocab_size, -1])
    assert_agree(guarded.logits, token_ids, min(20, vocab_size) if vocab_size < 49152 else 3)


@pytest.mark.parametrize("num_top", [0, 1, 20])
def test_masks_ties_and_broken_rows(num_top: int):
    """Two pieces and a bit. Whole pieces are refused, the best lie in the last piece, and no row spoils another."""
    logits = GuardedLogits(9, 8193).logits
    logits[1] = logits[1].round()
    logits[2, 3:] = -torch.inf
    logits[3, 77], logits[4, 8192], logits[5] = torch.nan, torch.inf, -torch.inf
    logits[6, :8192] = -torch.inf
    logits[7] = -logits[7].abs()
    logits[7, 5::4100], logits[7, 3::4100] = 0.0, -0.0
    logits[8, 4096:] += 200.0
    assert_agree(logits, torch.tensor([1, 2, 8000, 1, 2, 3, 8192, 4103, 0]), num_top)


def test_large_logits_lose_nothing():
    """A sum of exponentials without a maximum taken off would overflow, or vanish."""
    logits = GuardedLogits(2, 5000).logits
    logits[0] += 1e4
    logits[1] -= 1e4
    assert_agree(logits, torch.tensor([7, 8]), 3)


def test_a_row_has_the_same_bits_alone_and_in_a_batch():
    logits, token_ids = GuardedLogits(3, 8193).logits, torch.tensor([5, 6, 7])
    together = logprobs(logits, token_ids, 4, impl="triton")
    alone = logprobs(logits[1:2].clone(), token_ids[1:2].clone(), 4, impl="triton")
    for one, all_of_them in zip(alone, together, strict=True):
        assert torch.equal(as_bits(one), as_bits(all_of_them[1:2]))


def test_offsets_beyond_two_to_the_31_are_right():
    """Rows that lie 2^27 values apart: only the touched pages exist."""
    stride, num_reqs = 2**27, 18
    memory = torch.empty((num_reqs - 1) * stride + 64)
    assert memory.numel() > 2**31
    logits = memory.as_strided((num_reqs, 64), (stride, 1))
    logits.copy_(GuardedLogits(num_reqs, 64).logits)
    assert_agree(logits, torch.arange(num_reqs), 2)


def test_no_rows_are_no_launch():
    found = logprobs(torch.empty(0, 8), torch.empty(0, dtype=torch.int64), 3, impl="triton")
    assert [list(values.shape) for values in found] == [[0], [0], [0, 3], [0, 3]]
