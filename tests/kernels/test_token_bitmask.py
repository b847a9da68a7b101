"""token_bitmask: the reference against a loop and against the engine's sampler; every wrong argument is named."""

from typing import Any

import numpy as np
import pytest
import torch

from minivllm.kernels.token_bitmask import token_bitmask
from minivllm.sample.penalties import apply_grammar_bitmask
from tests.kernels.sampling_helpers import GuardedLogits, assert_same_bits, random_bitmask

SIZES = (1, 31, 32, 33, 100, 8193)


def test_two_words_by_hand():
    """Bit 31 makes a word negative; the second word hangs over the end of the vocabulary."""
    logits = torch.arange(34, dtype=torch.float32)[None].clone()
    token_bitmask(logits, torch.tensor([[-(2**31) + 5, -2]], dtype=torch.int32))
    assert logits.isfinite().nonzero()[:, 1].tolist() == [0, 2, 31, 33]
    assert logits[0, [0, 2, 31, 33]].tolist() == [0, 2, 31, 33]


@pytest.mark.parametrize("vocab_size", SIZES)
def test_one_token_after_the_other(vocab_size: int):
    guarded, bitmask = GuardedLogits(3, vocab_size), random_bitmask(3, vocab_size)
    expected = guarded.logits.clone()
    for row, words in enumerate(bitmask.tolist()):
        for token in range(vocab_size):
            if not words[token // 32] >> token % 32 & 1:
                expected[row, token] = -torch.inf
    token_bitmask(guarded.logits, bitmask)
    assert_same_bits(guarded.logits, expected)
    guarded.assert_guards_are_untouched()


@pytest.mark.parametrize("vocab_size", SIZES)
def test_the_engines_sampler_masks_the_same(vocab_size: int):
    logits, bitmask = GuardedLogits(4, vocab_size).logits.clone(), random_bitmask(4, vocab_size, seed=1)
    bitmask[1] = -1
    expected = logits.numpy().copy()
    apply_grammar_bitmask(expected, bitmask.numpy())
    token_bitmask(logits, bitmask)
    assert_same_bits(logits, torch.from_numpy(expected))


def test_allowed_values_keep_their_bits():
    special = np.array([0x7FC01234, 0xFFC00001, 0x80000000, 0x7F800000, 0xFF800000, 1], np.uint32).view(np.float32)
    logits = torch.from_numpy(special.copy())[None]
    token_bitmask(logits, torch.full((1, 1), 0b111111, dtype=torch.int32))
    assert_same_bits(logits, torch.from_numpy(special)[None])


def arguments(**changes: Any) -> dict[str, Any]:
    """A call that fits, with changes."""
    return {"logits": torch.zeros(2, 40), "bitmask": torch.zeros(2, 2, dtype=torch.int32), **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.zeros(40)}, r"logits: expected \[num_reqs, vocab_size\] float32 .*, got \[40\]"),
        ({"logits": torch.zeros(2, 40).half()}, r"logits: expected .*, got \[2, 40\] torch.float16"),
        ({"logits": torch.zeros(40, 2).T}, r"logits: expected .* side by side, .* with strides \(1, 2\)"),
        ({"bitmask": torch.zeros(2, 1, dtype=torch.int32)}, r"bitmask: expected \[2, 2\] int32 .*, got \[2, 1\]"),
        ({"bitmask": torch.zeros(1, 2, dtype=torch.int32)}, r"bitmask: expected \[2, 2\] int32 .*, got \[1, 2\]"),
        ({"bitmask": torch.zeros(2, 2, dtype=torch.int64)}, r"bitmask: expected .*, got \[2, 2\] torch.int64"),
        ({"impl": "fast"}, r"impl: expected one of .*, got 'fast'"),
    ],
    ids=["dimensions", "dtype", "columns", "words", "rows", "mask dtype", "impl"],
)
def test_every_wrong_argument_is_named_with_both_sides(changes: dict[str, Any], message: str):
    token_bitmask(**arguments())
    with pytest.raises(ValueError, match=message):
        token_bitmask(**arguments(**changes))
