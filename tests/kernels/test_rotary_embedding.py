"""rotary_embedding: the CPU path obeys the rule, distances stay, and every wrong argument is named."""

import pytest
import torch

from minivllm.kernels.rotary_embedding import rotary_embedding
from tests.kernels.helpers import (
    DTYPES,
    as_bits,
    assert_kernel_is_right,
    assert_rounded_once,
    poisoned_memory,
    random_values,
)
from tests.tolerances import FLOAT64_RTOL

Angles = tuple[torch.Tensor, torch.Tensor]


def angles(positions: torch.Tensor, head_size: int, dtype: torch.dtype = torch.float64) -> Angles:
    """cos and sin tables, both [num_tokens, head_size], the sign of the rotation in sin. positions: [num_tokens]."""
    frequencies = 10000.0 ** (-torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)  # [head_size / 2]
    turns = positions.double()[:, None] * frequencies  # [num_tokens, head_size / 2]
    cos, sin = turns.cos(), turns.sin()
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [2, 64, 80, 128])
@pytest.mark.parametrize("num_tokens", [1, 7, 63])
@pytest.mark.parametrize("group", [1, 3, 5, 7])
def test_queries_and_keys_are_turned_right(dtype: torch.dtype, head_size: int, num_tokens: int, group: int):
    query = random_values(num_tokens, 2 * group, head_size, dtype=dtype, seed=1)
    key = random_values(num_tokens, 2, head_size, dtype=dtype, seed=2)
    cos, sin = angles(torch.arange(8000, 8000 + num_tokens), head_size, torch.float32)
    with poisoned_memory():
        kernel = rotary_embedding(query, key, cos, sin, impl="cpu")
    reference = rotary_embedding(query, key, cos, sin, impl="reference")
    exact = rotary_embedding(query.double(), key.double(), cos.double(), sin.double(), impl="reference")
    for outputs in zip(kernel, reference, exact, strict=True):
        assert_kernel_is_right(*outputs)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_a_bfloat16_rotation_is_rounded_once(impl: str):
    """At position 8000 an angle or a product in bfloat16 would be wrong by far more."""
    query, key = (random_values(63, 3, 64, dtype=torch.bfloat16, seed=seed) for seed in (1, 2))
    cos, sin = angles(torch.arange(8000, 8063), 64, torch.float32)
    exact = rotary_embedding(query.double(), key.double(), cos.double(), sin.double(), impl="reference")
    for kernel, truth in zip(rotary_embedding(query, key, cos, sin, impl=impl), exact, strict=True):
        assert_rounded_once(kernel, truth)


def test_a_quarter_turn_by_hand():
    """Pairs lie half a head apart: (1, 3) becomes (-3, 1) and (2, 4) becomes (-4, 2)."""
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    cos, sin = torch.zeros(1, 4), torch.tensor([[-1.0, -1.0, 1.0, 1.0]])
    for impl in ("cpu", "reference"):
        query, key = rotary_embedding(x, 2 * x, cos, sin, impl=impl)
        assert query.tolist() == [[[-3.0, -4.0, 1.0, 2.0]]]
        assert key.tolist() == [[[-6.0, -8.0, 2.0, 4.0]]]


def test_scores_depend_on_the_distance_only():
    query, key = (random_values(1, 1, 64, dtype=torch.float64, seed=seed) for seed in (1, 2))

    def score(query_position: int, key_position: int) -> float:
        turned_query, _ = rotary_embedding(query, key, *angles(torch.tensor([query_position]), 64), impl="reference")
        _, turned_key = rotary_embedding(query, key, *angles(torch.tensor([key_position]), 64), impl="reference")
        return float((turned_query * turned_key).sum())

    assert score(1009, 1002) == pytest.approx(score(7, 0), rel=FLOAT64_RTOL)
    assert score(107, 100) == pytest.approx(score(7, 0), rel=FLOAT64_RTOL)
    assert score(8, 0) != pytest.approx(score(7, 0), rel=FLOAT64_RTOL)  # and on the distance they do depend


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_has_the_same_bits_alone_and_in_a_batch(dtype: torch.dtype):
    query, key = random_values(65, 6, 80, dtype=dtype, seed=1), random_values(65, 2, 80, dtype=dtype, seed=2)
    cos, sin = angles(torch.arange(65), 80, torch.float32)
    together = rotary_embedding(query, key, cos, sin)
    for token in (0, 31, 64):
        one = slice(token, token + 1)
        alone = rotary_embedding(query[one].clone(), key[one].clone(), cos[one].clone(), sin[one].clone())
        assert all(torch.equal(as_bits(a), as_bits(b[one])) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_strided_heads_give_the_same_and_no_argument_is_changed(impl: str):
    """Models pass views into one row of query, key and value."""
    qkv = random_values(5, 4, 3 * 16, dtype=torch.float32)
    before = qkv.clone()
    cos, sin = angles(torch.arange(5), 16, torch.float32)
    strided = rotary_embedding(qkv[:, :, :16], qkv[:, :, 16:32], cos, sin, impl=impl)
    assert torch.equal(qkv, before)
    whole = rotary_embedding(qkv[:, :, :16].contiguous(), qkv[:, :, 16:32].contiguous(), cos, sin, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(strided, whole, strict=True))


@pytest.mark.parametrize(
    ("key", "head_size"), [((2, 1, 8), 8), ((3, 1, 6), 8), ((3, 1, 7), 7)], ids=["tokens", "head_size", "odd"]
)
def test_queries_and_keys_that_do_not_fit_are_refused(key: tuple[int, ...], head_size: int):
    table = torch.zeros(3, head_size)
    with pytest.raises(
        ValueError, match=rf"query, key: expected .* got \[3, 2, {head_size}\] and \[{key[0]}, 1, {key[2]}\]"
    ):
        rotary_embedding(torch.zeros(3, 2, head_size), torch.zeros(key), table, table)


@pytest.mark.parametrize(("cos", "sin"), [((2, 8), (2, 8)), ((3, 4), (3, 4)), ((3, 8), (3, 4)), ((3, 8), (1, 8))])
def test_tables_that_do_not_fit_are_refused(cos: tuple[int, ...], sin: tuple[int, ...]):
    query, key = torch.zeros(3, 2, 8), torch.zeros(3, 1, 8)
    sides = rf"cos, sin: expected \[3, 8\] as query \[3, 2, 8\], got \[{cos[0]}, {cos[1]}\] and \[{sin[0]}, {sin[1]}\]"
    with pytest.raises(ValueError, match=sides):
        rotary_embedding(query, key, torch.zeros(cos), torch.zeros(sin))


def test_an_unknown_implementation_is_refused():
    table = torch.zeros(3, 8)
    with pytest.raises(ValueError, match=r"impl: expected one of .*, got 'fast'"):
        rotary_embedding(torch.zeros(3, 2, 8), torch.zeros(3, 1, 8), table, table, impl="fast")
