"""bfloat16 weights multiplied in float32: the same values, exactly, whenever the CPU makes it worth while.

Run by test_widening.py, in a process whose oneDNN does not use a matrix unit.
"""

import pytest
import torch

from minivllm.models.linear import Linear, ModelOptions
from minivllm.models.onednn import memory, pack
from minivllm.models.widening import WIDEN_FROM_ROWS, Widening
from tests.models.test_linear import loaded, random
from tests.tolerances import LINEAR_RTOL


@pytest.fixture
def widening(monkeypatch: pytest.MonkeyPatch) -> Widening:
    """As on a CPU whose float32 is faster."""
    monkeypatch.setattr(Widening, "pays", True)
    return Widening()


def weight_of(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:  # [out_features, in_features]
    return random(*shape, seed=seed).bfloat16()


@pytest.mark.parametrize("shape", [(128, 64), (192, 576), (960, 128)], ids=str)
def test_a_widened_weight_is_bit_for_bit_what_onednn_packs_of_the_float32_one(
    shape: tuple[int, int], widening: Widening
):
    for seed in range(2):  # the second weight overwrites the first in the scratch they share
        plain = weight_of(shape, seed)
        wide = widening.prepare(pack(plain), plain)
        assert wide is not None
        expected = pack(plain.float())
        assert torch.equal(memory(wide.scratch.widen(wide.pairs), torch.int32), memory(expected, torch.int32))


def test_layers_of_one_shape_share_a_scratch_and_each_gets_its_own_product(widening: Widening):
    options = ModelOptions(torch.bfloat16, widening=widening)
    weights = [weight_of((128, 64), seed) for seed in range(3)]
    layers = [loaded(Linear(64, 128, options), weight) for weight in weights]
    assert len({id(layer._wide.scratch) for layer in layers}) == 1
    rows = random(WIDEN_FROM_ROWS, 64, seed=9).bfloat16()
    for layer, weight in zip(layers, weights, strict=True):
        exact = rows.double() @ weight.double().t()
        rounding = torch.finfo(torch.bfloat16).eps * exact.abs().max()
        assert (layer(rows).double() - exact).abs().max() <= rounding


def test_sums_are_float32_sums(widening: Widening):
    """Before the one rounding at the end the error is float32's."""
    plain, rows = weight_of((64, 512)), random(100, 512, seed=1).bfloat16()
    wide = widening.prepare(pack(plain), plain)
    product = torch.ops.mkldnn._linear_pointwise(
        rows.float(), wide.scratch.widen(wide.pairs), None, "none", [], ""
    )  # [100, 64]
    exact = rows.double() @ plain.double().t()
    size = (rows.double().abs() @ plain.double().abs().t()).max()
    assert (product - exact).abs().max() <= LINEAR_RTOL * size
    assert torch.equal(wide.product(rows, None), product.bfloat16())


def test_few_rows_are_multiplied_in_bfloat16_many_in_float32(widening: Widening, monkeypatch: pytest.MonkeyPatch):
    layer = loaded(Linear(64, 128, ModelOptions(torch.bfloat16, widening=widening), bias=True), *weight_and_bias())
    used = []
    product = layer._wide.product
    monkeypatch.setattr(layer._wide, "product", lambda rows, bias: used.append(rows.shape) or product(rows, bias))
    layer(random(WIDEN_FROM_ROWS - 1, 64).bfloat16())
    assert used == []
    layer(random(WIDEN_FROM_ROWS, 64).bfloat16())
    layer(random(1, WIDEN_FROM_ROWS, 64)[:].bfloat16())  # rows behind a batch dimension count too
    assert used == [(WIDEN_FROM_ROWS, 64), (1, WIDEN_FROM_ROWS, 64)]


def weight_and_bias() -> tuple[torch.Tensor, torch.Tensor]:  # [128, 64], [128]
    return weight_of((128, 64)), random(128, seed=1).bfloat16()


@pytest.mark.parametrize("shape", [(100, 64), (960, 48), (64, 33)], ids=["rows", "columns", "an odd number"])
def test_shapes_with_padding_are_left_alone(shape: tuple[int, int], widening: Widening):
    plain = weight_of(shape)
    assert widening.prepare(pack(plain), plain) is None


def test_float32_weights_and_batch_invariant_models_are_left_alone(widening: Widening):
    assert widening.prepare(pack(random(128, 64)), random(128, 64)) is None
    invariant = ModelOptions(torch.bfloat16, batch_invariant=True, widening=widening)
    assert loaded(Linear(64, 128, invariant), weight_of((128, 64)))._wide is None


def test_nothing_is_widened_where_bfloat16_is_as_fast(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Widening, "pays", False)
    plain = weight_of((128, 64))
    assert Widening().prepare(pack(plain), plain) is None


@pytest.mark.parametrize(("bfloat16_seconds", "pays"), [(0.5, False), (1.25, False), (1.35, True), (2.0, True)])
def test_widening_pays_where_a_bfloat16_product_takes_clearly_longer(
    bfloat16_seconds: float, pays: bool, monkeypatch: pytest.MonkeyPatch
):
    seconds = {torch.float32: 1.0, torch.bfloat16: bfloat16_seconds}
    monkeypatch.setattr("minivllm.models.widening._seconds_of_a_product", seconds.__getitem__)
    assert Widening().pays is pays
