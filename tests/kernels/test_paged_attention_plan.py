"""Which way a request goes on a CPU (cpu_plan.py), and that each of these ways is right.

Every case computes and checks the numbers, then looks at the plan that was really used. Blocks of 16, two KV heads of
64 values, float32 unless said.
"""

from typing import Any

import pytest
import torch

from minivllm.kernels.paged_attention.cpu_plan import (
    KEYS_PER_ITEM,
    ROWS_PER_ITEM,
    SHORT_QUERY_TOKENS,
    TILE_TOKENS,
    Keys,
    LayerPlan,
)
from tests.kernels.helpers import SHAPE, Request, Shape, check, make_batch

BFLOAT16 = SHAPE._replace(dtype=torch.bfloat16)


def plan_of(requests: list[Request], shape: Shape = SHAPE, **options: Any) -> LayerPlan:
    """The plan with which these requests were computed, right."""
    batch = make_batch(requests, shape)
    check(batch, **options)
    return batch.plan


def items_of(plan: LayerPlan) -> list[tuple[int, int, int, int, int]]:
    """Request, first row, rows, first key and end of each item."""
    return [(request, row, rows, key, end) for request, row, rows, _, key, end, *_ in plan.rows.items.tolist()]


def how(keys: Keys) -> str:
    """Exactly one of the two ways to read the keys of many rows."""
    assert (keys.start_slot is None) != (keys.slots is None)
    return "gather" if keys.start_slot is None else "slice"


def shape_of(plan: LayerPlan) -> tuple[int, int, int]:
    """How many items of rows, prefills and tiles."""
    return len(items_of(plan)), len(plan.prefills), len(plan.tiles)


def test_the_constants_are_those_that_these_cases_assume():
    assert (SHORT_QUERY_TOKENS, TILE_TOKENS, ROWS_PER_ITEM, KEYS_PER_ITEM) == (16, 128, 16, 256)


# ------------------------------------------------------------------ few rows
@pytest.mark.parametrize("runs", [None, "one"], ids=["scattered", "consecutive"])
@pytest.mark.parametrize("seq_len", [1, 7, 15, 16, 17, 33, 63, 255, 256])
def test_a_decode_within_one_item_is_merged_with_nothing(seq_len: int, runs: str | None):
    plan = plan_of([Request(seq_len, runs=(-(-seq_len // 16),) if runs else None)])
    assert items_of(plan) == [(0, 0, 1, 0, seq_len)]
    assert not plan.rows.has_shared_rows


@pytest.mark.parametrize("shape", [SHAPE, BFLOAT16._replace(num_kv_heads=1, block_size=32)], ids=str)
def test_a_long_context_is_the_work_of_several_items(shape: Shape):
    plan = plan_of([Request(257, seed=1), Request(7, seed=2), Request(700, seed=3)], shape)
    assert items_of(plan) == [
        (0, 0, 1, 0, 256),
        (0, 0, 1, 256, 257),
        (1, 1, 1, 0, 7),
        (2, 2, 1, 0, 256),
        (2, 2, 1, 256, 512),
        (2, 2, 1, 512, 700),
    ]
    assert plan.rows.has_shared_rows
    assert plan.rows.chunks.tolist() == [0, 2, 3, 6]


@pytest.mark.parametrize("num_rows", [2, 3, 15, 16])
@pytest.mark.parametrize("shape", [SHAPE, SHAPE._replace(group=3), BFLOAT16._replace(group=5)], ids=str)
def test_a_few_rows_share_an_item(num_rows: int, shape: Shape):
    assert items_of(plan_of([Request(33, num_rows)], shape)) == [(0, 0, num_rows, 0, 33)]
    assert items_of(plan_of([Request(num_rows, num_rows)], shape)) == [(0, 0, num_rows, 0, num_rows)]


def test_rows_that_straddle_an_edge_of_items_are_merged():
    """Row 250 sees nothing of the second item, row 257 two of its keys."""
    plan = plan_of([Request(258, 8)], SHAPE._replace(group=3))
    assert items_of(plan) == [(0, 0, 8, 0, 256), (0, 0, 8, 256, 258)]


def test_requests_with_different_numbers_of_rows_stand_beside_each_other():
    requests = [Request(40, 4, seed=1), Request(33, 1, seed=2), Request(300, 2, seed=3), Request(63, 4, seed=4)]
    plan = plan_of(requests, SHAPE._replace(group=3))
    assert [rows for _, _, rows, *_ in items_of(plan)] == [4, 1, 2, 2, 4]


@pytest.mark.parametrize("block_size", [1, 5, 16, 48, 128])
def test_a_block_may_have_any_size(block_size: int):
    plan_of([Request(300, 3, seed=1), Request(31, seed=2)], SHAPE._replace(block_size=block_size))


def test_a_window_leaves_out_the_items_that_no_row_sees():
    plan = plan_of([Request(640, seed=1), Request(640, 4, seed=2)], sliding_window=200)
    assert items_of(plan) == [(0, 0, 1, 256, 512), (0, 0, 1, 512, 640), (1, 1, 4, 256, 512), (1, 1, 4, 512, 640)]


@pytest.mark.parametrize("window", [1, 8, 20, 63, 300])
def test_several_rows_under_a_window_hide_from_each_row_what_the_row_before_may_still_see(window: int):
    plan_of([Request(33, 4, seed=1), Request(300, 4, seed=2), Request(270, 16, seed=3)], sliding_window=window)


# ------------------------------------------------------------------ many rows
@pytest.mark.parametrize(
    ("request_", "own_only"),
    [
        (Request(17, 17), True),
        (Request(63, 63), True),
        (Request(63, 63, runs=(4,)), True),
        (Request(33, 17), False),
        (Request(63, 40, runs=(4,)), False),
        (Request(63, 40, runs=(1, 3)), False),
    ],
    ids=str,
)
def test_more_rows_are_a_prefill_of_one_request(request_: Request, own_only: bool):
    plan = plan_of([request_])
    assert shape_of(plan) == (0, 1, 0)
    (prefill,) = plan.prefills
    assert (prefill.num_rows, prefill.keys.num_keys) == (request_.num_rows, request_.seq_len)
    assert own_only == (prefill.num_rows == prefill.keys.num_keys)
    assert how(prefill.keys) == ("slice" if request_.runs is not None and len(request_.runs) == 1 else "gather")


def test_every_kind_of_row_finds_its_way_in_one_step():
    requests = [
        Request(63, 63, seed=1),  # prefill: rows 0-62
        Request(33, 1, seed=2),  # decode: row 63
        Request(100, 20, seed=3),  # chunk: rows 64-83
        Request(40, 4, seed=4),  # verification: rows 84-87
        Request(35, 1, seed=5),  # decode: row 88
    ]
    plan = plan_of(requests, SHAPE._replace(group=3))
    assert [(p.first_row, p.num_rows) for p in plan.prefills] == [(0, 63), (64, 20)]
    assert items_of(plan) == [(1, 63, 1, 0, 33), (3, 84, 4, 0, 40), (4, 88, 1, 0, 35)]


def test_a_batch_invariant_step_is_all_rows():
    batch = make_batch([Request(63, 40, seed=1), Request(33, 1, seed=2)], batch_invariant=True)
    check(batch)
    assert shape_of(batch.plan) == (4, 0, 0)
    assert [rows for _, _, rows, *_ in items_of(batch.plan)] == [16, 16, 8, 1]


# ------------------------------------------------------------------ tiles
def test_a_prompt_longer_than_its_window_is_cut_into_tiles_that_see_little():
    plan = plan_of([Request(300, 300)], sliding_window=20)
    assert shape_of(plan) == (0, 0, 3)
    assert [(t.first_row, t.num_rows, t.keys.num_keys) for t in plan.tiles] == [
        (0, 128, 128),
        (128, 128, 147),
        (256, 44, 63),
    ]


def test_tiles_inside_a_long_prompt_share_one_mask():
    plan = plan_of([Request(513, 513)], SHAPE._replace(num_kv_heads=1), sliding_window=20)
    assert len(plan.tiles) == 5
    assert plan.tiles[1].mask is plan.tiles[2].mask is plan.tiles[3].mask
    assert plan.tiles[0].mask is not plan.tiles[1].mask


@pytest.mark.parametrize("window", [63, 64, 1000])
def test_a_window_that_hides_nothing_leaves_a_prompt_as_it_is(window: int):
    assert shape_of(plan_of([Request(63, 63)], sliding_window=window)) == (0, 1, 0)
    assert shape_of(plan_of([Request(63, 20)], sliding_window=window)) == (0, 1, 0)


def test_a_window_one_key_shorter_than_the_context_makes_a_tile():
    assert shape_of(plan_of([Request(63, 63)], sliding_window=62)) == (0, 0, 1)


@pytest.mark.parametrize(
    "options", [{"soft_cap": 5.0}, {"alibi_slopes": torch.tensor([0.5, 0.25])}], ids=["cap", "alibi"]
)
def test_soft_cap_and_alibi_make_tiles_of_long_queries_only(options: dict[str, Any]):
    requests = [Request(33, 1, seed=1), Request(40, 4, runs=(3,), seed=2), Request(150, 140, seed=3)]
    plan = plan_of(requests, **options)
    assert shape_of(plan) == (2, 0, 2)
    assert [(t.first_row, t.num_rows, t.offset) for t in plan.tiles] == [(5, 128, 10), (133, 12, 138)]
    assert [how(t.keys) for t in plan.tiles] == ["gather", "gather"]


# ------------------------------------------------------------------ heads that two ranks share
def test_a_request_stands_in_the_middle_of_its_work():
    requests = [Request(30, seed=1), Request(20, seed=2), Request(40, 20, seed=3), Request(50, seed=4)]
    batch = make_batch(requests, SHAPE)  # scores: 30, 20, 800, 50
    batch.run(head_shares=((0.0, 1.0), (0.0, 0.5)))
    assert [(first, end) for *_, first, end in batch.plan.rows.items.tolist()] == [(0, 2), (0, 2), (0, 1)]
    assert [prefill.heads for prefill in batch.plan.prefills] == [slice(0, 1)]  # its middle: 450 of 900
