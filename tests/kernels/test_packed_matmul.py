"""packed_matmul: right for every number of rows and any width, a row's bits are its own, wrong arguments are named."""

from collections.abc import Callable

import pytest
import torch

from minivllm.kernels.packed_matmul import packed_matmul
from minivllm.kernels.packed_matmul.reference import pack, pack_codes, unpack, widen
from tests.kernels.helpers import as_bits, assert_kernel_is_right, poisoned_memory, random_values

BF16 = torch.bfloat16


@pytest.mark.parametrize("num_rows", [1, 2, 15, 16, 17, 32, 33, 64, 100])
@pytest.mark.parametrize("shape", [(32, 32), (33, 64), (96, 96), (100, 576), (576, 1536)], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_are_right(num_rows: int, shape: tuple[int, int], has_bias: bool):
    rows, weight = random_values(num_rows, shape[1], dtype=BF16), random_values(*shape, dtype=BF16, seed=1)
    bias = random_values(shape[0], dtype=BF16, seed=2) if has_bias else None
    with poisoned_memory():
        kernel = packed_matmul(rows, pack(weight), shape[0], bias=bias, impl="cpu")
    reference = packed_matmul(rows, pack(weight), shape[0], bias=bias, impl="reference")
    exact = rows.double() @ weight.double().t() + (0 if bias is None else bias.double())
    assert_kernel_is_right(kernel, reference, exact)


@pytest.mark.parametrize(("num_rows", "in_features"), [(353, 576), (700, 576), (257, 1536)])
def test_products_of_many_rows_are_right(num_rows: int, in_features: int):
    """So many that they are taken in groups, the last block of one of them not whole."""
    rows, weight = random_values(num_rows, in_features, dtype=BF16), random_values(65, in_features, dtype=BF16, seed=1)
    with poisoned_memory():
        kernel = packed_matmul(rows, pack(weight), 65, impl="cpu")
    reference = packed_matmul(rows, pack(weight), 65, impl="reference")
    assert_kernel_is_right(kernel, reference, rows.double() @ weight.double().t())


def test_a_row_has_the_same_bits_alone_and_in_a_batch():
    rows, strips = random_values(40, 576, dtype=BF16), pack(random_values(96, 576, dtype=BF16, seed=1))
    together = packed_matmul(rows, strips, 96)
    for row in (0, 15, 16, 31, 39):
        alone = packed_matmul(rows[row : row + 1].clone(), strips, 96)
        assert torch.equal(as_bits(alone), as_bits(together[row : row + 1]))


def test_a_bad_number_stays_in_its_row():
    rows, strips = random_values(20, 64, dtype=BF16), pack(random_values(64, 64, dtype=BF16, seed=1))
    rows[3, 5] = torch.nan
    out = packed_matmul(rows, strips, 64)
    assert out[3].isnan().all()
    assert out[[row for row in range(20) if row != 3]].isfinite().all()


def test_strips_hold_the_weight_and_zeros():
    weight = random_values(33, 96, dtype=BF16)
    strips = pack(weight)
    assert strips.shape == (2, 48, 32, 2)
    assert torch.equal(unpack(strips, 33), weight)
    assert strips.count_nonzero() == weight.count_nonzero()
    assert strips[1, 3, 0, 1] == weight[32, 7]


# ------------------------------------------------------------------ weights in 4 bits
def codes_of(out_features: int, in_features: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random codes and levels, and the weight that they are [out_features, in_features] float64."""
    codes = torch.randint(0, 16, (out_features, in_features), dtype=torch.uint8, generator=torch.manual_seed(3))
    scales = 0.01 + random_values(out_features, in_features // 32, dtype=torch.float32, seed=4).abs().half()
    minimums = random_values(out_features, in_features // 32, dtype=torch.float32, seed=5).half()
    wide = [part.double().repeat_interleave(32, 1) for part in (scales, minimums)]
    return *pack_codes(codes, scales, minimums), codes.double() * wide[0] + wide[1]


@pytest.mark.parametrize("num_rows", [1, 2, 16, 17, 32, 33, 64, 353])
@pytest.mark.parametrize("shape", [(32, 32), (33, 64), (96, 576), (576, 1536)], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_with_codes_are_right(num_rows: int, shape: tuple[int, int], has_bias: bool):
    codes, levels, weight = codes_of(*shape)
    rows = random_values(num_rows, shape[1], dtype=BF16)
    bias = random_values(shape[0], dtype=BF16, seed=2) if has_bias else None
    with poisoned_memory():
        kernel = packed_matmul(rows, codes, shape[0], levels=levels, bias=bias, impl="cpu")
    reference = packed_matmul(rows, codes, shape[0], levels=levels, bias=bias, impl="reference")
    exact = rows.double() @ weight.t() + (0 if bias is None else bias.double())
    assert_kernel_is_right(kernel, reference, exact)


def test_codes_of_many_rows_are_exactly_the_weight_that_they_stand_for():
    codes, levels, weight = codes_of(96, 576)
    rows = random_values(40, 576, dtype=BF16)
    assert torch.equal(unpack(widen(codes, levels, BF16), 96), weight.to(BF16))
    assert torch.equal(
        packed_matmul(rows, codes, 96, levels=levels), packed_matmul(rows, widen(codes, levels, BF16), 96)
    )


@pytest.mark.parametrize("num_rows", [20, 40])
def test_a_bad_number_stays_in_its_row_with_codes_too(num_rows: int):
    codes, levels, _ = codes_of(64, 64)
    rows = random_values(num_rows, 64, dtype=BF16)
    rows[3, 5] = torch.nan
    out = packed_matmul(rows, codes, 64, levels=levels)
    assert out[3].isnan().all()
    assert out[[row for row in range(num_rows) if row != 3]].isfinite().all()


STRIPS = pack(torch.ones(64, 64, dtype=BF16))
CODES = torch.zeros(2, 32, 32, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: packed_matmul(torch.ones(2, 64), STRIPS, 64), r"rows: expected .* bfloat16, got \[2, 64\] .*float32"),
        (lambda: packed_matmul(torch.ones(2, 40, dtype=BF16), STRIPS, 64), "rows: expected a multiple of 32 .* got 40"),
        (
            lambda: packed_matmul(torch.ones(2, 96, dtype=BF16), STRIPS, 64),
            r"strips: expected dense \[2, 48, 32, 2\]",
        ),
        (
            lambda: packed_matmul(torch.ones(2, 64, dtype=BF16), STRIPS, 65),
            r"strips: expected dense \[3, 32, 32, 2\]",
        ),
        (
            lambda: packed_matmul(torch.ones(2, 64, dtype=BF16), STRIPS, 64, bias=torch.ones(64)),
            r"bias: expected dense \[64\] bfloat16, got \[64\] .*float32",
        ),
        (
            lambda: packed_matmul(torch.ones(2, 64, dtype=BF16), STRIPS, 64, levels=torch.ones(2, 2, 2, 32)),
            r"strips: expected dense \[2, 32, 32\] uint8, got \[2, 32, 32, 2\]",
        ),
        (
            lambda: packed_matmul(torch.ones(2, 64, dtype=BF16), CODES, 64, levels=torch.ones(2, 2, 2, 32)),
            r"levels: expected dense \[2, 2, 2, 32\] float16, got \[2, 2, 2, 32\] .*float32",
        ),
    ],
    ids=["dtype", "columns", "other weight", "more outputs", "bias", "no codes", "levels"],
)
def test_wrong_arguments_are_named(call: Callable[[], torch.Tensor], message: str):
    with pytest.raises(ValueError, match=message):
        call()
