"""Events of items: the order for every sequence of deltas, however they are cut; and that the reader of it can fail."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minivllm.entrypoints.response_output import Output
from minivllm.entrypoints.turn import ContentDelta, Delta, ReasoningDelta, ToolCallDelta
from tests.entrypoints.response_helpers import folded

THOUGHT = [ReasoningDelta("let "), ReasoningDelta("me see")]
SAID = [ContentDelta("it "), ContentDelta("is"), ContentDelta(" 5")]
CALL = [ToolCallDelta(0, "", "call_1", "f"), ToolCallDelta(0, '{"a"'), ToolCallDelta(0, ":1}")]
OTHER = [ToolCallDelta(1, '{"a":2}', "call_2", "g")]
SEQUENCES: dict[str, list[Delta]] = {
    "text": SAID,
    "thought, text": [*THOUGHT, *SAID],
    "two calls": [*CALL, *OTHER],
    "everything": [*THOUGHT, *SAID, *CALL, *OTHER],
    "text after a call": [*CALL, *SAID],
    "nothing": [],
}


def run(deltas: list[Delta], status: str = "completed") -> tuple[Output, list[dict[str, Any]]]:
    output, events = Output(), []
    for delta in deltas:
        events += output.add(delta)
    return output, events + output.close(status)


@pytest.mark.parametrize("status", ["completed", "incomplete"])
@pytest.mark.parametrize("deltas", SEQUENCES.values(), ids=SEQUENCES.keys())
def test_events_add_up_to_the_items(deltas: list[Delta], status: str):
    output, events = run(deltas, status)
    items = folded(events)
    assert items == output.as_list()
    assert not items or items[-1]["status"] == status
    said = "".join(part["text"] for item in items if item["type"] == "message" for part in item["content"])
    assert said == "".join(delta.text for delta in deltas if isinstance(delta, ContentDelta))
    assert output.reasoning == "".join(delta.text for delta in deltas if isinstance(delta, ReasoningDelta))


def test_a_call_keeps_its_name_and_the_id_that_the_turn_gave_it():
    output, events = run([*CALL, *OTHER])
    first, second = output.as_list()
    assert (first["call_id"], first["name"], first["arguments"]) == ("call_1", "f", '{"a":1}')
    assert (second["call_id"], second["name"], second["arguments"]) == ("call_2", "g", '{"a":2}')
    added = [event["item"] for event in events if event["type"] == "response.output_item.added"]
    assert [(item["name"], item["arguments"]) for item in added] == [("f", ""), ("g", "")]
    assert [e["delta"] for e in events if e["type"].endswith("arguments.delta")] == ['{"a"', ":1}", '{"a":2}']


def test_a_snapshot_does_not_change_afterwards():
    output = Output()
    output.add(SAID[0], [{"token": "it"}])
    before = output.as_list()
    kept = copy.deepcopy(before)
    output.add(SAID[1], [{"token": "is"}])
    output.close("completed")
    assert before == kept and before[0]["status"] == "in_progress" and before[0]["content"][0]["text"] == "it "


def test_a_quiet_end_tells_nobody():
    output = Output()
    output.add(SAID[0])
    assert output.close("incomplete", quietly=True) == [] and output.as_list()[0]["status"] == "incomplete"
    assert output.close("completed") == [] and output.as_list()[0]["status"] == "incomplete"


@given(st.lists(st.sampled_from([*THOUGHT, *SAID, *OTHER]), max_size=12))
def test_any_sequence_is_told_in_order(deltas: list[Delta]):
    output, events = run(deltas)
    assert folded(events) == output.as_list()


# ------------------------------------------------------------------ the reader itself
def drop(kind: str) -> Callable[[list[dict[str, Any]]], None]:
    """Without the first event of a type."""

    def damage(events: list[dict[str, Any]]) -> None:
        del events[next(n for n, event in enumerate(events) if event["type"] == kind)]

    return damage


def change(kind: str, **fields: Any) -> Callable[[list[dict[str, Any]]], None]:
    """With other fields in the first event of a type."""

    def damage(events: list[dict[str, Any]]) -> None:
        next(event for event in events if event["type"] == kind).update(fields)

    return damage


KINDS = sorted({event["type"] for event in run(SEQUENCES["everything"])[1]})
DAMAGES: dict[str, Callable[[list[dict[str, Any]]], None]] = {
    **{f"no {kind}": drop(kind) for kind in KINDS},
    **{f"other id in {kind}": change(kind, item_id="x") for kind in KINDS if "output_item" not in kind},
    **{f"other index in {kind}": change(kind, output_index=9) for kind in KINDS},
    "other text": change("response.output_text.done", text="x"),
    "other arguments": change("response.function_call_arguments.done", arguments="x"),
    "swapped": lambda events: events.insert(0, events.pop(1)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_the_reader_of_these_tests_notices_every_damage(damage: Callable[[list[dict[str, Any]]], None]):
    _, events = run(SEQUENCES["everything"])
    good = folded(copy.deepcopy(events))
    damage(events)
    try:
        assert folded(events) != good
    except (AssertionError, KeyError, StopIteration, ValueError):
        return
