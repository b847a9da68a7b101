"""Packed products: few shapes, the same values."""

import pytest
import torch

from minivllm.models import onednn
from tests.models.test_linear import random
from tests.tolerances import LINEAR_RTOL


def test_any_number_of_rows_up_to_a_thousand_needs_27_compiled_sizes():
    sizes = {onednn.padded_rows(num_rows) for num_rows in range(1, 1025)}
    assert len(sizes) == 27
    assert sorted(sizes)[:8] == [1, 2, 4, 8, 16, 24, 32, 40]


@pytest.mark.parametrize("num_rows", range(1, 1300))
def test_a_size_holds_its_rows_and_wastes_little(num_rows: int):
    size = onednn.padded_rows(num_rows)
    assert num_rows <= size < num_rows + max(4, 8 * (num_rows > 8), 32 * (num_rows > 64), 64 * (num_rows > 128))
    assert onednn.padded_rows(size) == size


@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 5, 8, 9, 31, 33, 65, 97, 129, 200])
def test_padding_changes_no_value(num_rows: int):
    weight, bias, rows = random(96, 48), random(96, seed=1), random(num_rows, 48, seed=2)
    out = onednn.product(rows, onednn.pack(weight), bias)
    assert out.shape == (num_rows, 96)
    exact = rows.double() @ weight.double().t() + bias.double()
    size = (rows.double().abs() @ weight.double().abs().t()).max() + 1 if num_rows else 1.0
    assert torch.all((out - exact).abs() <= LINEAR_RTOL * size)


def test_rows_behind_a_batch_dimension_keep_their_shape():
    """transformers' networks send [1, num_tokens, hidden_size]."""
    packed, rows = onednn.pack(random(96, 48)), random(5, 48, seed=2)
    assert torch.equal(onednn.product(rows[None], packed, None)[0], onednn.product(rows, packed, None))
