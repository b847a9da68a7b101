"""The shape dictionary, on the example that house rules tell: A decodes, B continues a prompt, C was half in the cache."""

import torch

from minivllm.outputs import CachedRequestData, NewRequestData
from minivllm.sampling_params import SamplingParams
from minivllm.worker.input_batch import InputBatch, RequestState

BLOCK_SIZE = 16


def make_state(request_id: str, num_tokens: int, num_prompt_tokens: int, num_computed: int, blocks: list[int]):
    data = NewRequestData(
        request_id=request_id,
        token_ids=[1000 + i for i in range(num_tokens)],
        num_prompt_tokens=num_prompt_tokens,
        block_ids=blocks,
        num_computed_tokens=num_computed,
        sampling_params=SamplingParams(),
    )
    return RequestState(data, max_model_len=512, block_size=BLOCK_SIZE, vocab_size=4096)


def build_example() -> InputBatch:
    a = make_state("A", 98, 90, 97, [1, 2, 3, 4, 5, 6, 7])
    b = make_state("B", 300, 300, 128, list(range(10, 21)))
    c = make_state("C", 48, 48, 32, [30, 31, 32])
    return InputBatch.build([a, b, c], [1, 40, 16], BLOCK_SIZE)


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
