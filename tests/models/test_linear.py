"""Stored weights: the same product, once in memory, and rows that do not feel their neighbours."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch
from torch.nn import functional as F

from minivllm.models import linear
from minivllm.models.linear import (
    FORMATS,
    ROW_TILE,
    Embedding,
    Linear,
    ModelOptions,
    TiedEmbedding,
    choose_format,
    find_tiles,
    in_row_tiles,
    read_rows,
    weight_bytes,
)
from tests.tolerances import LINEAR_RTOL

FP32 = ModelOptions(torch.float32)
INVARIANT = ModelOptions(torch.float32, batch_invariant=True)
SHAPES = [(576, 1536), (960, 576), (99, 48), (33, 40), (257, 64), (1000, 30), (8, 8), (1, 7)]  # out x in
ROW_COUNTS = [1, 2, 3, ROW_TILE - 1, ROW_TILE, ROW_TILE + 1, 2 * ROW_TILE + 5]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loaded(module: torch.nn.Module, *tensors: torch.Tensor) -> torch.nn.Module:
    for slot, tensor in zip(module.weight_slots("layer.proj").values(), tensors, strict=True):
        slot.put(tensor)
    return module


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", [FP32, INVARIANT], ids=["free", "invariant"])
def test_the_product_is_that_of_the_plain_weight(shape: tuple[int, int], options: ModelOptions) -> None:
    weight, bias = random(*shape), random(shape[0], seed=1)
    layer = loaded(Linear(shape[1], shape[0], options, bias=True), weight, bias)
    for num_rows in ROW_COUNTS:
        rows = random(num_rows, shape[1], seed=num_rows)
        expected = F.linear(rows.double(), weight.double(), bias.double())
        size = (rows.double().abs() @ weight.double().abs().t()).max() + 1  # of the terms that are summed
        assert (layer(rows) - expected).abs().max() <= LINEAR_RTOL * size


def test_no_rows_give_no_rows() -> None:
    for options in (FP32, INVARIANT):
        assert loaded(Linear(16, 24, options), random(24, 16))(torch.empty(0, 16)).shape == (0, 24)


def test_shards_are_stacked_in_their_order_whatever_order_they_come_in() -> None:
    widths = {"q_proj": 48, "k_proj": 16, "v_proj": 8}
    layer = Linear(32, widths, FP32, bias=True)
    slots = layer.weight_slots("model.layers.0.self_attn.qkv_proj")
    tensors = {name: random(*slot.shape, seed=number) for number, (name, slot) in enumerate(slots.items())}
    for name in sorted(slots, reverse=True):
        slots[name].put(tensors[name])
    prefix = "model.layers.0.self_attn."
    weight = torch.cat([tensors[f"{prefix}{shard}.weight"] for shard in widths])
    bias = torch.cat([tensors[f"{prefix}{shard}.bias"] for shard in widths])
    rows = random(5, 32)
    torch.testing.assert_close(layer(rows), F.linear(rows, weight, bias))


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_there_is_one_copy_of_a_weight_packed_or_plain(batch_invariant: bool) -> None:
    weight = random(640, 1024)  # whole tiles: a packed copy is exactly as large
    layer = loaded(Linear(1024, 640, ModelOptions(torch.float32, batch_invariant)), weight)
    assert layer.weight.is_mkldnn == batch_invariant
    assert weight_bytes(layer) == weight.nbytes
    # type() and not isinstance(): some objects of torch warn when they are asked for their class
    alive = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and t.shape == weight.shape]
    assert {id(t) for t in alive} <= {id(weight), id(layer.weight)}


def test_a_dtype_that_onednn_cannot_multiply_stays_plain() -> None:
    weight = random(640, 1024).double()
    layer = loaded(Linear(1024, 640, ModelOptions(torch.float64)), weight)
    assert not layer.weight.is_mkldnn
    torch.testing.assert_close(layer(random(3, 1024).double()), random(3, 1024).double() @ weight.t())


# ------------------------------------------------------------------ batch invariance
@pytest.mark.parametrize("name", ["plain", "packed", "int8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_rows_bits_depend_neither_on_its_place_in_the_tile_nor_on_the_others(
    name: str, shape: tuple[int, int]
) -> None:
    weight_format, weight = FORMATS[name], random(*shape)
    stored = weight_format.store(weight)

    def product(rows: torch.Tensor) -> torch.Tensor:
        return in_row_tiles(lambda tile: weight_format.product(tile, stored, None), rows)

    mine = random(1, shape[1], seed=7)
    alone = product(mine)
    for num_rows, seed in itertools.product(ROW_COUNTS, range(2)):
        others = random(num_rows, shape[1], seed=seed) * 100
        for place in range(num_rows):
            rows = others.clone()
            rows[place] = mine
            assert torch.equal(product(rows)[place], alone[0]), f"row {place} of {num_rows}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_invariant_layer_gives_the_same_bits_alone_and_in_company(dtype: torch.dtype) -> None:
    options = ModelOptions(dtype, batch_invariant=True)
    layer = loaded(Linear(576, 960, options, bias=True), random(960, 576), random(960, seed=1))
    table = loaded(TiedEmbedding(257, 576, options), random(257, 576))
    rows = random(37, 576, seed=2).to(dtype)
    for product in (layer, table.logits):
        together = product(rows)
        assert torch.equal(torch.cat([product(row[None]) for row in rows]), together)
        assert torch.equal(torch.cat([product(part) for part in rows.split([5, 30, 2])]), together)


# ------------------------------------------------------------------ the tied table
@pytest.mark.parametrize("shape", [(4160, 576), (99, 48), (257, 40), (65, 30)], ids=str)
def test_a_tied_table_gives_bit_exact_rows_and_the_logits_of_the_plain_table(shape: tuple[int, int]) -> None:
    plain = random(*shape)
    table = loaded(TiedEmbedding(*shape, FP32), plain)
    assert table.weight.is_mkldnn
    ids = torch.randint(shape[0], (50,), generator=torch.Generator().manual_seed(1))
    assert torch.equal(table(ids), plain[ids])
    rows = random(5, shape[1], seed=3)
    expected = rows.double() @ plain.double().t()
    size = (rows.double().abs() @ plain.double().abs().t()).max() + 1  # of the terms that are summed
    assert (table.logits(rows) - expected).abs().max() <= LINEAR_RTOL * size


def test_a_tied_table_is_in_memory_once() -> None:
    plain = random(4096, 576)
    table = loaded(TiedEmbedding(4096, 576, FP32), plain)
    assert weight_bytes(table) == plain.nbytes
    storage = table._tiles.untyped_storage()  # a view of the packed memory, not a copy
    assert storage.data_ptr() == torch.ops.mkldnn.data_ptr(table.weight)


def test_an_unknown_layout_keeps_the_table_plain_and_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "find_tiles", lambda packed, plain: None)
    plain = random(257, 48)
    table = loaded(TiedEmbedding(257, 48, FP32), plain)
    assert not table.weight.is_mkldnn
    assert torch.equal(table(torch.tensor([0, 256, 7])), plain[[0, 256, 7]])
    torch.testing.assert_close(table.logits(plain[:3]), plain[:3] @ plain.t())


def test_tiles_that_do_not_hold_the_plain_rows_are_not_taken() -> None:
    plain = random(257, 48)
    packed = FORMATS["packed"].store(plain)
    assert torch.equal(read_rows(find_tiles(packed, plain), torch.arange(257))[:, :48], plain)
    plain[256, 47] += 1  # one value, far behind the first rows
    assert find_tiles(packed, plain) is None


def test_an_embedding_copies_what_it_is_given() -> None:
    plain = random(10, 4)
    table = loaded(Embedding(10, 4, FP32), plain)
    expected = plain[[3, 3, 9]].clone()
    plain.zero_()  # may be a view of a file
    assert torch.equal(table(torch.tensor([3, 3, 9])), expected)


@pytest.mark.parametrize("exact", [False, True])
def test_the_format_is_chosen_by_what_the_cpu_multiplies_fast_and_in_float32_by_exactness(exact: bool) -> None:
    assert choose_format(torch.empty(2, 2), exact=exact) is FORMATS["plain" if exact else "packed"]
    can_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    bf16 = choose_format(torch.empty(2, 2, dtype=torch.bfloat16), exact=exact)
    assert bf16 is FORMATS["packed" if can_bf16 else "plain"]
    assert choose_format(torch.empty(2, 2, dtype=torch.float64), exact=exact) is FORMATS["plain"]
