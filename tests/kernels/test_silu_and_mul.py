"""silu_and_mul: the CPU path obeys the rule, a value depends on two values, and every wrong argument is named."""

import math

import pytest
import torch

from minivllm.kernels.silu_and_mul import ACTIVATIONS, silu_and_mul
from tests.kernels.helpers import DTYPES, as_bits, assert_kernel_is_right, poisoned_memory, random_values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", [1, 7, 63, 64, 65, 1536])
@pytest.mark.parametrize("num_rows", [1, 7, 63])
def test_the_gate_is_right(dtype: torch.dtype, activation: str, size: int, num_rows: int):
    x = random_values(num_rows, 2 * size, dtype=dtype, size=3.0)
    with poisoned_memory():
        kernel = silu_and_mul(x, activation=activation, impl="cpu")
    reference = silu_and_mul(x, activation=activation, impl="reference")
    exact = silu_and_mul(x.double(), activation=activation, impl="reference")
    assert_kernel_is_right(kernel, reference, exact)


def test_the_formulas_by_hand():
    """gate 2, up 3: silu 2 / (1 + e^-2) * 3; gelu in its tanh form."""
    x = torch.tensor([2.0, 3.0], dtype=torch.float64)
    silu = 6 / (1 + math.exp(-2))
    gelu = 3 * (1 + math.tanh(math.sqrt(2 / math.pi) * (2 + 0.044715 * 8)))
    for activation, expected in (("silu", silu), ("gelu_tanh", gelu)):
        out = silu_and_mul(x, activation=activation, impl="reference")
        assert_kernel_is_right(out, out, torch.tensor([expected], dtype=torch.float64))


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_large_gates_pass_or_close_without_overflow(impl: str):
    x = torch.tensor([[1e4, -1e4, 0.0, 2.0, 3.0, 5.0]])
    assert silu_and_mul(x, impl=impl).tolist() == [[2e4, 0.0, 0.0]]
    assert silu_and_mul(x, activation="gelu_tanh", impl=impl).tolist() == [[2e4, 0.0, 0.0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", [7, 63, 96])
def test_a_row_has_the_same_bits_alone_and_in_a_batch(dtype: torch.dtype, activation: str, size: int):
    x = random_values(65, 2 * size, dtype=dtype)
    together = silu_and_mul(x, activation=activation)
    for row in (0, 1, 31, 64):
        alone = silu_and_mul(x[row : row + 1].clone(), activation=activation)
        assert torch.equal(as_bits(alone), as_bits(together[row : row + 1]))


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_argument_is_not_changed(impl: str, activation: str):
    x = random_values(3, 8, dtype=torch.float32)
    before = x.clone()
    silu_and_mul(x, activation=activation, impl=impl)
    assert torch.equal(x, before)


def test_every_wrong_argument_is_named_with_both_sides():
    with pytest.raises(ValueError, match=r"x: expected an even last dimension .*, got \[2, 7\]"):
        silu_and_mul(torch.zeros(2, 7))
    with pytest.raises(ValueError, match=r"activation: expected one of silu, gelu_tanh, got 'relu'"):
        silu_and_mul(torch.zeros(2, 8), activation="relu")
    with pytest.raises(ValueError, match=r"impl: expected one of .*, got 'fast'"):
        silu_and_mul(torch.zeros(2, 8), impl="fast")
