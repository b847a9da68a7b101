"""Quantised caches: what is written, what attention over it may lose, and what both operations refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.kernels.paged_attention import paged_attention
from minivllm.kernels.quantised_cache import LARGEST_CODE, SMALLEST_SCALE
from minivllm.kernels.reshape_and_cache import reshape_and_cache
from tests.kernels.helpers import Request, Shape, as_bits, random_values
from tests.kernels.quantised import (
    CACHE_DTYPES,
    QuantisedBatch,
    empty_caches,
    every_e4m3_midpoint,
    fresh,
    make_quantised,
)
from tests.tolerances import E4M3_ATTENTION_RMS, INT8_ATTENTION_RMS

IMPLS = ("cpu", "reference")
MIXTURE = [Request(1), Request(40, seed=1), Request(17, 17, seed=2), Request(100, 5, seed=3), Request(70, 33, seed=4)]


# ------------------------------------------------------------------ writing
@pytest.mark.parametrize("impl", IMPLS)
def test_two_rows_by_hand(impl: str):
    """Slot 5 is the second place of block 2. 254 is worth 2 a code; the middle 0.5 goes to the even code."""
    caches = empty_caches(1, 3, 2, 4, torch.int8)
    key = torch.tensor([[[254.0, -2.0, 1.0, 3.0]], [[0.0, 0.0, 0.0, 0.0]]])
    reshape_and_cache(key, -key, **caches, slot_mapping=torch.tensor([5, 2]), impl=impl)
    assert caches["k_cache"][0, 2, 1].tolist() == [127, -1, 0, 2]
    assert caches["v_cache"][0, 2, 1].tolist() == [-127, 1, 0, -2]
    assert caches["k_scales"][0, 2, 1] == caches["v_scales"][0, 2, 1] == 2.0
    assert caches["k_cache"][0, 1, 0].tolist() == [0, 0, 0, 0]
    assert caches["k_scales"][0, 1, 0] == SMALLEST_SCALE


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_the_cpu_writes_the_references_bits_and_no_other_slot_changes(data: st.DataObject):
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    cache_dtype = data.draw(st.sampled_from(CACHE_DTYPES))
    shape = (data.draw(st.sampled_from([1, 2, 5])), data.draw(st.integers(1, 6)), data.draw(st.sampled_from([1, 8])), 8)
    num_slots = shape[1] * shape[2]
    slots = data.draw(st.lists(st.integers(0, num_slots - 1), unique=True, max_size=17))
    written = list(slots)
    for index in data.draw(st.lists(st.integers(0, len(slots)), max_size=3)):
        slots.insert(index, -1)
    size = data.draw(st.sampled_from([1e-38, 1e-3, 1.0, 1e4]))
    rows = [random_values(len(slots), shape[0], 8, dtype=dtype, seed=seed, size=size) for seed in (1, 2)]
    cpu, reference = (empty_caches(*shape, cache_dtype) for _ in range(2))
    for impl, caches in (("cpu", cpu), ("reference", reference)):
        reshape_and_cache(*rows, **caches, slot_mapping=torch.tensor(slots, dtype=torch.int64), impl=impl)
    poison = empty_caches(*shape, cache_dtype)
    untouched = [slot for slot in range(num_slots) if slot not in written]
    for name, tensor in cpu.items():
        assert torch.equal(as_bits(tensor), as_bits(reference[name])), name
        assert torch.equal(*(as_bits(x.flatten(1, 2)[:, untouched]) for x in (tensor, poison[name]))), name


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-20, 1.0, 1e30])
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES, ids=str)
def test_every_value_comes_back_within_half_a_step(cache_dtype: torch.dtype, size: float):
    """int8: half a scale. e4m3: half of 2^-3 of the value, or of the 2^-9 between the smallest codes. Computed in
    float64, where a ratio may be off by the rounding of its scale to float32."""
    rows = random_values(33, 2, 16, dtype=torch.float64, size=size)
    caches = empty_caches(2, 33, 1, 16, cache_dtype)
    reshape_and_cache(rows, rows, **caches, slot_mapping=torch.arange(33), impl="reference")
    scales = caches["k_scales"].double().transpose(0, 1)  # [33, 2, 1]
    error = (caches["k_cache"][:, :, 0].double().transpose(0, 1) * scales - rows).abs()
    step = scales if cache_dtype == torch.int8 else torch.maximum(rows.abs() / 8, scales / 512)
    assert (error <= step / 2 * (1 + torch.finfo(torch.float32).eps)).all()
    if size > SMALLEST_SCALE * LARGEST_CODE[cache_dtype]:
        assert caches["k_cache"].float().abs().amax(dim=-1).eq(LARGEST_CODE[cache_dtype]).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_every_middle_between_two_e4m3_codes_goes_to_a_neighbour(impl: str):
    """And a code's own value to itself; -0.0 keeps its sign, NaN is never written."""
    rows = every_e4m3_midpoint()  # [num_rows, 1, 8]
    caches = empty_caches(1, rows.shape[0], 1, 8, torch.float8_e4m3fn)
    reshape_and_cache(rows, rows, **caches, slot_mapping=torch.arange(rows.shape[0]), impl=impl)
    assert caches["k_scales"].eq(1).all()
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    nearest = (rows.abs()[..., None] - codes).abs().amin(dim=-1)  # [num_rows, 1, 8]
    assert torch.equal((caches["k_cache"][0].float() - rows).abs(), nearest)


# ------------------------------------------------------------------ reading
def bound(batch: QuantisedBatch, r: int) -> torch.Tensor:  # [num_rows, num_heads]
    """How far request r's output may be from that of its unquantised cache.

    With every score off by at most e, every weight is off by a factor within exp(-2e) .. exp(2e); so
    |error| <= (exp(2e) - 1) * max|v| + max|v - v^|, where e = max over keys of scale * sum |q| * |k - k^|.
    """
    metadata, original = batch.original.metadata, batch.original
    positions = torch.arange(metadata.seq_lens[r])
    slots = metadata.block_table[r].long()[positions // metadata.block_size] * metadata.block_size
    slots += positions % metadata.block_size  # [seq_len]
    group = batch.query.shape[1] // original.k_cache.shape[0]
    found = []
    for letter, exact in (("k", original.k_cache), ("v", original.v_cache)):
        exact, codes = (x.flatten(1, 2)[:, slots].double() for x in (exact, batch.caches[f"{letter}_cache"]))
        scales = batch.caches[f"{letter}_scales"].flatten(1, 2)[:, slots, None].double()
        found += [exact.repeat_interleave(group, 0), (codes * scales - exact).abs().repeat_interleave(group, 0)]
    _, key_error, value, value_error = found  # [num_heads, seq_len, head_size]
    query = original.rows_of(batch.query)[r].double().transpose(0, 1)  # [num_heads, num_rows, head_size]
    e = (query.abs() @ key_error.transpose(1, 2)).amax(dim=2) * query.shape[2] ** -0.5  # [num_heads, num_rows]
    allowed = torch.expm1(2 * e) * value.abs().amax(dim=(1, 2))[:, None] + value_error.amax(dim=(1, 2))[:, None]
    return allowed.T


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES, ids=str)
@pytest.mark.parametrize("group", [1, 3, 5, 7])
def test_attention_stays_within_the_bound_and_the_usual_error(cache_dtype: torch.dtype, group: int):
    batch = make_quantised(MIXTURE, Shape(2, group, 64, 16, torch.float64), cache_dtype)
    exact, got = batch.original.run(impl="reference"), batch.run(impl="reference")
    for r, own in enumerate(batch.rows_of((got - exact).abs().amax(dim=2))):
        assert (own <= bound(batch, r)).all()
    relative = float(((got - exact).square().mean() / exact.square().mean()).sqrt())
    assert relative <= (INT8_ATTENTION_RMS if cache_dtype == torch.int8 else E4M3_ATTENTION_RMS)


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES, ids=str)
def test_values_that_are_codes_lose_nothing(cache_dtype: torch.dtype):
    """A cache that was read back is quantised into itself: then both caches give the same bits, window and cap too."""
    batch = make_quantised(MIXTURE, Shape(2, 3, 64, 16, torch.float64), cache_dtype)
    for letter, cache in (("k", batch.original.k_cache), ("v", batch.original.v_cache)):
        cache.copy_(batch.caches[f"{letter}_cache"].double() * batch.caches[f"{letter}_scales"][..., None].double())
    for options in ({}, {"sliding_window": 7}, {"soft_cap": 2.0, "alibi_slopes": torch.linspace(0.1, 0.5, 6)}):
        batch.original.metadata.plan = None
        assert torch.equal(batch.run(impl="reference", **options), batch.original.run(impl="reference", **options))


def test_auto_is_the_reference_on_a_cpu_and_the_fast_path_refuses():
    batch = make_quantised(MIXTURE, Shape(2, 3, 64, 16), torch.int8)
    assert torch.equal(batch.run(), batch.run(impl="reference"))
    with pytest.raises(ValueError, match=r"impl: 'cpu' reads no quantised cache; use 'auto'"):
        batch.run(impl="cpu")


# ------------------------------------------------------------------ the contract
def call(operation: str, **changes: Any) -> None:
    """A call that fits, with changes."""
    batch = make_quantised([Request(5)], Shape(2, 1, 8, 4), torch.int8)
    if operation == "write":
        rows = torch.zeros(1, 2, 8)
        reshape_and_cache(**{"key": rows, "value": rows, "slot_mapping": torch.arange(1), **batch.caches, **changes})
    else:
        metadata = fresh(batch.original.metadata)
        paged_attention(**{"query": batch.query, "metadata": metadata, "scale": 1.0, **batch.caches, **changes})


SCALES = r"_scales: expected \[2, 5, 4\] contiguous torch.float32 for a cache of torch.int8, got "
FITTING = torch.zeros(2, 5, 4)


@pytest.mark.parametrize("operation", ["write", "attend"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k_scales": None}, "k" + SCALES + "None"),
        ({"v_scales": None}, "v" + SCALES + "None"),
        ({"v_scales": FITTING[:, :3]}, "v" + SCALES + r"\[2, 3, 4\] torch.float32"),
        ({"k_scales": FITTING.double()}, "k" + SCALES + r"\[2, 5, 4\] torch.float64"),
        ({"k_scales": FITTING.transpose(1, 2)}, "k" + SCALES + r".*, contiguous False"),
        (
            {"v_cache": torch.zeros(2, 5, 4, 8, dtype=torch.float8_e4m3fn)},
            r"v_cache: expected torch.int8 as k_cache, got torch.float8_e4m3fn",
        ),
        (
            {"k_cache": torch.zeros(2, 5, 4, 8), "v_cache": torch.zeros(2, 5, 4, 8)},
            r"k_scales, v_scales: expected None for a cache of torch.float32, got scales",
        ),
    ],
    ids=["no keys' scales", "no values' scales", "shape", "dtype", "strides", "two types", "scales of values"],
)
def test_scales_that_do_not_fit_are_named_with_both_sides(operation: str, changes: dict[str, Any], message: str):
    call(operation)
    with pytest.raises(ValueError, match=message):
        call(operation, **changes)


@pytest.mark.parametrize(
    "changes", [{"value": torch.zeros(1, 2, 8).double()}, {"key": torch.zeros(1, 2, 8).char()}], ids=["two", "int8"]
)
def test_rows_to_quantise_have_one_floating_point_type(changes: dict[str, Any]):
    with pytest.raises(ValueError, match="key, value: expected one floating-point type, got torch"):
        call("write", **changes)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("slot", [8, -2])
def test_a_slot_outside_the_cache_is_refused_and_writes_nothing_of_its_own(impl: str, slot: int):
    caches = empty_caches(2, 2, 4, 8, torch.int8)
    rows = torch.zeros(2, 2, 8)
    with pytest.raises(ValueError, match=rf"slot_mapping: expected slots in \[-1, 8\), got {slot}$"):
        reshape_and_cache(rows, rows, **caches, slot_mapping=torch.tensor([3, slot]), impl=impl)
    assert caches["k_scales"].flatten(1, 2)[:, [0, 1, 2, 4, 5, 6, 7]].isnan().all()
