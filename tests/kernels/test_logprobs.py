"""logprobs: the reference by hand and against the engine's sampler; every wrong argument is named."""

import math
from typing import Any

import pytest
import torch

from minivllm.kernels.logprobs import logprobs
from minivllm.sample.logprobs import token_logprobs
from tests.kernels.sampling_helpers import GuardedLogits
from tests.tolerances import FLOAT64_RTOL, LOGPROB_ATOL


def test_four_tokens_by_hand():
    """Weights 1, 2, 2, 0 of 5; equal ones by id; a refused token may be the fourth."""
    logits = torch.tensor([[0.0, math.log(2), math.log(2), -math.inf]] * 3, dtype=torch.float64)
    found = logprobs(logits, torch.tensor([0, 2, 7]), 4)
    assert found.ranks.tolist() == [3, 2, 4]
    assert found.top_token_ids.tolist() == [[1, 2, 0, 3]] * 3
    for got, weights in ((found.logprobs, [0.2, 0.4, 0.0]), (found.top_logprobs[0], [0.4, 0.4, 0.2, 0.0])):
        assert got.exp().tolist() == pytest.approx(weights, rel=FLOAT64_RTOL)


def engine_cases() -> torch.Tensor:  # [8, 500]
    """Plain rows, ties, a mask that leaves three tokens, NaN, +inf, nothing left; 0.0 is -0.0."""
    logits = GuardedLogits(8, 500).logits.clone()
    logits[1] = logits[1].round()
    logits[2, 3:] = -torch.inf
    logits[3, 77], logits[4, 77], logits[5] = torch.nan, torch.inf, -torch.inf
    logits[6] = -logits[6].abs()
    logits[6, 5::7], logits[6, 3::7] = 0.0, -0.0
    return logits


@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
def test_the_engines_sampler_says_the_same(num_top: int):
    logits, token_ids = engine_cases(), torch.tensor([0, 9, 400, 1, 2, 3, 499, -1])
    found = logprobs(logits, token_ids, num_top)
    for row, token in enumerate(token_ids.tolist()):
        own, *best = (value.item() for value in (found.logprobs[row], *found.top_logprobs[row]))
        expected = token_logprobs(logits[row].numpy(), token, num_top)
        assert found.ranks[row] == expected.rank
        if math.isnan(expected.logprobs[0]):
            assert math.isnan(own) and all(map(math.isnan, best))
            assert found.top_token_ids[row].tolist() == [-1] * num_top
        else:
            assert [token, *found.top_token_ids[row].tolist()] == expected.token_ids
            assert [own, *best] == pytest.approx(expected.logprobs, abs=LOGPROB_ATOL)


def test_no_argument_is_changed():
    logits, token_ids = engine_cases(), torch.arange(8)
    before = logits.clone()
    logprobs(logits, token_ids, 5)
    assert torch.equal(logits.nan_to_num(9), before.nan_to_num(9))
    assert token_ids.tolist() == list(range(8))


def arguments(**changes: Any) -> dict[str, Any]:
    """A call that fits, with changes."""
    return {"logits": torch.zeros(2, 40), "token_ids": torch.zeros(2, dtype=torch.int64), "num_top": 5, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.zeros(40)}, r"logits: expected \[num_reqs, vocab_size\] float32 .*, got \[40\]"),
        ({"logits": torch.zeros(2, 40).half()}, r"logits: expected .*, got \[2, 40\] torch.float16"),
        ({"logits": torch.zeros(40, 2).T}, r"logits: expected .* side by side, .* with strides \(1, 2\)"),
        ({"logits": torch.zeros(2, 0)}, r"logits: expected at least one token, got \[2, 0\]"),
        ({"token_ids": torch.zeros(3, dtype=torch.int64)}, r"token_ids: expected \[2\] int64, got \[3\]"),
        ({"token_ids": torch.zeros(2, dtype=torch.int32)}, r"token_ids: expected \[2\] int64, got .* torch.int32"),
        ({"num_top": 21}, r"num_top: expected 0 to 20, got 21"),
        ({"num_top": -1}, r"num_top: expected 0 to 20, got -1"),
        ({"logits": torch.zeros(2, 4)}, r"num_top: expected 0 to 4, got 5"),
        ({"impl": "fast"}, r"impl: expected one of .*, got 'fast'"),
    ],
    ids=["dimensions", "dtype", "columns", "no tokens", "rows", "ids", "many", "few", "vocabulary", "impl"],
)
def test_every_wrong_argument_is_named_with_both_sides(changes: dict[str, Any], message: str):
    logprobs(**arguments())
    with pytest.raises(ValueError, match=message):
        logprobs(**arguments(**changes))
