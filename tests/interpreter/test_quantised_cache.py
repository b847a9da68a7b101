"""Quantised caches in the interpreter: codes and scales equal the reference's, attention obeys the rule on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from minivllm.kernels.paged_attention import kernel as attention_kernel
from minivllm.kernels.paged_attention.split import Launch, choose_launch
from minivllm.kernels.reshape_and_cache import kernel as cache_kernel
from minivllm.kernels.reshape_and_cache import reshape_and_cache
from tests.interpreter.helpers import DTYPES, assert_right
from tests.kernels.helpers import Request, Shape, as_bits, poisoned_memory, random_values
from tests.kernels.quantised import CACHE_DTYPES, QuantisedBatch, empty_caches, every_e4m3_midpoint, make_quantised

MIXTURE = [Request(1), Request(40, seed=1), Request(17, 17, seed=2), Request(100, 5, seed=3), Request(70, 33, seed=4)]
DECODES = [Request(1), Request(15, seed=1), Request(16, seed=2), Request(17, seed=3), Request(300, seed=4)]


# ------------------------------------------------------------------ writing
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_kv_heads", "block_size", "head_size"), [(1, 16, 64), (3, 16, 80), (5, 32, 8)])
def test_codes_and_scales_are_the_references_and_nothing_else_changes(
    cache_dtype: torch.dtype, dtype: torch.dtype, num_kv_heads: int, block_size: int, head_size: int
):
    """Slots outside the cache write nothing. Rows of all sizes, of zeros, and below the smallest scale."""
    sizes = torch.tensor([1.0, 1e-4, 0.0, 300.0, 1e-38, 7.0]).view(6, 1, 1)
    qkv = (random_values(6, 3 * num_kv_heads, head_size, dtype=torch.float32) * sizes).to(dtype)
    _, key, value = qkv.split(num_kv_heads, dim=1)
    num_slots = 4 * block_size
    slots = [3, 5, num_slots - 1, 0, 2, num_slots // 2]
    got, expected = (empty_caches(num_kv_heads, 4, block_size, head_size, cache_dtype) for _ in range(2))
    inside = torch.tensor(slots)
    reshape_and_cache(key, value, **expected, slot_mapping=inside, impl="reference")
    with poisoned_memory():
        reshape_and_cache(
            torch.cat([key, key[:3]]),
            torch.cat([value, value[:3]]),
            **got,
            slot_mapping=torch.tensor([*slots, -1, num_slots, 2**40]),
            impl="triton",
        )
    for name, tensor in got.items():
        assert torch.equal(as_bits(tensor), as_bits(expected[name])), name


@pytest.mark.parametrize("impl", ["triton", "cpu"])
def test_every_middle_between_two_codes_goes_to_the_even_one(impl: str):
    """One row per e4m3 code, its neighbours' middles among them; the row's 448 makes its scale 1."""
    rows = every_e4m3_midpoint()  # [num_rows, 1, 8]
    got, expected = (empty_caches(1, rows.shape[0], 1, 8, torch.float8_e4m3fn) for _ in range(2))
    slots = torch.arange(rows.shape[0])
    reshape_and_cache(rows, rows, **got, slot_mapping=slots, impl=impl)
    reshape_and_cache(rows, rows, **expected, slot_mapping=slots, impl="reference")
    assert torch.equal(as_bits(got["k_cache"]), as_bits(expected["k_cache"]))


def test_int8_middles_go_to_the_even_code():
    row = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 0.49999997]).view(1, 1, 8)
    caches = empty_caches(1, 1, 1, 8, torch.int8)
    reshape_and_cache(row, row, **caches, slot_mapping=torch.zeros(1, dtype=torch.int64), impl="triton")
    assert caches["k_cache"].flatten().tolist() == [127, 0, 2, 2, 0, -2, -126, 0]
    assert caches["k_scales"].item() == 1.0


def test_offsets_beyond_two_to_the_31_are_right():
    """The cache has 2^31 + 2^20 codes, of which only the touched pages exist."""
    num_blocks, block_size, head_size = 2**15 + 16, 16, 4096
    k_cache, v_cache = (torch.empty(1, num_blocks, block_size, head_size, dtype=torch.int8) for _ in "kv")
    k_scales, v_scales = (torch.empty(1, num_blocks, block_size) for _ in "kv")
    assert k_cache.numel() > 2**31
    key, value = (random_values(1, 1, head_size, dtype=torch.float32, seed=seed) for seed in (1, 2))
    slot = torch.tensor([num_blocks * block_size - 1])
    cache_kernel.write(key, value, k_cache, v_cache, slot, k_scales, v_scales)
    for rows, cache, scales in ((key, k_cache, k_scales), (value, v_cache, v_scales)):
        assert scales[0, -1, -1] == rows.abs().max() / 127
        assert torch.equal(cache[0, -1, -1], (rows[0, 0] / scales[0, -1, -1]).round().to(torch.int8))


# ------------------------------------------------------------------ attention
def check(batch: QuantisedBatch, **options: Any) -> torch.Tensor:  # [num_tokens, num_heads, head_size]
    with poisoned_memory():
        out = batch.run(impl="triton", **options)
    assert_right(out, batch.run(impl="reference", **options), batch.double().run(impl="reference", **options))
    return out


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("requests", [MIXTURE, DECODES], ids=["mixture", "decodes"])
def test_every_dtype(cache_dtype: torch.dtype, dtype: torch.dtype, requests: list[Request]):
    check(make_quantised(requests, Shape(2, 3, 64, 16, dtype), cache_dtype))


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES, ids=str)
@pytest.mark.parametrize(("group", "head_size"), [(1, 64), (3, 80), (5, 128), (7, 256)])
def test_every_group_and_head_size(cache_dtype: torch.dtype, group: int, head_size: int):
    check(make_quantised(MIXTURE, Shape(1, group, head_size, 16), cache_dtype))


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_every_block_size(cache_dtype: torch.dtype, block_size: int):
    requests = [*MIXTURE, Request(block_size), Request(block_size + 1, 2), Request(2 * block_size + 1)]
    check(make_quantised(requests, Shape(2, 1, 64, block_size), cache_dtype))


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"sliding_window": 1},
        {"sliding_window": 7},
        {"sliding_window": 99},
        {"soft_cap": 2.0, "sliding_window": 20, "alibi_slopes": torch.linspace(0.05, 0.5, 6)},
    ],
    ids=["window 1", "window 7", "window 99", "all"],
)
def test_every_option(cache_dtype: torch.dtype, options: dict[str, Any]):
    check(make_quantised(MIXTURE, Shape(2, 3, 64, 16), cache_dtype), **options)


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES, ids=str)
@pytest.mark.parametrize("multiprocessors", [6, 64])
def test_splits_merge_into_the_whole(cache_dtype: torch.dtype, multiprocessors: int, monkeypatch: pytest.MonkeyPatch):
    """A GPU of 6 multiprocessors cuts 700 keys in two, one of 64 in four; short requests leave most splits empty."""
    monkeypatch.setattr(attention_kernel, "num_multiprocessors", lambda device: multiprocessors)
    launches = []

    def choose(*arguments: Any, **options: Any) -> Launch:
        launches.append(choose_launch(*arguments, **options))
        return launches[-1]

    monkeypatch.setattr(attention_kernel, "choose_launch", choose)
    check(make_quantised([*DECODES, Request(700, seed=5)], Shape(2, 3, 64, 16), cache_dtype))
    assert launches[0].num_splits == {6: 2, 64: 4}[multiprocessors]


@pytest.mark.parametrize("size", [1e-6, 1e3])
def test_small_and_large_values_survive_in_float16(size: float):
    """A weight of 1/1000 times a scale of 1e-8 is no float16; the values that they make are."""
    batch = make_quantised([Request(1000, seed=1)], Shape(1, 1, 64, 16, torch.float16), torch.int8, value_size=size)
    out = check(batch)
    assert out.abs().max() > 0


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES, ids=str)
def test_batch_invariant_rows_keep_their_bits_in_any_company_and_chunk(cache_dtype: torch.dtype):
    shape = Shape(1, 3, 64, 16)
    alone = make_quantised([Request(100, 100, seed=3)], shape, cache_dtype, batch_invariant=True).run(impl="triton")
    for requests, index in [
        ([Request(100, 5, seed=3)], 0),
        ([Request(30, 30, seed=9), Request(100, 37, seed=3), Request(64, seed=8)], 1),
        ([Request(7, seed=1), Request(100, seed=3)], 1),
    ]:
        batch = make_quantised(requests, shape, cache_dtype, batch_invariant=True, seed=5)
        rows = batch.rows_of(batch.run(impl="triton"))[index]
        assert torch.equal(as_bits(rows), as_bits(alone[-rows.shape[0] :]))


def test_the_type_of_sm_80_reads_the_same_values(monkeypatch: pytest.MonkeyPatch):
    """sm_80 has no e4m3 but e4b15: the same bits, read as 2^-8 of the value. Its subnormal codes 1 to 7 are left out:
    the interpreter reads them wrongly where they stay subnormal in float16."""
    batch = make_quantised(MIXTURE, Shape(2, 3, 64, 16), torch.float8_e4m3fn)
    for name in ("k_cache", "v_cache"):
        codes = batch.caches[name].view(torch.int8)
        codes[(codes & 0x7F) < 8] = 0
    expected = batch.run(impl="triton")
    monkeypatch.setattr(attention_kernel, "_as_stored", lambda cache: triton.reinterpret(cache, tl.float8e4b15))
    assert torch.equal(batch.run(impl="triton"), expected)
