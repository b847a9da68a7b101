"""The shape dictionary, on the example of the house: A decodes, B continues a prompt, C was half in the cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minivllm.kernels.paged_attention import validate_metadata
from minivllm.outputs import CachedRequestData, NewRequestData
from minivllm.sampling_params import SamplingParams
from minivllm.worker import input_batch
from minivllm.worker.input_batch import InputBatch, RequestState

BLOCK_SIZE = 16
# What the names in the shapes stand for in the example: 1 + 40 + 16 tokens of three requests, two of which draw.
SIZES = {"num_tokens": 57, "num_reqs": 3, "num_logits": 2, "max_blocks_per_req": 11}


def make_state(
    request_id: str, num_tokens: int, num_prompt_tokens: int, num_computed: int, blocks: list[int], **fields: Any
) -> RequestState:
    data = NewRequestData(
        request_id=request_id,
        token_ids=[1000 + i for i in range(num_tokens)],
        num_prompt_tokens=num_prompt_tokens,
        block_ids=blocks,
        num_computed_tokens=num_computed,
        **{"sampling_params": SamplingParams(), **fields},
    )
    return RequestState(data, max_model_len=512, block_size=BLOCK_SIZE, vocab_size=4096)


def build_example() -> InputBatch:
    a = make_state("A", 98, 90, 97, [1, 2, 3, 4, 5, 6, 7])
    b = make_state("B", 300, 300, 128, list(range(10, 21)))
    c = make_state("C", 48, 48, 32, [30, 31, 32])
    return InputBatch.build([a, b, c], [1, 40, 16], BLOCK_SIZE)


def dictionary() -> list[list[str]]:
    """The rows of the table in the module's docstring: field, shape, dtype."""
    rows = [line.split("|")[1:4] for line in (input_batch.__doc__ or "").splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows[1:]]


@pytest.mark.parametrize(("name", "shape", "dtype"), dictionary())
def test_every_field_has_the_shape_and_dtype_of_the_dictionary(name: str, shape: str, dtype: str):
    batch = build_example()
    value = getattr(batch, name) if hasattr(batch, name) else getattr(batch.attention, name)
    expected = [sum(SIZES.get(part) or int(part) for part in size.split(" + ")) for size in shape[1:-1].split(", ")]
    if dtype == "int":  # on the host, for the loops that use them there
        assert [len(value)] == expected and {type(number) for number in value} == {int}
    else:
        assert (list(value.shape), value.dtype) == (expected, getattr(torch, dtype))


def test_the_dictionary_is_complete():
    assert [name for name, _, _ in dictionary()] == [
        "input_ids",
        "positions",
        "query_start_loc",
        "seq_lens",
        "slot_mapping",
        "block_table",
        "logits_indices",
    ]


def test_attention_accepts_the_batch():
    validate_metadata(build_example().attention, num_blocks=33)
    with pytest.raises(ValueError, match=r"block ids in \[0, 32\), the cache's blocks, got 0..32"):
        validate_metadata(build_example().attention, num_blocks=32)  # C owns block 32


def test_rows_are_concatenated_and_positions_follow_each_request():
    batch = build_example()
    assert batch.attention.query_start_loc == [0, 1, 41, 57]
    assert batch.attention.seq_lens == [98, 168, 48]
    assert batch.positions.tolist() == [97, *range(128, 168), *range(32, 48)]
    assert batch.input_ids.tolist() == [1097, *range(1128, 1168), *range(1032, 1048)]


def test_only_requests_whose_tokens_are_all_computed_draw():
    batch = build_example()
    assert batch.logits_indices.tolist() == [0, 56]  # B is in the middle of its prompt
    assert [state.request_id for state in batch.sampling_states] == ["A", "C"]


def test_slots_point_into_the_blocks_of_their_request():
    batch = build_example()
    slots = batch.attention.slot_mapping.tolist()
    assert slots[0] == 7 * BLOCK_SIZE + 97 % BLOCK_SIZE
    assert slots[1:41] == [(10 + p // BLOCK_SIZE) * BLOCK_SIZE + p % BLOCK_SIZE for p in range(128, 168)]
    assert slots[41:] == [32 * BLOCK_SIZE + offset for offset in range(16)]


def test_block_table_is_padded_with_the_null_block():
    table = build_example().attention.block_table
    assert table.dtype == torch.int32 and table.shape == (3, 11)
    assert table[0].tolist() == [1, 2, 3, 4, 5, 6, 7, 0, 0, 0, 0]
    assert table[2].tolist() == [30, 31, 32] + [0] * 8


def test_a_state_follows_the_scheduler_step_by_step():
    state = make_state("A", 17, 17, 0, [4])
    state.update(CachedRequestData("A", [9], 16))
    state.append_token(77)
    batch = InputBatch.build([state], [2], BLOCK_SIZE)
    assert batch.input_ids.tolist() == [1016, 77]
    assert batch.attention.slot_mapping.tolist() == [9 * BLOCK_SIZE, 9 * BLOCK_SIZE + 1]
    assert state.row is not None and state.row.num_output_tokens == 1


def test_nobody_draws_while_every_prompt_is_cut():
    batch = InputBatch.build([make_state("B", 300, 300, 128, list(range(10, 21)))], [40], BLOCK_SIZE)
    assert batch.sampling_states == []
    assert (list(batch.logits_indices.shape), batch.logits_indices.dtype) == ([0], torch.int64)


def test_a_pooling_request_draws_nothing():
    pooling = make_state("P", 17, 17, 0, [1, 2], sampling_params=None)
    batch = InputBatch.build([pooling, make_state("A", 5, 5, 0, [3])], [17, 5], BLOCK_SIZE)
    assert [state.request_id for state in batch.sampling_states] == ["A"]
    assert batch.logits_indices.tolist() == [21]
    assert pooling.row is None and pooling.num_prompt_logprobs is None
    assert len(pooling.token_ids) == 17  # it never grows


def test_no_token_is_written_into_the_null_block():
    assert build_example().attention.slot_mapping.min() >= BLOCK_SIZE


def test_a_batch_does_not_change_when_its_requests_go_on():
    state = make_state("A", 17, 17, 0, [4, 9])
    batch = InputBatch.build([state], [17], BLOCK_SIZE)
    before = batch.input_ids.tolist(), batch.attention.block_table.tolist()
    state.token_ids[:] = 0
    state.block_ids[:] = 0
    assert (batch.input_ids.tolist(), batch.attention.block_table.tolist()) == before


def test_a_resumed_request_brings_its_output_along():
    """20 prompt tokens and 3 drawn ones; 16 were found in the cache again."""
    state = make_state("A", 23, 20, 16, [1, 2])
    batch = InputBatch.build([state], [7], BLOCK_SIZE)
    assert batch.positions.tolist() == list(range(16, 23))
    assert batch.logits_indices.tolist() == [6]  # all its tokens are computed now: it draws its fourth
    assert state.row is not None and state.row.num_output_tokens == 3


def test_drafts_follow_the_newest_token_and_each_has_a_row_of_logits():
    a, b = make_state("A", 17, 17, 16, [4, 9]), make_state("B", 5, 5, 4, [3])
    a.update(CachedRequestData("A", [], 16), [8, 9])
    b.update(CachedRequestData("B", [], 4))
    batch = InputBatch.build([a, b], [3, 1], BLOCK_SIZE)
    assert batch.input_ids.tolist() == [1016, 8, 9, 1004] and batch.positions.tolist() == [16, 17, 18, 4]
    assert batch.logits_indices.tolist() == [0, 1, 2, 3] and batch.sampling_states == [a, b]
    assert batch.attention.seq_lens == [19, 5]
    assert a.num_tokens == 17 and a.row is not None and a.row.num_output_tokens == 0  # none of them is a token


def test_drafts_are_gone_with_the_next_step_and_a_token_takes_their_place():
    state = make_state("A", 17, 17, 16, [4, 9])
    state.update(CachedRequestData("A", [], 16), [8, 9])
    state.append_token(7)
    state.update(CachedRequestData("A", [], 17))
    batch = InputBatch.build([state], [1], BLOCK_SIZE)
    assert batch.input_ids.tolist() == [7] and batch.logits_indices.tolist() == [0] and state.draft_token_ids == []


def test_a_batch_may_begin_elsewhere_than_its_states():
    """A draft model's second forward: the first draft alone."""
    state = make_state("A", 17, 17, 16, [4, 9])
    state.update(CachedRequestData("A", [], 16), [8, 9])
    batch = InputBatch.build([state], [1], BLOCK_SIZE, num_computed_tokens=[17])
    assert batch.input_ids.tolist() == [8] and batch.positions.tolist() == [17]
    assert batch.attention.slot_mapping.tolist() == [9 * BLOCK_SIZE + 1] and batch.attention.seq_lens == [18]


def test_a_state_has_room_for_the_whole_context():
    state = make_state("A", 511, 511, 511, list(range(1, 33)))
    state.append_token(5)
    assert state.num_tokens == 512 and state.token_ids[511] == 5
    assert state.num_blocks == len(state.block_ids) == 32


def test_the_engines_modes_reach_attention():
    states = [make_state("A", 5, 5, 0, [1])]
    plain = InputBatch.build(states, [5], BLOCK_SIZE).attention
    assert (plain.causal, plain.batch_invariant, plain.block_size, plain.plan) == (True, False, 16, None)
    other = InputBatch.build(states, [5], BLOCK_SIZE, causal=False, batch_invariant=True).attention
    assert (other.causal, other.batch_invariant) == (False, True)
