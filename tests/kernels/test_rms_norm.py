"""rms_norm: the CPU path obeys the rule, a row depends on itself alone, and every wrong argument is named."""

import pytest
import torch

from minivllm.kernels.rms_norm import rms_norm
from tests.kernels.helpers import (
    DTYPES,
    as_bits,
    assert_kernel_is_right,
    assert_rounded_once,
    poisoned_memory,
    random_values,
)

EPS = 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 7, 63, 64, 65, 576])
@pytest.mark.parametrize("num_rows", [1, 7, 63])
@pytest.mark.parametrize("add_one", [False, True], ids=["llama", "gemma"])
@pytest.mark.parametrize("has_residual", [False, True])
def test_norm_and_sum_are_right(dtype: torch.dtype, size: int, num_rows: int, add_one: bool, has_residual: bool):
    """The sum is rounded to the model's dtype, and the norm is taken of the rounded sum."""
    x = random_values(num_rows, size, dtype=dtype, seed=1, size=3.0)
    residual = random_values(num_rows, size, dtype=dtype, seed=2, size=10.0)
    weight = random_values(size, dtype=dtype, seed=3, size=0.1 if add_one else 1.0)
    options = {"add_one": add_one, "residual": residual} if has_residual else {"add_one": add_one}
    with poisoned_memory():
        kernel = rms_norm(x, weight, EPS, impl="cpu", **options)
    reference = rms_norm(x, weight, EPS, impl="reference", **options)
    total = x + residual if has_residual else x
    exact = rms_norm(total.double(), weight.double(), EPS, add_one=add_one, impl="reference")
    if has_residual:
        kernel, kernel_total = kernel
        reference, reference_total = reference
        assert torch.equal(kernel_total, total)
        assert torch.equal(reference_total, total)
    assert_kernel_is_right(kernel, reference, exact)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("add_one", [False, True], ids=["llama", "gemma"])
def test_a_bfloat16_norm_is_rounded_once(impl: str, add_one: bool):
    """Gemma's 1 + weight in bfloat16 would lose most of a small weight."""
    x, weight = random_values(63, 576, dtype=torch.bfloat16, seed=1), random_values(576, dtype=torch.bfloat16, size=0.1)
    exact = rms_norm(x.double(), weight.double(), EPS, add_one=add_one, impl="reference")
    assert_rounded_once(rms_norm(x, weight, EPS, add_one=add_one, impl=impl), exact)


def test_the_formula_by_hand():
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float64)  # mean square 12.5
    root = 12.5**0.5
    for weight, add_one, expected in [
        ([1.0, 2.0], False, [3 / root, 8 / root]),
        ([0.0, 1.0], True, [3 / root, 8 / root]),
    ]:
        out = rms_norm(x, torch.tensor(weight, dtype=torch.float64), 0.0, add_one=add_one, impl="reference")
        assert_kernel_is_right(out, out, torch.tensor([expected], dtype=torch.float64))


def test_eps_keeps_a_row_of_zeros_at_zero():
    weight = torch.ones(8)
    for impl in ("cpu", "reference"):
        assert rms_norm(torch.zeros(2, 8), weight, EPS, impl=impl).tolist() == [[0.0] * 8] * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("add_one", [False, True])
@pytest.mark.parametrize("size", [7, 64, 577])
def test_a_row_has_the_same_bits_alone_and_in_a_batch(dtype: torch.dtype, add_one: bool, size: int):
    x = random_values(65, size, dtype=dtype, seed=1)
    weight = random_values(size, dtype=dtype, seed=2)
    together = rms_norm(x, weight, EPS, residual=x.flip(0), add_one=add_one)
    for row in (0, 1, 31, 64):
        one = slice(row, row + 1)
        alone = rms_norm(x[one].clone(), weight, EPS, residual=x.flip(0)[one].clone(), add_one=add_one)
        assert all(torch.equal(as_bits(a), as_bits(b[one])) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("add_one", [False, True])
def test_no_argument_is_changed(impl: str, add_one: bool):
    x, residual, weight = (random_values(4, 8, dtype=torch.float32, seed=seed) for seed in range(3))
    before = [tensor.clone() for tensor in (x, residual, weight)]
    rms_norm(x, weight[0], EPS, residual=residual, add_one=add_one, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip((x, residual, weight), before, strict=True))


def test_heads_of_a_strided_query_are_normed_one_by_one():
    qkv = random_values(5, 4, 3 * 16, dtype=torch.float32)
    strided = qkv[:, :, 16:32]
    weight = random_values(16, dtype=torch.float32, seed=1)
    assert torch.equal(rms_norm(strided, weight, EPS), rms_norm(strided.contiguous(), weight, EPS))


def test_every_wrong_argument_is_named_with_both_sides():
    x, weight = torch.zeros(2, 8), torch.ones(8)
    with pytest.raises(
        ValueError, match=r"weight: expected \[8\] torch.float32 as x \[2, 8\], got \[7\] torch.float32"
    ):
        rms_norm(x, torch.ones(7), EPS)
    with pytest.raises(ValueError, match=r"weight: expected \[8\] torch.float32 .*, got \[8\] torch.bfloat16"):
        rms_norm(x, weight.bfloat16(), EPS)
    with pytest.raises(ValueError, match=r"residual: expected \[2, 8\] torch.float32 as x, got \[1, 8\] torch.float32"):
        rms_norm(x, weight, EPS, residual=x[:1])
    with pytest.raises(ValueError, match=r"residual: expected \[2, 8\] torch.float32 as x, got \[2, 8\] torch.float64"):
        rms_norm(x, weight, EPS, residual=x.double())
    with pytest.raises(ValueError, match=r"impl: expected one of .*, got 'fast'"):
        rms_norm(x, weight, EPS, impl="fast")
