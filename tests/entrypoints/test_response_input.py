"""Items -> messages: every form in which clients send a conversation."""

from __future__ import annotations

from typing import Any

import pytest

from minivllm.entrypoints.response_input import MAX_ITEMS, expand, to_chat_tool_choice, to_chat_tools, to_messages
from minivllm.entrypoints.response_store import NotStoredError, ResponseStore, StoredResponse
from minivllm.errors import InvalidRequestError

USER = {"role": "user", "content": "hi"}
CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a":1}'}
CHAT_CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "5"}
TOOL = {"role": "tool", "tool_call_id": "c1", "content": "5"}


def said(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


# ------------------------------------------------------------------ messages
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "text": (USER, USER),
    "type": ({**USER, "type": "message"}, USER),
    "type null": ({**USER, "type": None}, USER),
    "id and status": ({**USER, "type": "message", "id": "msg_1", "status": "completed"}, USER),
    "input_text": ({"role": "user", "content": [{"type": "input_text", "text": "hi"}]}, USER),
    "no parts": ({"role": "user", "content": []}, {"role": "user", "content": ""}),
    "two parts": (
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ),
    "developer": ({"role": "developer", "content": "be brief"}, {"role": "developer", "content": "be brief"}),
    "system": ({"role": "system", "content": "be brief"}, {"role": "system", "content": "be brief"}),
    "assistant": (said("yes"), said("yes")),
    "output_text": ({"role": "assistant", "content": [{"type": "output_text", "text": "yes"}]}, said("yes")),
    "whole output item": (
        {
            "id": "msg_1",
            "type": "message",
            "status": "completed",
            "role": "assistant",
            "phase": "final_answer",
            "content": [{"type": "output_text", "text": "yes", "annotations": [], "logprobs": []}],
        },
        said("yes"),
    ),
    "refusal": ({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, said("no")),
    "call": (CALL, said(None, tool_calls=[CHAT_CALL])),  # type: ignore[arg-type]
    "call with id": ({**CALL, "id": "fc_1", "status": "completed"}, said(None, tool_calls=[CHAT_CALL])),  # type: ignore[arg-type]
}


@pytest.mark.parametrize(("item", "message"), FORMS.values(), ids=FORMS.keys())
def test_the_forms_of_an_item(item: dict[str, Any], message: dict[str, Any]):
    assert to_messages([item], None) == [message]


def test_the_output_of_a_function_is_a_text_or_parts():
    for output in ("5", [{"type": "input_text", "text": "5"}], [{"type": "output_text", "text": "5"}]):
        messages = to_messages([CALL, {**OUTPUT, "output": output}], None)
        assert messages == [said(None, tool_calls=[CHAT_CALL]), TOOL]  # type: ignore[arg-type]
    two = [{"type": "input_text", "text": "5"}, {"type": "input_text", "text": "6"}]
    assert to_messages([CALL, {**OUTPUT, "output": two}], None)[-1]["content"] == "5\n6"


def test_what_was_said_in_one_go_is_one_message():
    """Templates want the calls beside the text, and both results behind both calls."""
    thought = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
    other = {**CALL, "call_id": "c2"}
    messages = to_messages([USER, thought, said("wait"), CALL, other, OUTPUT, {**OUTPUT, "call_id": "c2"}], None)
    assert messages == [
        USER,
        said("wait", reasoning_content="hm", tool_calls=[CHAT_CALL, {**CHAT_CALL, "id": "c2"}]),
        TOOL,
        {**TOOL, "tool_call_id": "c2"},
    ]
    assert to_messages([CALL, said("wait")], None) == [said("wait", tool_calls=[CHAT_CALL])]


def test_what_was_said_at_two_times_is_two_messages():
    assert to_messages([said("a"), said("b")], None) == [said("a"), said("b")]
    again = {**CALL, "call_id": "c2"}
    messages = to_messages([CALL, OUTPUT, again], None)
    assert [message["role"] for message in messages] == ["assistant", "tool", "assistant"]


def test_thinking_without_words_is_nothing_and_a_summary_stands_for_it():
    empty = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": None}
    assert to_messages([USER, empty, said("a")], None) == [USER, said("a")]
    summary = {**empty, "summary": [{"type": "summary_text", "text": "so"}]}
    assert to_messages([summary, said("a")], None) == [said("a", reasoning_content="so")]
    assert to_messages([summary, USER], None) == [said("", reasoning_content="so"), USER]  # it was cut there


def test_instructions_stand_in_front_and_join_a_system_message():
    """Many templates take one system message, and only as the first."""
    system = {"role": "system", "content": [{"type": "input_text", "text": "be kind"}]}
    assert to_messages([USER], "be brief") == [{"role": "system", "content": "be brief"}, USER]
    assert to_messages([system, USER], "be brief")[0] == {"role": "system", "content": "be brief\n\nbe kind"}
    parts = {"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    assert to_messages([parts, system], None) == [{"role": "system", "content": "a\nb\n\nbe kind"}]
    assert to_messages([USER, system], "be brief") == [
        {"role": "system", "content": "be brief"},
        USER,
        {"role": "system", "content": "be kind"},
    ]


BAD: dict[str, tuple[Any, str]] = {
    "no type": ({"content": "x"}, r"input\[1\].type"),
    "unknown type": ({"type": "web_search_call", "id": "ws_1"}, "web_search_call"),
    "type of another kind": ({"type": ["message"]}, r"input\[1\].type"),
    "role tool": ({"role": "tool", "content": "x"}, "function_call_output"),
    "no role": ({"type": "message", "content": "x"}, r"input\[1\].role"),
    "role of another kind": ({"role": ["user"], "content": "x"}, r"input\[1\].role"),
    "no content": ({"role": "user"}, r"input\[1\].content"),
    "content object": ({"role": "user", "content": {}}, r"input\[1\].content"),
    "image": ({"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}]}, "input_image"),
    "file": ({"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}, "input_file"),
    "audio": ({"role": "user", "content": [{"type": "input_audio"}]}, "input_audio"),
    "part of another kind": ({"role": "user", "content": [{"type": ["text"]}]}, r"content\[0\].type"),
    "part text": ({"role": "user", "content": ["x"]}, r"input\[1\].content\[0\]"),
    "part without text": ({"role": "user", "content": [{"type": "input_text"}]}, r"content\[0\].text"),
    "call without id": ({k: v for k, v in CALL.items() if k != "call_id"}, r"input\[1\].call_id"),
    "call without name": ({**CALL, "name": None}, r"input\[1\].name"),
    "arguments object": ({**CALL, "arguments": {}}, r"input\[1\].arguments"),
    "output of no call": ({**OUTPUT, "call_id": "c9"}, "'c9' is no earlier"),
    "output number": ({**OUTPUT, "output": 5}, r"input\[1\].output"),
    "output image": ({**OUTPUT, "output": [{"type": "input_image"}]}, "input_image"),
    "encrypted": ({"type": "reasoning", "id": "r", "summary": [], "encrypted_content": "x"}, "encrypted_content"),
    "thinking text": ({"type": "reasoning", "content": "x"}, r"input\[1\].content"),
    "thinking number": ({"type": "reasoning", "content": [{"text": 5}]}, r"input\[1\].content"),
}


@pytest.mark.parametrize(("item", "says"), BAD.values(), ids=BAD.keys())
def test_a_bad_item_is_refused_by_its_place(item: Any, says: str):
    """Its place among what was sent now: earlier turns do not count."""
    with pytest.raises(InvalidRequestError, match=says) as caught:
        to_messages([USER, CALL, USER, item], None, num_earlier=2)
    assert caught.value.parameter == "input" and len(str(caught.value)) < 400


# ------------------------------------------------------------------ earlier turns and references
def store_with(status: str = "completed") -> ResponseStore:
    store = ResponseStore(8, 10_000)
    item = {"id": "msg_1", "type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "yes"}]}
    store.put(StoredResponse("resp_1", (USER,), lambda: {"status": status, "output": [item]}, lambda: None))
    return store


def test_a_text_is_one_message_of_the_user():
    assert expand("hi", None, store_with()) == ([USER], 0)


def test_an_earlier_answer_brings_its_whole_conversation():
    items, num_earlier = expand("more", "resp_1", store_with())
    assert num_earlier == 2
    assert to_messages(items, None) == [USER, said("yes"), {"role": "user", "content": "more"}]


def test_a_reference_stands_for_the_item():
    for reference in ({"type": "item_reference", "id": "msg_1"}, {"id": "msg_1"}, {"id": "msg_1", "type": None}):
        items, _ = expand([USER, reference, USER], None, store_with())
        assert to_messages(items, None) == [USER, said("yes"), USER]


@pytest.mark.parametrize("reference", [{"type": "item_reference", "id": "msg_9"}, {"id": "msg_9"}], ids=["typed", "id"])
def test_an_unknown_reference_is_named(reference: dict[str, Any]):
    with pytest.raises(NotStoredError, match="'msg_9'") as caught:
        expand([USER, reference], None, store_with())
    assert caught.value.parameter == "input"


@pytest.mark.parametrize(
    ("given", "previous", "parameter"),
    [
        (None, None, "input"),
        ("", None, "input"),
        ([], None, "input"),
        (None, "resp_1", "input"),
        (["hi"], None, "input"),
        ([USER] * (MAX_ITEMS + 1), None, "input"),
        ([USER] * (MAX_ITEMS - 1), "resp_1", "input"),
        ([{"type": "item_reference"}], None, "input"),
        ([{"type": "item_reference", "id": 5}], None, "input"),
    ],
    ids=["null", "empty", "none", "only previous", "text in list", "many", "many with history", "no id", "number"],
)
def test_bad_input_is_refused(given: Any, previous: str | None, parameter: str):
    with pytest.raises(InvalidRequestError) as caught:
        expand(given, previous, store_with())
    assert caught.value.parameter == parameter


def test_an_answer_that_still_runs_cannot_be_continued():
    with pytest.raises(InvalidRequestError, match="still running") as caught:
        expand("more", "resp_1", store_with("in_progress"))
    assert caught.value.parameter == "previous_response_id"


# ------------------------------------------------------------------ tools
def test_flat_tools_are_chats():
    flat = {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}, "strict": None}
    function = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    assert to_chat_tools([flat]) == [{"type": "function", "function": function}]
    assert to_chat_tools(None) == to_chat_tools([]) == []


@pytest.mark.parametrize(
    "tool",
    [{"type": "web_search"}, {"name": "f"}, {"type": "function", "function": {"name": "f"}}, "f", None],
    ids=["hosted", "no type", "chat's form", "text", "null"],
)
def test_other_tools_are_refused(tool: Any):
    with pytest.raises(InvalidRequestError, match=r"tools\[0\]") as caught:
        to_chat_tools([tool])
    assert caught.value.parameter == "tools"


def test_tool_choice_is_a_word_or_a_function():
    assert [to_chat_tool_choice(word) for word in (None, "auto", "required")] == [None, "auto", "required"]
    assert to_chat_tool_choice({"type": "function", "name": "f"}) == {"type": "function", "function": {"name": "f"}}
    for bad in ({"type": "function"}, {"type": "allowed_tools", "mode": "auto", "tools": []}, {"type": "file_search"}):
        with pytest.raises(InvalidRequestError) as caught:
            to_chat_tool_choice(bad)
        assert caught.value.parameter == "tool_choice"
