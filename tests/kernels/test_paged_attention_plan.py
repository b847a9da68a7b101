"""Which operation a request gets on a CPU (cpu_plan.py), and that each of these ways is right.

Every case computes and checks the numbers, then looks at the plan that was really used. Blocks of 16, two KV heads of
64 values, float32 unless said: a run is worth a call of its own from 256 keys on (bfloat16: 2048), and a gathered
batch holds at most 1536 keys.
"""

from typing import Any, NamedTuple

import pytest
import torch

from minivllm.kernels.paged_attention.cpu_plan import (
    PADDING_SHARE,
    PADDING_TOKENS,
    SHORT_QUERY_TOKENS,
    TILE_TOKENS,
    Keys,
    LayerPlan,
    LayerShape,
)
from tests.kernels.helpers import SHAPE, Request, Shape, check, make_batch

SLICE_TOKENS = LayerShape(2, 1, 64, torch.float32, None, False).slice_tokens
GATHER_TOKENS = LayerShape(2, 1, 64, torch.float32, None, False).gather_tokens
BFLOAT16 = SHAPE._replace(dtype=torch.bfloat16)


class Part(NamedTuple):
    """What a short-query part looks like from outside."""

    how: str  # slice or gather
    num_reqs: int
    num_rows: int
    num_keys: int  # per request
    masked: bool = False


def how(keys: Keys) -> str:
    """Exactly one of the two ways to read keys."""
    assert (keys.start_slot is None) != (keys.slots is None)
    return "gather" if keys.start_slot is None else "slice"


def plan_of(requests: list[Request], shape: Shape = SHAPE, **options: Any) -> LayerPlan:
    """The plan with which these requests were computed, right."""
    batch = make_batch(requests, shape)
    check(batch, **options)
    return batch.plan


def parts_of(plan: LayerPlan, field: str = "parts") -> list[Part]:
    """The short-query parts, or the runs, of a plan."""
    return [
        Part(how(part.keys), part.num_reqs, part.num_rows, part.keys.num_keys // part.num_reqs, part.mask is not None)
        for part in getattr(plan, field)
    ]


def shape_of(plan: LayerPlan) -> tuple[int, int, int, int]:
    """How many parts, runs, prefills and tiles."""
    return len(plan.parts), len(plan.runs), len(plan.prefills), len(plan.tiles)


# ------------------------------------------------------------------ slice
def test_the_measured_constants_are_those_that_these_cases_assume():
    assert (SLICE_TOKENS, GATHER_TOKENS) == (256, 4096)
    assert (SHORT_QUERY_TOKENS, TILE_TOKENS, PADDING_TOKENS, PADDING_SHARE) == (16, 128, 64, 0.25)
    assert LayerShape(2, 1, 64, torch.bfloat16, None, False).slice_tokens == 512


@pytest.mark.parametrize("seq_len", [1, 7, 15, 16, 17, 33, 63])
def test_a_lone_request_in_consecutive_blocks_is_read_in_place(seq_len: int):
    plan = plan_of([Request(seq_len, runs=(-(-seq_len // 16),))])
    assert parts_of(plan) == [Part("slice", 1, 1, seq_len)]
    assert plan.short_rows is None  # every row in order: nothing is moved


def test_in_a_batch_only_long_contexts_are_worth_a_slice():
    """255 keys are copied to stand beside each other, 256 are not."""
    requests = [Request(seq_len, runs=(-(-seq_len // 16),), seed=seq_len) for seq_len in (256, 254, 300, 255)]
    plan = plan_of(requests)
    assert parts_of(plan) == [
        Part("slice", 1, 1, 256),
        Part("slice", 1, 1, 300),
        Part("gather", 2, 1, 255, masked=True),
    ]
    assert plan.short_rows.tolist() == [0, 2, 1, 3]


def test_bfloat16_slices_later():
    plan = plan_of([Request(300, runs=(19,), seed=1), Request(300, runs=(19,), seed=2)], BFLOAT16)
    assert parts_of(plan) == [Part("gather", 2, 1, 300)]
    long = BFLOAT16._replace(num_kv_heads=1, block_size=32)
    plan = plan_of([Request(512, runs=(16,), seed=1), Request(7, seed=2)], long)
    assert parts_of(plan) == [Part("slice", 1, 1, 512), Part("slice", 1, 1, 7)]  # 7 keys of one block


# ------------------------------------------------------------------ gather
def test_a_lone_scattered_request_is_gathered():
    plan = plan_of([Request(33)])
    assert parts_of(plan) == [Part("gather", 1, 1, 33)]


def test_equal_contexts_share_a_batch_without_a_mask():
    plan = plan_of([Request(33, seed=seed) for seed in range(5)])
    assert parts_of(plan) == [Part("gather", 5, 1, 33)]


def test_shorter_contexts_are_padded_with_their_own_first_key_and_masked():
    """Padding must not touch an unused slot: it is NaN, and NaN times a weight of zero is NaN."""
    requests = [Request(97, seed=1), Request(33, seed=2)]
    batch = make_batch(requests)
    check(batch)
    (part,) = batch.plan.parts
    assert parts_of(batch.plan) == [Part("gather", 2, 1, 97, masked=True)]
    slots = part.keys.slots.view(2, 97)
    first_slot = int(batch.metadata.block_table[1, 0]) * 16
    assert slots[1, 33:].tolist() == [first_slot] * 64
    assert part.mask.shape == (2, 1, 1, 97)


def test_contexts_whose_lengths_differ_too_much_do_not_share_a_batch():
    """Padding costs at most 64 keys, or a quarter of the longest context."""
    assert parts_of(plan_of([Request(97, seed=1), Request(33, seed=2)])) == [Part("gather", 2, 1, 97, masked=True)]
    assert parts_of(plan_of([Request(98, seed=1), Request(33, seed=2)])) == [
        Part("gather", 1, 1, 98),
        Part("gather", 1, 1, 33),
    ]
    assert parts_of(plan_of([Request(800, seed=1), Request(600, seed=2)])) == [Part("gather", 2, 1, 800, masked=True)]
    assert parts_of(plan_of([Request(800, seed=1), Request(599, seed=2)])) == [
        Part("gather", 1, 1, 800),
        Part("gather", 1, 1, 599),
    ]


def test_a_batch_ends_where_its_copy_would_leave_the_processor_cache():
    plan = plan_of([Request(300, seed=seed) for seed in range(15)])
    assert parts_of(plan) == [Part("gather", 13, 1, 300), Part("gather", 2, 1, 300)]  # 13 * 300 <= 4096 < 14 * 300


def test_rows_that_a_plan_sorts_come_back_to_their_places():
    """Batches go from long to short, rows from first to last."""
    plan = plan_of([Request(7, seed=1), Request(300, seed=2), Request(150, seed=3)])
    assert [part.num_keys for part in parts_of(plan)] == [300, 150, 7]
    assert plan.short_rows.tolist() == [1, 2, 0]


# ------------------------------------------------------------------ run and rest
@pytest.mark.parametrize(
    ("seq_len", "runs", "run", "rest"),
    [
        (272, (1, 16), 256, Part("slice", 1, 1, 16)),  # one block apart is consecutive in itself
        (265, (16, 1), 256, Part("slice", 1, 1, 9)),
        (313, (1, 1, 17, 1), 272, Part("gather", 1, 1, 41)),
        (505, (1, 16, 15), 256, Part("gather", 1, 1, 249)),
    ],
    ids=["behind one block", "in front", "in the middle", "the longer of two"],
)
def test_a_long_run_in_a_scattered_context_is_sliced_and_merged_with_the_rest(
    seq_len: int, runs: tuple[int, ...], run: int, rest: Part
):
    plan = plan_of([Request(seq_len, runs=runs)])
    assert parts_of(plan, "runs") == [Part("slice", 1, 1, run)]
    assert parts_of(plan) == [rest]


def test_a_run_below_the_threshold_is_gathered_with_the_rest():
    plan = plan_of([Request(16 * 17, runs=(1, 15, 1))])
    assert parts_of(plan) == [Part("gather", 1, 1, 272)]
    assert plan.runs == []


def test_several_split_requests_share_the_gathered_rest_and_keep_their_own_runs():
    requests = [
        Request(7, seed=1),  # neither: it follows the split ones
        Request(16 * 18, runs=(1, 16, 1), seed=2),
        Request(16 * 20, runs=(1, 18, 1), seed=3),
        Request(256, runs=(16,), seed=4),  # a plain slice
    ]
    plan = plan_of(requests)
    assert parts_of(plan, "runs") == [Part("slice", 1, 1, 256), Part("slice", 1, 1, 288)]
    assert parts_of(plan) == [Part("gather", 2, 1, 32), Part("slice", 1, 1, 256), Part("slice", 1, 1, 7)]
    assert plan.short_rows.tolist() == [1, 2, 3, 0]


def test_a_run_under_a_window_counts_only_the_keys_inside():
    """Context 640, window 300: positions 340-639 are visible, of which 340-351 lie apart from the run behind them."""
    request = Request(640, runs=(22, 18))
    plan = plan_of([request], sliding_window=300)
    assert parts_of(plan, "runs") == [Part("slice", 1, 1, 288)]
    assert parts_of(plan) == [Part("slice", 1, 1, 12)]
    plan = plan_of([request], sliding_window=200)  # 440-639: all of them in the second run
    assert parts_of(plan) == [Part("slice", 1, 1, 200)]


def test_bfloat16_merges_runs_too():
    shape = BFLOAT16._replace(num_kv_heads=1, group=3, block_size=32)
    plan = plan_of([Request(2048 + 64, runs=(1, 64, 1)), Request(33, seed=1)], shape)
    assert parts_of(plan, "runs") == [Part("slice", 1, 1, 2048)]
    assert parts_of(plan) == [Part("gather", 1, 1, 64), Part("gather", 1, 1, 33)]


# ------------------------------------------------------------------ a few rows behind earlier context
@pytest.mark.parametrize("num_rows", [2, 3, 15, 16])
@pytest.mark.parametrize("shape", [SHAPE, SHAPE._replace(group=3), BFLOAT16._replace(group=5)], ids=str)
def test_a_few_rows_behind_context_are_one_short_query(num_rows: int, shape: Shape):
    plan = plan_of([Request(33, num_rows)], shape)
    assert parts_of(plan) == [Part("gather", 1, num_rows, 33, masked=True)]
    assert plan.parts[0].mask.shape == (1, 1, num_rows * shape.group, 33)


def test_requests_with_equally_many_rows_share_a_batch():
    """Draft verification of three requests, and one that has fewer drafts."""
    requests = [Request(40, 4, seed=1), Request(33, 4, seed=2), Request(33, 2, seed=3), Request(63, 4, seed=4)]
    plan = plan_of(requests, SHAPE._replace(group=3))
    assert parts_of(plan) == [Part("gather", 3, 4, 63, masked=True), Part("gather", 1, 2, 33, masked=True)]
    assert plan.part_rows == [12, 2]
    assert plan.short_rows.tolist() == [*range(8), *range(10, 14), 8, 9]


def test_a_long_context_of_several_rows_is_sliced_but_never_split():
    plan = plan_of([Request(256, 4, runs=(16,), seed=1), Request(16 * 18, 4, runs=(1, 16, 1), seed=2)])
    assert parts_of(plan) == [Part("slice", 1, 4, 256, masked=True), Part("gather", 1, 4, 288, masked=True)]
    assert plan.runs == []


def test_several_rows_under_a_window_hide_from_each_row_what_the_row_before_may_still_see():
    plan = plan_of([Request(33, 4, seed=1), Request(63, 4, seed=2)], sliding_window=8)
    assert parts_of(plan) == [Part("gather", 2, 4, 11, masked=True)]  # 8 keys of the first row, and 3 rows more


# ------------------------------------------------------------------ many rows
@pytest.mark.parametrize(
    ("request_", "own_only"),
    [
        (Request(2, 2), True),  # the first tokens of a prompt have no context to follow
        (Request(16, 16), True),
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
    assert shape_of(plan) == (0, 0, 1, 0)
    (prefill,) = plan.prefills
    assert (prefill.num_rows, prefill.keys.num_keys) == (request_.num_rows, request_.seq_len)
    assert own_only == (prefill.num_rows == prefill.keys.num_keys)
    consecutive = request_.runs is not None and len(request_.runs) == 1 or request_.seq_len <= 16
    assert how(prefill.keys) == ("slice" if consecutive else "gather")


def test_a_prompt_of_one_token_is_a_short_query():
    plan = plan_of([Request(1, 1, seed=1), Request(1, 1, seed=2)])
    assert parts_of(plan) == [Part("gather", 2, 1, 1)]


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
    assert parts_of(plan) == [Part("gather", 1, 4, 40, masked=True), Part("gather", 2, 1, 35, masked=True)]
    assert plan.short_rows.tolist() == [84, 85, 86, 87, 63, 88]


# ------------------------------------------------------------------ tiles
def test_a_prompt_longer_than_its_window_is_cut_into_tiles_that_see_little():
    plan = plan_of([Request(300, 300)], sliding_window=20)
    assert shape_of(plan) == (0, 0, 0, 3)
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
    assert shape_of(plan_of([Request(63, 63)], sliding_window=window)) == (0, 0, 1, 0)
    assert shape_of(plan_of([Request(63, 20)], sliding_window=window)) == (0, 0, 1, 0)


def test_a_window_one_key_shorter_than_the_context_makes_a_tile():
    assert shape_of(plan_of([Request(63, 63)], sliding_window=62)) == (0, 0, 0, 1)


@pytest.mark.parametrize(
    "options", [{"soft_cap": 5.0}, {"alibi_slopes": torch.tensor([0.5, 0.25])}], ids=["cap", "alibi"]
)
def test_soft_cap_and_alibi_make_tiles_of_everything(options: dict[str, Any]):
    requests = [Request(33, 1, seed=1), Request(40, 4, runs=(3,), seed=2), Request(150, 140, seed=3)]
    plan = plan_of(requests, **options)
    assert shape_of(plan) == (0, 0, 0, 4)
    assert [(t.first_row, t.num_rows, t.offset) for t in plan.tiles] == [
        (0, 1, 32),
        (1, 4, 36),
        (5, 128, 10),
        (133, 12, 138),
    ]
    assert [how(t.keys) for t in plan.tiles] == ["gather", "slice", "gather", "gather"]


def test_short_queries_under_a_window_need_no_tile():
    plan = plan_of([Request(63, 1, seed=1), Request(63, 3, seed=2)], sliding_window=20)
    assert shape_of(plan) == (2, 0, 0, 0)
