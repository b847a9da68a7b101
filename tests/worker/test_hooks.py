"""Hooks below LLM: on the GPU path, whose graphs call no module, and the views that read and write a point's rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minivllm.models.hook_points import Columns, HookPoint, ResidualSum, Rows
from minivllm.worker.hooks import HookContext
from tests.worker.graphs import Repeats, Toy, put_on_gpu_path
from tests.worker.test_model_runner import Loop

CHANGES = [(slice(1, 3), torch.tensor([[7.0], [8.0]]))]


def test_a_step_with_a_hooked_request_is_computed_eagerly_and_every_other_one_replays_its_graph():
    capture, seen = Repeats(), list[HookContext]()

    def double(values: torch.Tensor, context: HookContext) -> torch.Tensor:
        seen.append(context)
        return values * 2

    def answers(hooked: bool) -> dict[str, list[int]]:
        loop = Loop(Toy(), max_num_seqs=8)
        put_on_gpu_path(loop.runner, capture)
        hooks = loop.runner.hooks
        hooks.points = {"toy": HookPoint("toy", loop.runner.model, False, Rows())}
        for name, prompt in (("a", [5, 6, 7]), ("b", [9] * 5)):
            if hooked and name == "a":
                hooks.add("toy", double)
                assert hooks.attach("a", "a", 0, 0)
            loop.add(name, prompt, max_tokens=4 if name == "a" else 7)
        return {name: got.token_ids for name, got in loop.run().items()}

    plain = answers(hooked=False)
    assert len(capture.replayed) == 6, "all decodes"
    capture.replayed.clear()
    changed = answers(hooked=True)
    assert len(capture.replayed) == 3, "those of b after a has ended"
    assert changed["b"] == plain["b"] and changed["a"] != plain["a"]
    assert [list(context.positions) for context in seen] == [[0, 1, 2], [3], [4], [5]]


@pytest.mark.parametrize("shape", [(4, 1), (1, 4, 1)])
@pytest.mark.parametrize("in_tuple", [False, True])
def test_rows_are_written_where_they_were_read_and_the_payload_stays(shape: tuple[int, ...], in_tuple: bool):
    tensor = torch.arange(4.0).view(shape)  # shape
    payload: Any = (tensor, "weights") if in_tuple else tensor
    assert Rows().read(payload, 4).flatten().tolist() == [0, 1, 2, 3]
    changed = Rows().write(payload, 4, CHANGES)
    if in_tuple:
        assert changed[1] == "weights"
        changed = changed[0]
    assert changed.shape == shape and changed.flatten().tolist() == [0, 7, 8, 3]
    assert tensor.flatten().tolist() == [0, 1, 2, 3]


def test_a_step_of_one_token_is_told_from_a_sequence():
    assert Rows().read(torch.ones(1, 1, 6), 1).shape == (1, 6)
    assert Rows().read(torch.ones(1, 6), 1).shape == (1, 6)


@pytest.mark.parametrize("payload", [torch.ones(3, 5), torch.ones(1, 2, 4, 5), torch.ones(4), "text", None, ()])
def test_what_has_no_row_per_token_is_refused(payload: Any):
    with pytest.raises(ValueError, match="no row for each of the 4 tokens"):
        Rows().read(payload, 4)


def test_columns_leave_their_neighbours():
    wide = torch.arange(12.0).view(4, 3)  # [num_tokens, all columns]
    assert Columns(1, 2).read(wide, 4).tolist() == [[1], [4], [7], [10]]
    assert Columns(1, 2).write(wide, 4, CHANGES).tolist() == [[0, 1, 2], [3, 7, 5], [6, 8, 8], [9, 10, 11]]


def test_a_changed_residual_row_is_one_summand_and_the_others_keep_both():
    hidden_states, residual = torch.full((4, 1), 1.0), torch.full((4, 1), 10.0)  # [num_tokens, 1] each
    view = ResidualSum()
    assert view.read((hidden_states, residual, "rope"), 4).flatten().tolist() == [11] * 4
    a, b, rope = view.write((hidden_states, residual, "rope"), 4, CHANGES)
    assert (a.flatten().tolist(), b.flatten().tolist(), rope) == ([1, 7, 8, 1], [10, 0, 0, 10], "rope")
    a, b = view.write((hidden_states, None), 4, CHANGES)
    assert (a.flatten().tolist(), b) == ([1, 7, 8, 1], None)
    assert view.read((hidden_states, None), 4) is hidden_states
