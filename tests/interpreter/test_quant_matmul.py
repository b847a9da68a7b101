"""quant_matmul in the interpreter: both kernels obey the rule for any number of rows, odd sizes and every group."""

from __future__ import annotations

import pytest
import torch

from minivllm.kernels.quant_matmul import from_q4_0, quant_matmul
from tests.interpreter.helpers import DTYPES, assert_right, far_apart
from tests.kernels.helpers import poisoned_memory, random_values
from tests.kernels.quant_weights import KINDS, Product, make_product


def check(product: Product) -> None:
    """The kernel obeys the rule. A few values tell little about the reference's error: that is a matter of luck, so
    32 more rows and outputs, over as many columns, join the comparison."""
    kind = "int8" if product.minimums is None else f"int4 in {product.rows.shape[1] // product.scales.shape[1]}"
    more = make_product(kind, 32, product.rows.shape[1], 32, product.rows.dtype)
    with poisoned_memory():
        kernel = torch.cat([p.run("triton").flatten() for p in (product, more)])
    reference = torch.cat([p.run("reference").flatten() for p in (product, more)])
    exact = torch.cat([p.double().run("reference").flatten() for p in (product, more)])
    assert_right(kernel, reference, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_dtype(kind: str, dtype: torch.dtype):
    check(make_product(kind, 5, 384, 70, dtype))


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 15, 16, 17, 33, 63, 64, 65, 70])
@pytest.mark.parametrize("kind", ["int8", "int4 in 32"])
def test_every_number_of_rows(kind: str, num_tokens: int):
    check(make_product(kind, num_tokens, 192, 40))


@pytest.mark.parametrize("out_features", [1, 31, 33, 127])
@pytest.mark.parametrize("num_tokens", [1, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_outputs(kind: str, num_tokens: int, out_features: int):
    check(make_product(kind, num_tokens, 256, out_features))


@pytest.mark.parametrize("num_tokens", [1, 20])
@pytest.mark.parametrize(
    ("kind", "in_features"),
    [
        *(("int8", size) for size in (1, 7, 63, 65, 129, 576)),
        *(("int4 in 32", size) for size in (32, 96, 160, 576)),
        *(("int4 in 64", size) for size in (64, 192, 576)),
        *(("int4 in 128", size) for size in (128, 640)),
    ],
)
def test_every_number_of_columns(kind: str, num_tokens: int, in_features: int):
    """A last tile of columns that is not full, and with 4 bits some groups of it only."""
    check(make_product(kind, num_tokens, in_features, 33))


@pytest.mark.parametrize("kind", KINDS)
def test_scales_in_float16(kind: str):
    check(make_product(kind, 3, 256, 40, scale_dtype=torch.float16))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_scales_that_are_views(kind: str):
    """Rows inside wider ones; scales that are every second value; columns that are not side by side."""
    plain = make_product(kind, 5, 256, 40)
    expected = plain.run("triton")
    wide = torch.full((5, 300), torch.nan)
    wide[:, 10:266] = plain.rows
    stretched = [None if x is None else torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0] for x in plain[2:]]
    for rows in (wide[:, 10:266], plain.rows.T.contiguous().T):
        assert torch.equal(quant_matmul(rows, plain.codes, *stretched, impl="triton"), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_keeps_its_bits_beside_other_rows_of_the_same_tile(kind: str):
    product = make_product(kind, 16, 384, 33)
    out = product.run("triton")
    for token in (0, 7, 15):
        alone = product._replace(rows=product.rows[token : token + 1]).run("triton")
        assert torch.equal(alone[0], out[token])


def test_no_rows_and_no_outputs():
    product = make_product("int8", 0, 64, 8)
    assert product.run("triton").shape == (0, 8)
    assert quant_matmul(torch.ones(3, 8), torch.ones(0, 8).char(), torch.ones(0), impl="triton").shape == (3, 0)


def test_weights_as_a_gguf_file_has_them():
    blocks = torch.randint(0, 256, (33, 6 * 18), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    blocks.unflatten(1, (6, 18))[..., 1] &= 0x3B  # fp16 scales below 1, none infinite
    check(Product(random_values(3, 192, dtype=torch.float32), *from_q4_0(blocks)))


def test_rows_that_lie_far_apart():
    """Offsets of the third row do not fit into 32 bits."""
    rows = far_apart(3, 64)
    product = make_product("int8", 3, 64, 8, torch.float16)
    near = product._replace(rows=rows.contiguous())
    assert torch.equal(product._replace(rows=rows).run("triton"), near.run("triton"))
