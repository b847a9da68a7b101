"""rms_norm, rotary_embedding and silu_and_mul in the interpreter, on poisoned memory and odd sizes."""

import pytest
import torch

from minivllm.kernels.rms_norm import rms_norm
from minivllm.kernels.rotary_embedding import rotary_embedding
from minivllm.kernels.silu_and_mul import silu_and_mul
from tests.interpreter.helpers import DTYPES, assert_right, assert_row_is_right, far_apart
from tests.kernels.helpers import poisoned_memory, random_values

EPS = 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 7, 64, 65, 576])
@pytest.mark.parametrize("add_one", [False, True], ids=["llama", "gemma"])
@pytest.mark.parametrize("has_residual", [False, True])
def test_rms_norm(dtype: torch.dtype, size: int, add_one: bool, has_residual: bool):
    x, residual = (random_values(5, size, dtype=dtype, seed=seed, size=3.0) for seed in (1, 2))
    weight = random_values(size, dtype=dtype, seed=3, size=0.1 if add_one else 1.0)
    options = {"add_one": add_one, "residual": residual} if has_residual else {"add_one": add_one}
    with poisoned_memory():
        kernel = rms_norm(x, weight, EPS, impl="triton", **options)
    reference = rms_norm(x, weight, EPS, impl="reference", **options)
    total = x
    if has_residual:
        (kernel, total), (reference, _) = kernel, reference
        assert_right(total, x + residual, x.double() + residual.double())
    exact = rms_norm(total.double(), weight.double(), EPS, add_one=add_one, impl="reference")
    assert_row_is_right(kernel, reference if dtype != torch.bfloat16 else exact.to(dtype), exact)


def test_heads_of_a_strided_query_are_normed_one_by_one():
    strided = random_values(5, 4, 3 * 16, dtype=torch.float32)[:, :, 16:32]
    weight = random_values(16, dtype=torch.float32, seed=1)
    kernel = rms_norm(strided, weight, EPS, impl="triton")
    assert torch.equal(kernel, rms_norm(strided.contiguous(), weight, EPS, impl="triton"))
    assert_right(kernel, rms_norm(strided, weight, EPS, impl="reference"), _exact_norm(strided, weight))


def _exact_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:  # [..., size], [size] -> [..., size]
    return rms_norm(x.double(), weight.double(), EPS, impl="reference")


def test_small_rows_are_held_by_eps():
    """eps is as large as their mean square; of a row of zeros it is all there is."""
    x = random_values(3, 65, dtype=torch.float32, size=EPS**0.5)
    x[1] = 0.0
    weight = random_values(65, dtype=torch.float32, seed=1)
    kernel = rms_norm(x, weight, EPS, impl="triton")
    assert_row_is_right(kernel, rms_norm(x, weight, EPS, impl="reference"), _exact_norm(x, weight))


def test_a_row_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="at most 16384 values, got 16385"):
        rms_norm(torch.ones(1, 16385), torch.ones(16385), EPS, impl="triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_size"), [(1, 1, 8), (3, 1, 64), (9, 3, 80), (7, 1, 128)])
def test_rotary_embedding(dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_size: int):
    """Queries and keys are views into one row, as models pass them."""
    rows = random_values(5, num_heads + 2 * num_kv_heads, head_size, dtype=dtype)
    query, key, _ = rows.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    positions = torch.tensor([0, 1, 2, 4095, 131071], dtype=torch.float64)
    angles = positions[:, None] / 10000 ** (torch.arange(0, head_size, 2) / head_size)
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([-angles.sin(), angles.sin()], -1)
    with poisoned_memory():
        kernel = rotary_embedding(query, key, cos.float(), sin.float(), impl="triton")
    reference = rotary_embedding(query, key, cos.float(), sin.float(), impl="reference")
    exact = rotary_embedding(query.double(), key.double(), cos, sin, impl="reference")
    for three in zip(kernel, reference, exact, strict=True):
        assert_row_is_right(*three)


def test_every_stride_of_the_heads_is_taken_as_it_is():
    """A head in a wider row: neither tokens nor heads lie one behind the other."""
    wide = random_values(5, 3, 48, dtype=torch.float32)
    query, key = wide[:, :, :16], wide[:, 1:, 16:32]
    angles = random_values(5, 8, dtype=torch.float32, seed=1)
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([-angles.sin(), angles.sin()], -1)
    kernel = rotary_embedding(query, key, cos, sin, impl="triton")
    reference = rotary_embedding(query, key, cos, sin, impl="reference")
    exact = rotary_embedding(query.double(), key.double(), cos.double(), sin.double(), impl="reference")
    for three in zip(kernel, reference, exact, strict=True):
        assert_row_is_right(*three)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("size", [1, 7, 1024, 1025, 1536])
def test_silu_and_mul(dtype: torch.dtype, activation: str, size: int):
    x = random_values(3, 2 * size, dtype=dtype, size=3.0)
    with poisoned_memory():
        kernel = silu_and_mul(x, activation=activation, impl="triton")
    reference = silu_and_mul(x, activation=activation, impl="reference")
    assert_row_is_right(kernel, reference, silu_and_mul(x.double(), activation=activation, impl="reference"))


def test_gates_in_a_wider_row_are_found():
    wide = random_values(3, 40, dtype=torch.float32)
    kernel = silu_and_mul(wide[:, 4:18], impl="triton")
    assert torch.equal(kernel, silu_and_mul(wide[:, 4:18].contiguous(), impl="triton"))


def test_silu_of_large_gates_does_not_overflow():
    x = torch.tensor([[-300.0, 300.0, -1e30, 2.0, 3.0, 4.0]])
    assert silu_and_mul(x, impl="triton").tolist() == [[0.0, 900.0, 0.0]]


# ------------------------------------------------------------------ memory
def test_rms_norm_of_rows_that_lie_far_apart():
    x, weight = far_apart(3, 65), random_values(65, dtype=torch.float16, seed=1)
    assert torch.equal(rms_norm(x, weight, EPS, impl="triton"), rms_norm(x.contiguous(), weight, EPS, impl="triton"))


def test_rotary_embedding_of_tokens_that_lie_far_apart():
    x, angles = far_apart(3, 2, 16), random_values(3, 8, dtype=torch.float32, seed=1)
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([-angles.sin(), angles.sin()], -1)
    far, near = (rotary_embedding(one, one, cos, sin, impl="triton")[0] for one in (x, x.contiguous()))
    assert torch.equal(far, near)


def test_silu_and_mul_of_rows_that_lie_far_apart():
    x = far_apart(3, 14)
    assert torch.equal(silu_and_mul(x, impl="triton"), silu_and_mul(x.contiguous(), impl="triton"))


@pytest.mark.parametrize("run", ["rms_norm", "rotary_embedding", "silu_and_mul"])
def test_no_rows_are_no_launch(run: str):
    empty = torch.empty(0, 2, 8)
    outputs = {
        "rms_norm": lambda: rms_norm(empty, torch.ones(8), EPS, impl="triton"),
        "rotary_embedding": lambda: rotary_embedding(empty, empty, torch.empty(0, 8), torch.empty(0, 8), impl="triton")[
            0
        ],
        "silu_and_mul": lambda: silu_and_mul(empty, impl="triton"),
    }
    assert outputs[run]().shape[0] == 0


def test_float64_is_refused():
    with pytest.raises(ValueError, match="computes in float32, got float64"):
        rms_norm(torch.ones(1, 8, dtype=torch.float64), torch.ones(8, dtype=torch.float64), EPS, impl="triton")
