"""paged_attention in the interpreter: every kind of row, option and split obeys the rule on a poisoned cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.kernels.paged_attention import kernel
from minivllm.kernels.paged_attention.split import choose_launch
from tests.interpreter.helpers import DTYPES, assert_right
from tests.kernels.helpers import Batch, Request, Shape, as_bits, make_batch, poisoned_memory

MIXTURE = [Request(1), Request(40, seed=1), Request(17, 17, seed=2), Request(100, 5, seed=3), Request(70, 33, seed=4)]
DECODES = [Request(1), Request(15, seed=1), Request(16, seed=2), Request(17, seed=3), Request(300, seed=4)]


def check(batch: Batch, **options: Any) -> torch.Tensor:  # [num_tokens, num_heads, head_size]
    with poisoned_memory():
        out = batch.run(impl="triton", **options)
    batch.metadata.plan = None
    assert_right(out, batch.run(impl="reference", **options), batch.double().run(impl="reference", **options))
    batch.metadata.plan = None
    return out


def slopes_of(shape: Shape) -> torch.Tensor:  # [num_heads]
    return torch.linspace(0.05, 0.5, shape.num_kv_heads * shape.group)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("requests", [MIXTURE, DECODES], ids=["mixture", "decodes"])
def test_every_dtype(dtype: torch.dtype, batch_invariant: bool, requests: list[Request]):
    check(make_batch(requests, Shape(2, 3, 64, 16, dtype), batch_invariant=batch_invariant))


@pytest.mark.parametrize("group", [1, 3, 5, 7])
@pytest.mark.parametrize("head_size", [64, 80, 128, 256])
def test_every_group_and_head_size(group: int, head_size: int):
    check(make_batch(MIXTURE, Shape(1, group, head_size, 16)))


@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_every_block_size(block_size: int):
    check(make_batch([*MIXTURE, Request(block_size), Request(block_size + 1, 2)], Shape(2, 1, 64, block_size)))


@pytest.mark.parametrize(
    "options",
    [
        {"sliding_window": 1},
        {"sliding_window": 7},
        {"sliding_window": 64},
        {"sliding_window": 99},
        {"sliding_window": 10_000},
        {"soft_cap": 2.0},
        {"soft_cap": 2.0, "sliding_window": 7},
        {"alibi": True},
        {"alibi": True, "soft_cap": 2.0, "sliding_window": 20},
        {"scale": 1.0},
    ],
    ids=str,
)
def test_every_option(options: dict[str, Any]):
    shape = Shape(2, 3, 64, 16)
    options = {name: value for name, value in options.items() if name != "alibi"} | (
        {"alibi_slopes": slopes_of(shape)} if "alibi" in options else {}
    )
    check(make_batch(MIXTURE, shape), **options)


def test_a_windows_edge_in_a_tile_that_ends_before_every_row():
    """Keys 192 to 200 of the tile from 192 on are behind the window, and no row stands in it."""
    check(make_batch([Request(300, seed=1), Request(280, 20, seed=2)], Shape(1, 3, 64, 16)), sliding_window=100)


# ------------------------------------------------------------------ splits
def split_run(batch: Batch, split_len: int, **options: Any) -> torch.Tensor:  # [num_tokens, num_heads, head_size]
    """The kernel with contexts cut every split_len keys, a multiple of its tile."""
    num_tokens, num_heads, head_size = batch.query.shape
    num_kv_heads = batch.k_cache.shape[0]
    longest = max(batch.metadata.seq_lens)
    launch = choose_launch(
        num_tokens, batch.metadata.num_reqs, longest, num_kv_heads, num_heads // num_kv_heads, head_size,
        multiprocessors=1,
    )  # fmt: skip
    launch = replace(launch, split_len=split_len, num_splits=-(-longest // split_len))
    batch.metadata.plan = None
    options = {"sliding_window": None, "soft_cap": None, "alibi_slopes": None, **options}
    with poisoned_memory():
        out = kernel.paged_attention(*batch[1:], scale=head_size**-0.5, launch=launch, **options)
    batch.metadata.plan = None
    return out


@pytest.mark.parametrize("split_len", [64, 128, 256, 320])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 70}, {"soft_cap": 2.0}], ids=str)
def test_splits_of_any_length_merge_into_the_whole(split_len: int, options: dict[str, Any]):
    """Short requests leave most splits empty; a window leaves the first ones empty."""
    batch = make_batch(DECODES, Shape(2, 3, 64, 16))
    out = split_run(batch, split_len, **options)
    assert_right(out, batch.run(impl="reference", **options), batch.double().run(impl="reference", **options))


def test_prefills_can_be_split_too():
    batch = make_batch(MIXTURE, Shape(1, 3, 64, 16))
    out = split_run(batch, 64)
    assert_right(out, batch.run(impl="reference"), batch.double().run(impl="reference"))


# ------------------------------------------------------------------ invariance
def test_batch_invariant_rows_keep_their_bits_in_any_company_and_chunk():
    shape = Shape(1, 3, 64, 16)
    alone = make_batch([Request(100, 100, seed=3)], shape, batch_invariant=True).run(impl="triton")
    for requests, index in [
        ([Request(100, 5, seed=3)], 0),
        ([Request(30, 30, seed=9), Request(100, 37, seed=3), Request(64, seed=8)], 1),
        ([Request(7, seed=1), Request(100, seed=3)], 1),
    ]:
        batch = make_batch(requests, shape, batch_invariant=True, seed=5)
        rows = batch.rows_of(batch.run(impl="triton"))[index]
        assert torch.equal(as_bits(rows), as_bits(alone[-rows.shape[0] :]))


# ------------------------------------------------------------------ any batch
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_ragged_batch(data: st.DataObject):
    shape = Shape(
        num_kv_heads=data.draw(st.sampled_from([1, 2])),
        group=data.draw(st.sampled_from([1, 2, 3, 7])),
        head_size=data.draw(st.sampled_from([64, 80])),
        block_size=data.draw(st.sampled_from([16, 32])),
    )
    requests = []
    for seed in range(data.draw(st.integers(1, 4))):
        seq_len = data.draw(st.integers(1, 130))
        requests.append(Request(seq_len, data.draw(st.just(1) | st.integers(1, seq_len)), seed=seed))
    window = data.draw(st.none() | st.integers(1, 140))
    check(make_batch(requests, shape, batch_invariant=data.draw(st.booleans())), sliding_window=window)


# ------------------------------------------------------------------ memory
@pytest.mark.parametrize(("num_kv_heads", "log2_of_a_head"), [(1, 31), (3, 30)], ids=["far block", "far head"])
def test_a_cache_beyond_two_to_the_31_values_is_read_at_the_right_place(num_kv_heads: int, log2_of_a_head: int):
    """Blocks at the far end of a head, or the last of three heads: their offsets do not fit into 32 bits. Only the
    touched pages exist."""
    batch = make_batch([Request(20, seed=1)], Shape(num_kv_heads, 1, 256, 16, torch.float16))
    expected = batch.run(impl="triton")
    batch.metadata.plan = None
    num_blocks = 2**log2_of_a_head // (16 * 256) + 64
    table = batch.metadata.block_table
    caches = []
    for cache in batch[2:4]:
        large = torch.empty(num_kv_heads, num_blocks, 16, 256, dtype=torch.float16)
        for column in range(2):
            large[:, num_blocks - 1 - column] = cache[:, table[0, column]]
        caches.append(large)
    assert caches[0].numel() > 2**31
    far = torch.tensor([[num_blocks - 1, num_blocks - 2]], dtype=torch.int32)
    batch.metadata.block_table = far
    moved = batch._replace(k_cache=caches[0], v_cache=caches[1])
    assert torch.equal(moved.run(impl="triton"), expected)
