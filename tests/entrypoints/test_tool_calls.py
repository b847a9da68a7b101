"""Readers of tool calls: every format, every cut of the text, what only looks like a call, answers that end early."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.entrypoints.deltas import ContentDelta, Delta, Message, ToolCallDelta
from minivllm.entrypoints.tool_calls import TOOL_FORMATS, CallReader, JSONEnd, NamedReader, ToolFormat, find_format

NAMES = ("f", "get_weather", "f2")
Call = tuple[str, dict[str, Any]]

values = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.floats(-9, 9) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
) | st.sampled_from(["</tool_call>", '\\"}', "<tool_call>", "}]", "a, b=1)", "[TOOL_CALLS]"])
calls = st.lists(
    st.tuples(
        st.sampled_from(NAMES), st.dictionaries(st.from_regex(r"[a-z_]{1,4}", fullmatch=True), values, max_size=3)
    ),
    max_size=3,
)
plain = st.text(alphabet='ab <>[{\n_"T', max_size=12)


def written(shape: ToolFormat, found: list[Call]) -> str:
    """How a model of this family writes these calls."""
    texts = []
    for name, arguments in found:
        if shape.keywords:
            body = ", ".join(f"{key}={json.dumps(value)}" for key, value in arguments.items())
        else:
            body = json.dumps(arguments, ensure_ascii=False)
        texts.append(shape.begin(name) + body + shape.after)
    return shape.opening + shape.separator.join(texts) + shape.closing if texts else ""


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    places = sorted({cut % (len(text) + 1) for cut in cuts})
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


def read(reader: Any, pieces: list[str]) -> tuple[Message, list[Delta]]:
    """All deltas, and the message that they make. The last piece is the end."""
    deltas = [delta for piece in pieces[:-1] for delta in reader.advance(piece, False)]
    deltas += reader.advance(pieces[-1], True)
    message = Message()
    for delta in deltas:
        message.add(delta)
    return message, deltas


def shown(message: Message) -> tuple[str, list[tuple[str, str]]]:
    return message.content, [(call.name, call.arguments) for call in message.tool_calls]


# ------------------------------------------------------------------ what models write
@pytest.mark.parametrize("name", TOOL_FORMATS)
@settings(max_examples=150, deadline=None)
@given(found=calls, text=plain, cuts=st.lists(st.integers(0, 999), max_size=12))
def test_calls_are_read_however_the_text_is_cut(name: str, found: list[Call], text: str, cuts: list[int]):
    shape = TOOL_FORMATS[name]
    text = "" if shape.only_at_start and found else text
    reader = CallReader(shape, NAMES)
    message, deltas = read(reader, pieces_of(text + written(shape, found), cuts))
    assert [(call.name, json.loads(call.arguments)) for call in message.tool_calls] == found
    assert message.content == (text.rstrip() if found else text)
    assert reader.num_calls == len(found) and not reader.is_cut
    assert len({call.id for call in message.tool_calls}) == len(found)
    for index in range(len(found)):
        first, *rest = [d for d in deltas if isinstance(d, ToolCallDelta) and d.index == index]
        assert first.id and first.name and first.arguments == ""
        assert all(d.id is None and d.name is None and d.arguments for d in rest)
    if found and not shape.keywords:
        assert [call.arguments for call in message.tool_calls] == [json.dumps(a, ensure_ascii=False) for _, a in found]


@pytest.mark.parametrize("name", TOOL_FORMATS)
@settings(max_examples=150, deadline=None)
@given(found=calls, noise=plain, cuts=st.lists(st.integers(0, 999), max_size=12), end=st.integers(0, 200))
def test_an_answer_that_ends_anywhere_is_the_same_in_pieces(
    name: str, found: list[Call], noise: str, cuts: list[int], end: int
):
    """Also when noise makes it something that no grammar allows."""
    shape = TOOL_FORMATS[name]
    text = (written(shape, found) + noise)[:end]
    whole, split = CallReader(shape, NAMES), CallReader(shape, NAMES)
    message, _ = read(whole, [text])
    assert shown(read(split, pieces_of(text, cuts))[0]) == shown(message)
    assert (whole.is_cut, whole.num_calls) == (split.is_cut, split.num_calls)
    if not whole.is_cut:
        assert all(isinstance(json.loads(call.arguments), dict) for call in message.tool_calls)
    if not message.tool_calls:
        assert message.content == text  # nothing is lost


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_a_call_that_is_cut_says_so(name: str):
    shape = TOOL_FORMATS[name]
    text = written(shape, [("f", {"a": "x"})])
    inside = text.index("x") + 1
    for end in range(inside, len(text)):
        reader = CallReader(shape, NAMES)
        message, _ = read(reader, [text[:end]])
        assert [call.name for call in message.tool_calls] == ["f"] and message.content == ""
        assert reader.is_cut == (end < len(text) - len(shape.closing))
        assert '{"a": "x"}'.startswith(message.tool_calls[0].arguments)


# ------------------------------------------------------------------ text that is none
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", "2 < 3 and <tool and <tool_cal> and \n"),
        ("hermes", "the end <tool_call"),
        ("hermes", '<tool_call>\n{"name": "unknown", "arguments": {}}'),
        ("hermes", "hi \n<tool_call>x"),
        ("hermes", "hi \n<tool_call>"),
        ("mistral", "[TOOL_CALL] and [TOOL_"),
        ("llama3_json", '{"name": "Paris", "parameters": 3}'),
        ("llama3_json", 'so: {"name": "f", "parameters": {}}'),
        ("pythonic", "[1, 2, 3]"),
        ("pythonic", "[f]"),
    ],
)
def test_what_only_looks_like_a_call_is_text(name: str, text: str):
    for pieces in ([text], list(text)):
        message, deltas = read(CallReader(TOOL_FORMATS[name], NAMES), pieces)
        assert shown(message) == (text, [])


def test_text_is_held_back_no_longer_than_it_may_become_a_call():
    reader = CallReader(TOOL_FORMATS["hermes"], NAMES)
    assert reader.advance("a <", False) == [ContentDelta("a")]
    assert reader.advance("tool", False) == []
    assert reader.advance(" b", False) == [ContentDelta(" <tool b")]
    assert reader.advance("  ", False) == []
    assert reader.advance("c", False) == [ContentDelta("  c")]
    start = CallReader(TOOL_FORMATS["llama3_json"], NAMES)
    assert start.advance('{"name": "', False) == []
    assert start.advance("g", False) == []
    assert start.advance("o", False) == [ContentDelta('{"name": "go')]
    assert start.advance(' {"name": "f", "parameters": ', False) == [ContentDelta(' {"name": "f", "parameters": ')]


def test_arguments_stream_as_they_are_written():
    reader = CallReader(TOOL_FORMATS["hermes"], NAMES)
    assert reader.advance('hi <tool_call>\n{"name": "f", "argu', False) == [ContentDelta("hi")]
    (first,) = reader.advance('ments": ', False)
    assert isinstance(first, ToolCallDelta) and (first.index, first.name, first.arguments) == (0, "f", "")
    assert re.fullmatch("call_[0-9a-f]{24}", first.id or "")
    assert reader.advance('{"a": "}', False) == [ToolCallDelta(0, '{"a": "}')]
    assert reader.advance('"}}\n</tool', False) == [ToolCallDelta(0, '"}')]
    assert reader.advance("_call>", True) == []


def test_ids_are_what_mistrals_templates_take():
    message, _ = read(CallReader(TOOL_FORMATS["mistral"], NAMES), [written(TOOL_FORMATS["mistral"], [("f", {})] * 2)])
    ids = [call.id for call in message.tool_calls]
    assert len(set(ids)) == 2 and all(re.fullmatch("[0-9a-zA-Z]{9}", one) for one in ids)


def test_a_call_without_arguments_is_an_empty_object():
    for shape in TOOL_FORMATS.values():
        _, deltas = read(CallReader(shape, NAMES), list(written(shape, [("f", {})])))
        fragments = [d.arguments for d in deltas if isinstance(d, ToolCallDelta) and d.id is None]
        assert "".join(fragments) == "{}"


# ------------------------------------------------------------------ bare arguments, and JSON's end
@given(value=st.dictionaries(st.text(max_size=4), values, max_size=3), cuts=st.lists(st.integers(0, 99), max_size=6))
def test_bare_arguments_are_one_call(value: dict[str, Any], cuts: list[int]):
    text = json.dumps(value)
    reader = NamedReader("f")
    message, deltas = read(reader, pieces_of(text, cuts))
    assert shown(message) == ("", [("f", text)]) and not reader.is_cut
    first = deltas[0]
    assert isinstance(first, ToolCallDelta) and first.arguments == "" and first.name == "f"
    cut = NamedReader("f")
    assert shown(read(cut, [text[:-1]])[0]) == ("", [("f", text[:-1])]) and cut.is_cut


def test_an_empty_answer_is_no_call():
    reader = NamedReader("f")
    assert reader.advance("", True) == [] and reader.num_calls == 0


@given(value=values, rest=st.sampled_from(["", ")", ", b=1)", "}\n</tool_call>"]), cuts=st.lists(st.integers(0, 99)))
def test_the_end_of_a_json_value(value: Any, rest: str, cuts: list[int]):
    text = json.dumps(value)
    place, found = 0, None
    end = JSONEnd()
    for piece in pieces_of(text + rest, cuts):
        taken = end.advance(piece)
        if taken is not None:
            found = place + taken
            break
        place += len(piece)
    needs_more = not rest and not isinstance(value, str | list | dict)  # 12 may become 123
    assert found == (None if needs_more else len(text))


# ------------------------------------------------------------------ which format
@pytest.mark.parametrize(
    ("template", "parser", "expected"),
    [
        ('...<tool_call>\\n{"name": ...', "auto", ("hermes", True)),
        ("{{ tools }} <tool_call><function=x>", "auto", ("hermes", False)),
        ("[TOOL_CALLS] [", "auto", ("mistral", True)),
        ("[TOOL_CALLS]{{ name }}[ARGS]", "auto", ("mistral_args", True)),
        ("[TOOL_CALLS]{{ name }}[CALL_ID]{{ id }}[ARGS]", "auto", ("hermes", False)),
        ('Respond in the format {"name": function name, "parameters": dictionary', "auto", ("llama3_json", True)),
        ("[func_name1(params_name1=params_value1)]", "auto", ("pythonic", True)),
        ("{{ messages }}", "auto", ("hermes", False)),
        ("{{ messages }}", "pythonic", ("pythonic", True)),
        ("<tool_call>", "llama3_json", ("llama3_json", False)),
        ("<tool_call>", "qwen", ("hermes", True)),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isidentifier() else "",
)
def test_the_format_is_the_templates(template: str, parser: str, expected: tuple[str, bool]):
    shape, is_known = find_format(parser, template)
    assert (shape, is_known) == (TOOL_FORMATS[expected[0]], expected[1])
