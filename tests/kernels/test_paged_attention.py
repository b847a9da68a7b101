"""paged_attention on a CPU obeys the rule for every mixture of requests, over a cache that is NaN wherever no
request may look."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.kernels.paged_attention import AttentionMetadata
from minivllm.kernels.paged_attention.metadata import heads_of_requests
from tests.kernels.helpers import (
    DTYPES,
    Batch,
    Request,
    Shape,
    as_bits,
    assert_kernel_is_right,
    check,
    make_batch,
    num_blocks_of,
)

BLOCK_SIZES = (8, 16, 32)


def mixture(block_size: int) -> list[Request]:
    """Decode, verification, chunk and prefill rows side by side; odd sizes around the block's edges."""
    odd = (1, 7, 63, block_size - 1, block_size + 1, 2 * block_size + 1)
    decode = [Request(seq_len, 1, seed=seq_len) for seq_len in odd]
    verification = [Request(seq_len, 4, seed=seq_len) for seq_len in odd if seq_len > 4]
    chunk = [Request(seq_len, 20, seed=seq_len) for seq_len in odd if seq_len > 20]
    prefill = [Request(seq_len, seq_len, seed=seq_len) for seq_len in odd]
    by_kind = (decode, verification, chunk, prefill)
    return [requests[i] for i in range(len(odd)) for requests in by_kind if i < len(requests)]


def slopes_of(shape: Shape) -> torch.Tensor:  # [num_heads]
    """ALiBi's usual slopes: half as steep from head to head."""
    return 2.0 ** -torch.arange(1, shape.num_kv_heads * shape.group + 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("head_size", [64, 80, 128])
@pytest.mark.parametrize("group", [1, 3, 5, 7])
def test_every_shape_of_head_and_block_is_right(dtype: torch.dtype, block_size: int, head_size: int, group: int):
    shape = Shape(2, group, head_size, block_size, dtype)
    check(make_batch(mixture(block_size), shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"sliding_window": 1},
        {"sliding_window": 16},
        {"sliding_window": 33},  # the longest contexts but one
        {"sliding_window": 63},  # the longest context
        {"sliding_window": 64},
        {"sliding_window": 10_000},
        {"soft_cap": 2.0},
        {"soft_cap": 2.0, "sliding_window": 7},
        {"alibi": True},
        {"alibi": True, "sliding_window": 7},
        {"alibi": True, "soft_cap": 2.0, "sliding_window": 20},
        {"scale": 1.0},
    ],
    ids=str,
)
def test_every_option_is_right(dtype: torch.dtype, batch_invariant: bool, options: dict[str, Any]):
    shape = Shape(2, 3, 64, 16, dtype)
    options = dict(options)
    if options.pop("alibi", False):
        options["alibi_slopes"] = slopes_of(shape)
    check(make_batch(mixture(16), shape, batch_invariant=batch_invariant), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 1, 17, 100, 127, 128, 129, 140, 240])
def test_the_batch_invariant_path_is_right_over_several_key_tiles(dtype: torch.dtype, window: int | None):
    """Contexts around multiples of the 128 keys and 16 rows that this path works in. A window that ends inside a tile
    of rows, as 140 does, hides keys of an earlier key tile from some of its rows only."""
    shape = Shape(1, 3, 64, 16, dtype)
    requests = [
        Request(seq_len, num_rows, seed=seq_len)
        for seq_len in (127, 128, 129, 257)
        for num_rows in (1, 15, 16, 17, 127, seq_len)
    ]
    check(make_batch(requests, shape, batch_invariant=True), sliding_window=window)


# ------------------------------------------------------------------ any batch
@st.composite
def request_of(draw: st.DrawFn, block_size: int, seed: int) -> Request:
    """Any kind of row, any arrangement of blocks: whole, apart, or a run somewhere between single blocks."""
    edges = [1, 7, 63, block_size - 1, block_size, block_size + 1, 2 * block_size, 2 * block_size + 1]
    seq_len = draw(st.sampled_from(edges) | st.integers(1, 300))
    kind = draw(st.sampled_from(["decode", "verification", "chunk", "prefill"]))
    num_rows = {
        "decode": 1,
        "verification": min(draw(st.integers(2, 16)), seq_len),
        "chunk": min(draw(st.integers(17, 150)), seq_len),
        "prefill": seq_len,
    }[kind]
    num_blocks = num_blocks_of(seq_len, block_size)
    before = draw(st.integers(0, num_blocks))
    run = draw(st.integers(0, num_blocks - before))
    partly = (*[1] * before, run, *[1] * (num_blocks - before - run))
    runs = draw(st.sampled_from([None, (num_blocks,), tuple(length for length in partly if length)]))
    return Request(seq_len, num_rows, runs, seed)


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_ragged_batch_is_right(data: st.DataObject):
    shape = Shape(
        num_kv_heads=data.draw(st.sampled_from([1, 2])),
        group=data.draw(st.sampled_from([1, 3, 5, 7])),
        head_size=data.draw(st.sampled_from([64, 80, 128])),
        block_size=data.draw(st.sampled_from(BLOCK_SIZES)),
        dtype=data.draw(st.sampled_from(DTYPES)),
    )
    requests = [data.draw(request_of(shape.block_size, seed)) for seed in range(data.draw(st.integers(1, 6)))]
    options = {
        "sliding_window": data.draw(st.none() | st.sampled_from([1, shape.block_size, 1000]) | st.integers(2, 320)),
        "soft_cap": data.draw(st.sampled_from([None, None, 5.0])),
        "alibi_slopes": slopes_of(shape) if data.draw(st.sampled_from([False, False, True])) else None,
    }
    batch_invariant = data.draw(st.sampled_from([False, False, True]))
    check(make_batch(requests, shape, batch_invariant=batch_invariant, seed=data.draw(st.integers(0, 99))), **options)


# ------------------------------------------------------------------ what a call leaves alone
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_no_argument_is_changed_and_every_query_layout_gives_the_same(batch_invariant: bool):
    """Models pass the query as a view into one row of query, key and value."""
    batch = make_batch(mixture(16), Shape(2, 3, 64, 16), batch_invariant=batch_invariant)
    before = [tensor.clone() for tensor in batch[1:4]]
    expected = batch.run()
    assert all(torch.equal(as_bits(a), as_bits(b)) for a, b in zip(batch[1:4], before, strict=True))
    fused = torch.cat([batch.query, torch.full_like(batch.query, torch.nan)], dim=1)
    strided = batch._replace(query=fused[:, :6])
    assert not strided.query.is_contiguous()
    assert torch.equal(strided.run(), expected)


def test_layers_share_one_plan_and_do_not_disturb_each_other():
    """A model with alternating windows: two plans, and gather buffers that a later layer overwrites."""
    shape = Shape(2, 3, 64, 16)
    batch = make_batch(mixture(16), shape)
    windows = [None, 9, None, 9]
    layers = [batch._replace(query=batch.query + layer) for layer in range(len(windows))]
    together = [layer.run(sliding_window=window) for layer, window in zip(layers, windows, strict=True)]
    assert len(batch.metadata.plan._derived) == 2
    for layer, window, output in zip(layers, windows, together, strict=True):
        alone = make_batch(mixture(16), shape)._replace(query=layer.query)
        assert torch.equal(alone.run(sliding_window=window), output)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [32, 64, 128])
def test_weights_are_not_rounded_to_the_dtype_of_the_values(dtype: torch.dtype, head_size: int):
    """Two keys of nearly the same weight, values 1 and -1: what is left is the difference of the weights, a thousandth,
    which bfloat16 weights would not show."""
    batch = make_batch([Request(2, seed=1)], Shape(dtype=dtype, head_size=head_size))
    first, second = (int(batch.metadata.block_table[0, 0]) * 16 + position for position in range(2))
    keys, values = batch.k_cache.flatten(1, 2), batch.v_cache.flatten(1, 2)
    batch.query.fill_(0)[..., 0] = 1
    keys[:, [first, second]] = 0
    keys[:, second, 0] = -(2.0**-7)
    values[:, first], values[:, second] = 1, -1
    kernel, reference = batch.run(impl="cpu", scale=0.125), batch.double().run(impl="reference", scale=0.125)
    assert_kernel_is_right(kernel, reference.to(dtype), reference)
    assert (reference > 4e-4).all()


# ------------------------------------------------------------------ heads that two ranks share
SHARES = [((0.0, 1.0), (0.0, 0.5)), ((0.5, 1.0), (0.0, 1.0))]  # three heads of two ranks, as each sees its own two


@given(
    requests=st.lists(st.tuples(st.integers(1, 50), st.integers(0, 300)), min_size=1, max_size=9),
    size=st.integers(2, 6),
    num_kv_heads=st.integers(3, 11),
)
def test_every_head_of_a_request_is_computed_by_one_rank(requests: list[tuple[int, int]], size: int, num_kv_heads: int):
    """The shares as models/parallel.py makes them."""
    starts = [0, *itertools.accumulate(num_rows for num_rows, _ in requests)]
    seq_lens = [num_rows + before for num_rows, before in requests]
    computed = np.zeros((len(requests), num_kv_heads), int)
    for rank in range(size if size <= num_kv_heads else 0):
        start, end = rank * num_kv_heads / size, (rank + 1) * num_kv_heads / size
        own = range(math.floor(start), math.ceil(end))
        shares = tuple((max(start, head) - head, min(end, head + 1) - head) for head in own)
        for request, (first, last) in enumerate(heads_of_requests(starts, seq_lens, len(own), shares)):
            computed[request, own.start + first : own.start + last] += 1
    assert size > num_kv_heads or (computed == 1).all()


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 20}, {"soft_cap": 5.0}, {"alibi": True}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_shares_of_a_head_are_the_whole_and_zero_elsewhere(dtype: torch.dtype, options: dict[str, Any], impl: str):
    shape = Shape(3, 3, 64, 16, dtype)
    requests = [Request(700, seed=1), *mixture(16), Request(300, 300, seed=2), Request(600, 40, seed=3)]
    batch = make_batch(requests, shape)
    options = dict(options)
    if options.pop("alibi", False):
        options["alibi_slopes"] = slopes_of(shape)
    whole = batch.run(impl=impl, **options).unflatten(1, (3, 3))  # [num_tokens, num_kv_heads, group, head_size]
    found = torch.zeros_like(whole)
    for own, shares in zip((slice(0, 2), slice(1, 3)), SHARES, strict=True):
        m = batch.metadata
        part = Batch(
            requests,
            batch.query.unflatten(1, (3, 3))[:, own].flatten(1, 2),
            batch.k_cache[own].clone(),
            batch.v_cache[own].clone(),
            AttentionMetadata(m.query_start_loc, m.seq_lens, m.block_table, m.slot_mapping, m.block_size),
        )
        slopes = options.get("alibi_slopes")
        some = {} if slopes is None else {"alibi_slopes": slopes.view(3, 3)[own].flatten()}
        rows = part.run(impl=impl, head_shares=shares, **{**options, **some}).unflatten(1, (2, 3))
        shared = rows[:, 1 if own.start == 0 else 0].flatten(1)  # of the head in the middle [num_tokens, ...]
        assert (shared == 0).all(1).any() and (shared != 0).any(1).any()
        assert not ((found[:, 1].flatten(1) != 0).any(1) & (shared != 0).any(1)).any()  # nobody's work is done twice
        found[:, own] += rows
    torch.testing.assert_close(found, whole)  # torch's flash kernel sums three heads in another order than two


def test_shares_that_do_not_fit_the_heads_are_refused():
    with pytest.raises(ValueError, match="expected one for each of 2 key/value heads and an implementation for CPUs"):
        make_batch([Request(5)]).run(head_shares=((0.0, 1.0),))
