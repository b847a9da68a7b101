"""quant_matmul: codes and scales stand for the weights they say, GGUF's blocks are read byte for byte, the contract."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.kernels.quant_matmul import (
    GROUP_SIZES,
    from_q4_0,
    from_q4_1,
    pack_int4,
    quant_matmul,
    quantise_int4,
    quantise_int8,
    unpack_int4,
)
from tests.kernels.helpers import assert_kernel_is_right, random_values
from tests.kernels.quant_weights import KINDS, make_product
from tests.tolerances import FLOAT64_RTOL, INT4_WEIGHT_RMS, INT8_WEIGHT_RMS

EXACT = {"rtol": FLOAT64_RTOL, "atol": FLOAT64_RTOL}


def weight_of(
    codes: torch.Tensor,  # [out_features, in_features] int8 or [out_features, in_features // 2] uint8
    scales: torch.Tensor,  # [out_features] or [out_features, num_groups]
    minimums: torch.Tensor | None = None,  # [out_features, num_groups]
) -> torch.Tensor:  # [out_features, in_features] fp64
    """The weights, column by column: what the identity's rows give."""
    in_features = codes.shape[1] * (2 if codes.dtype == torch.uint8 else 1)
    identity = torch.eye(in_features, dtype=torch.float64)
    return quant_matmul(identity, codes, scales, minimums, impl="reference").T


# ------------------------------------------------------------------ by hand
def test_a_product_in_8_bits_by_hand():
    rows = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, -1.0]])
    codes = torch.tensor([[1, 0, -2], [127, 1, 1]], dtype=torch.int8)
    out = quant_matmul(rows, codes, torch.tensor([0.5, 2.0]))
    assert out.tolist() == [[-2.5, 264.0], [1.0, -2.0]]


def test_a_product_in_4_bits_by_hand():
    """Two groups of 32: columns 0 and 16 share byte 0, columns 33 and 49 byte 17."""
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, 0], codes[0, 17] = 0xA3, 0x0F
    scales, minimums = torch.tensor([[2.0, 10.0]]), torch.tensor([[1.0, -5.0]])
    weight = weight_of(codes, scales, minimums)[0]
    assert (weight[0], weight[16], weight[1], weight[33], weight[49]) == (7.0, 21.0, 1.0, 145.0, -5.0)
    assert weight.sum() == 32 * 1.0 + 2 * (3 + 10) + 32 * -5.0 + 10 * 15


# ------------------------------------------------------------------ codes
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_unpacking_is_the_reverse_of_packing(data: st.DataObject):
    size = data.draw(st.sampled_from(GROUP_SIZES))
    shape = (data.draw(st.integers(1, 5)), size * data.draw(st.integers(1, 4)))
    codes = torch.from_numpy(np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 16, shape))
    packed = pack_int4(codes, size)
    assert (packed.shape, packed.dtype) == ((shape[0], shape[1] // 2), torch.uint8)
    assert torch.equal(unpack_int4(packed, size), codes.to(torch.uint8))


def test_int8_weights_come_back_within_half_a_step_and_zeros_as_zeros():
    weight = random_values(33, 70, dtype=torch.float32)
    weight[5] = 0
    codes, scales = quantise_int8(weight)
    error = (weight_of(codes, scales) - weight.double()).abs()
    half_steps = scales.double()[:, None] / 2
    assert (error <= half_steps * (1 + torch.finfo(torch.float32).eps * 127)).all()
    assert codes.abs().amax(dim=1).tolist() == [0 if row == 5 else 127 for row in range(33)]


@pytest.mark.parametrize("size", GROUP_SIZES)
def test_int4_weights_come_back_within_half_a_step_and_constants_as_they_are(size: int):
    weight = random_values(33, 3 * size, dtype=torch.float32)
    weight[5, :size] = 0.375
    codes, scales, minimums = quantise_int4(weight, size)
    back = weight_of(codes, scales, minimums)
    error = (back - weight.double()).abs().unflatten(1, (3, size))
    computed = torch.finfo(torch.float32).eps * weight.abs().max() * 2
    assert (error <= scales.double()[..., None] / 2 + computed).all()
    assert (back[5, :size] == 0.375).all()
    assert unpack_int4(codes, size).amax() == 15


@pytest.mark.parametrize(("kind", "limit"), [("int8", INT8_WEIGHT_RMS), *((k, INT4_WEIGHT_RMS) for k in KINDS[1:])])
def test_the_usual_error_of_a_product(kind: str, limit: float):
    product = make_product(kind, 16, 384, 64, torch.float64)
    weight = random_values(64, 384, dtype=torch.float32, seed=2) * torch.linspace(0.01, 2.0, 64)[:, None]
    exact = product.rows @ weight.double().T
    error = product.run("reference") - exact
    assert (error.square().mean() / exact.square().mean()).sqrt() <= limit


# ------------------------------------------------------------------ GGUF
def random_blocks(rows: int, num_groups: int, header: int, seed: int) -> torch.Tensor:
    """Blocks of random codes under `header` fp16 values of usual size, [rows, num_groups * (2 * header + 16)] uint8."""
    random = np.random.default_rng(seed)
    values = random.standard_normal((rows, num_groups, header)).astype(np.float16).view(np.uint8)
    codes = random.integers(0, 256, (rows, num_groups, 16), dtype=np.uint8)
    return torch.from_numpy(np.concatenate([values, codes], axis=2)).flatten(1)


@pytest.mark.parametrize("num_groups", [1, 2, 18])
@pytest.mark.parametrize(("kind", "header", "convert"), [("Q4_0", 1, from_q4_0), ("Q4_1", 2, from_q4_1)])
def test_blocks_of_a_gguf_file_are_what_gguf_says(kind: str, header: int, convert: Any, num_groups: int):
    blocks = random_blocks(7, num_groups, header, seed=num_groups)
    expected = gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind])  # [7, 32 * num_groups] fp32
    codes, scales, minimums = convert(blocks)
    assert (scales.dtype, scales.shape) == (torch.float16, (7, num_groups))
    assert torch.equal(weight_of(codes, scales, minimums).float(), torch.from_numpy(expected))


def test_codes_of_a_gguf_file_keep_their_bytes():
    blocks = random_blocks(3, 4, 1, seed=0)
    assert torch.equal(from_q4_0(blocks)[0].view(3, 4, 16), blocks.view(3, 4, 18)[..., 2:])


# ------------------------------------------------------------------ the product
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 7, 63])
@pytest.mark.parametrize("kind", KINDS)
def test_the_cpu_obeys_the_rule(kind: str, num_tokens: int, dtype: torch.dtype):
    product = make_product(kind, num_tokens, 384, 33, dtype)
    assert_kernel_is_right(product.run("cpu"), product.run("reference"), product.double().run("reference"))
    assert torch.equal(product.run("auto"), product.run("cpu"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_in_float64_is_the_product_with_the_dequantised_weights(kind: str):
    product = make_product(kind, 5, 384, 33, torch.float64)
    expected = product.rows @ weight_of(*product[1:]).T
    torch.testing.assert_close(product.run("reference"), expected, **EXACT)


# ------------------------------------------------------------------ the contract
def arguments(kind: str, **changes: Any) -> dict[str, Any]:
    return {**make_product(kind, 2, 64, 3)._asdict(), **changes}


ROWS = r"rows: expected \[num_tokens, 64\] of a floating-point type as codes "
SCALES8 = r"scales, minimums: expected \[3\] and None for int8 codes \[3, 64\], got "


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("int8", {"rows": torch.zeros(2, 63)}, ROWS + r"\[3, 64\] torch.int8, got \[2, 63\] torch.float32"),
        ("int4 in 32", {"rows": torch.zeros(2, 32)}, ROWS + r"\[3, 32\] torch.uint8, got \[2, 32\]"),
        ("int8", {"rows": torch.zeros(2, 64).int()}, ROWS + r".*, got \[2, 64\] torch.int32"),
        ("int8", {"rows": torch.zeros(64)}, ROWS + r".*, got \[64\]"),
        ("int8", {"codes": torch.zeros(3, 64)}, r"codes: expected contiguous .* uint8, got \[3, 64\] torch.float32"),
        ("int8", {"codes": torch.zeros(64, 3).char().T}, r"codes: expected .*, contiguous False"),
        ("int8", {"scales": torch.zeros(4)}, SCALES8 + r"\[4\] and None"),
        ("int8", {"minimums": torch.zeros(3)}, SCALES8 + r"\[3\] and \[3\]"),
        ("int8", {"scales": torch.zeros(3).double()}, r"scales: expected float16 or float32, got torch.float64"),
        (
            "int4 in 32",
            {"scales": torch.zeros(3, 4)},
            r"scales: expected one of \[\[3, 2\], \[3, 1\]\] for codes \[3, 32\] in groups of 32, 64, 128, "
            r"got \[3, 4\]",
        ),
        ("int4 in 32", {"minimums": None}, r"minimums: expected \[3, 2\] torch.float32 as scales, got None"),
        (
            "int4 in 32",
            {"minimums": torch.zeros(3, 2).half()},
            r"minimums: expected \[3, 2\] torch.float32 as scales, got \[3, 2\] torch.float16",
        ),
        ("int8", {"impl": "fast"}, r"impl: expected one of .*, got 'fast'"),
    ],
    ids=[
        "columns", "packed columns", "integer rows", "one row", "codes", "strides", "scales", "minimums", "scale dtype",
        "groups", "no minimums", "two dtypes", "impl",
    ],
)  # fmt: skip
def test_every_wrong_argument_is_named_with_both_sides(kind: str, changes: dict[str, Any], message: str):
    quant_matmul(**arguments(kind))
    with pytest.raises(ValueError, match=message):
        quant_matmul(**arguments(kind, **changes))


@pytest.mark.parametrize(("in_features", "size"), [(48, 32), (64, 48), (96, 64)])
def test_groups_that_do_not_fit_are_refused(in_features: int, size: int):
    with pytest.raises(ValueError, match=rf"group_size: expected one of 32, 64, 128 .* {in_features}, got {size}$"):
        quantise_int4(torch.zeros(2, in_features), size)
