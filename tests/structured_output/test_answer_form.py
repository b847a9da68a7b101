"""The grammar of a whole answer: which texts it accepts, also where marks are special tokens, and whose fault it is."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken

from minivllm.engine.tokenizer import Tokenizer, load_tokenizer
from minivllm.errors import InvalidRequestError
from minivllm.hub import resolve_model
from minivllm.sampling_params import AnswerForm, CallForm, StructuredOutputsParams
from minivllm.structured_output.manager import StructuredOutputManager

ONE_CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
YES_OR_NO = StructuredOutputsParams(json={"enum": ["yes", "no"]})


def calls(begin: str, end: str) -> tuple[CallForm, ...]:
    return tuple(CallForm(begin % name, schema, end) for name, schema in (("f", ONE_CITY), ("g", NOTHING)))


HERMES: dict[str, Any] = {
    "calls": calls('<tool_call>\n{"name": "%s", "arguments": ', "}\n</tool_call>"),
    "trigger": "<tool_call>",
    "separator": "\n",
}
MISTRAL: dict[str, Any] = {
    "calls": calls('{"name": "%s", "arguments": ', "}"),
    "trigger": "[TOOL_CALLS]",
    "opening": "[TOOL_CALLS][",
    "separator": ", ",
    "closing": "]",
}
LLAMA: dict[str, Any] = {
    "calls": calls('{"name": "%s", "parameters": ', "}"),
    "trigger": "{",
    "separator": "; ",
    "only_at_start": True,
}
PYTHONIC: dict[str, Any] = {
    "calls": calls("%s(", ")"),
    "trigger": "[",
    "opening": "[",
    "separator": ", ",
    "closing": "]",
    "only_at_start": True,
    "keywords": True,
}
F = '<tool_call>\n{"name": "f", "arguments": {"city": "Ulm"}}\n</tool_call>'
G = '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
M = '{"name": "g", "arguments": {}}'
P = '{"name": "g", "parameters": {}}'

# form -> texts that are whole answers, texts that no answer begins with
CASES: dict[str, tuple[AnswerForm, list[str], list[str]]] = {
    "hermes auto": (
        AnswerForm(**HERMES, max_calls=2),
        ["", "hi", "a < b <tool", F, f"hi {F}", f"hi\n{F}\n{G}"],
        [f"{F}\n{F}\n{F}", f"{F} x", "<tool_call> ", '<tool_call>\n{"name": "h"', G.replace("{}}", '{"a": 1}}')],
    ),
    "hermes one": (AnswerForm(**HERMES), ["hi", F], [f"{F}\n"]),
    "hermes required": (AnswerForm(**HERMES, allows_text=False, max_calls=2), [F, f"{G}\n{F}"], ["hi", f" {F}"]),
    "named": (AnswerForm(calls=(CallForm("", ONE_CITY),), allows_text=False), ['{"city": "a"}'], ["{}", " {", "hi"]),
    "mistral auto": (
        AnswerForm(**MISTRAL, max_calls=2),
        ["hi", f"[TOOL_CALLS][{M}]", f"hi [TOOL_CALLS][{M}, {M}]"],
        ["[TOOL_CALLS]{", f"[TOOL_CALLS][{M}] ", f"[TOOL_CALLS][{M}, {M}, "],
    ),
    "llama auto": (
        AnswerForm(**LLAMA, max_calls=2),
        ["hi", P, f"\n{P}", f"{P}; {P}", f"so {P}", '{"name": "Ulm"}', '{"name": "g"}'],
        ['{"name": "f", "parameters": {}', f"{P} x"],
    ),
    "llama required": (AnswerForm(**LLAMA, allows_text=False), [P], [f"\n{P}", "hi", '{"name": "Ulm"']),
    "pythonic auto": (
        AnswerForm(**PYTHONIC, max_calls=2),
        ["hi", "[1, 2]", "[g()]", '[f(city="a")]', '[f(city="a"), g()]'],
        ["[f()", "[g(a=1", "[g()] x", "[f(city=a"],
    ),
    "may think": (
        AnswerForm(**HERMES, thinking="may"),
        ["hi", F, "<think>a < b</think>hi", f"<think>a</think>\n\n{F}"],
        ["<think>a</think><tool_call> "],
    ),
    "thinks": (
        AnswerForm(**HERMES, thinking="begun", allows_text=False),
        [f"a</think>{F}", f"</think>\n\n{F}"],
        ["a</think>hi"],
    ),
    "thinks, then a document": (
        AnswerForm(thinking="begun", text=YES_OR_NO),
        ['a</think>"yes"', '</think>\n\n"no"'],
        ["a</think>x", 'a</think>"yes" '],
    ),
    "a document or a call": (AnswerForm(**HERMES, text=YES_OR_NO), ['"yes"', F], ["hi", f'"yes"{F}']),
}


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Any) -> Tokenizer:
    found = load_tokenizer(resolve_model(tiny_model("llama")))
    assert found is not None
    return found


@pytest.fixture(scope="module", params=["spelled", "special", "added"])
def manager(request: pytest.FixtureRequest, tiny_model: Any) -> StructuredOutputManager:
    """Marks are plain text, special tokens, or tokens that were added as text."""
    found = load_tokenizer(resolve_model(tiny_model("llama")))
    assert found is not None
    if request.param != "spelled":
        marks = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<think>", "</think>")
        tokens = [AddedToken(mark, normalized=False, special=request.param == "special") for mark in marks]
        found.backend.add_special_tokens(tokens) if request.param == "special" else found.backend.add_tokens(tokens)
    return StructuredOutputManager(found.backend, 330, frozenset({0}))


@pytest.mark.parametrize("name", CASES)
def test_what_an_answer_may_be(manager: StructuredOutputManager, name: str):
    """Token by token, as a model draws them: each must be in the mask, and the end only where it may be."""
    form, good, bad = CASES[name]
    grammar = manager.compile(form)
    row = np.empty(-(-330 // 32), dtype=np.int32)
    for text in [*good, *bad]:
        matcher = grammar.new_matcher()
        for token_id in manager._backend.encode(text, add_special_tokens=False).ids:
            matcher.fill_bitmask(row)
            is_allowed = bool(row[token_id // 32] >> (token_id % 32) & 1)
            assert matcher.accept_tokens([token_id]) == is_allowed, (text, token_id)
            if not is_allowed:
                break
        else:
            matcher.fill_bitmask(row)
            assert bool(row[0] & 1) == (text in good), text
            is_allowed = text in good
        assert is_allowed == (text in good), text
        assert matcher.error is None


def test_a_mark_that_is_a_token_cannot_be_spelled_either(manager: StructuredOutputManager):
    """The reader would take it for the beginning of a call."""
    text = "hi <tool_call> hi"
    matcher = manager.compile(AnswerForm(**HERMES)).new_matcher()
    ids = [manager._backend.encode(char, add_special_tokens=False).ids[0] for char in text]
    assert matcher.accept_tokens(ids) <= text.index(">") + 1


def test_the_fault_is_named_where_it_is(tokenizer: Tokenizer):
    manager = StructuredOutputManager(tokenizer.backend, 320, frozenset({0}))
    bad = {"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}}
    form = AnswerForm(calls=(CallForm("f", NOTHING, label="one"), CallForm("g", bad, label="two")), trigger="f")
    with pytest.raises(InvalidRequestError) as caught:
        manager.compile(form)
    assert caught.value.parameter == "tools" and caught.value.message.startswith("two ")
    with pytest.raises(InvalidRequestError) as caught:
        manager.compile(AnswerForm(thinking="begun", text=StructuredOutputsParams(regex="(")))
    assert caught.value.parameter == "structured_outputs"


def test_a_form_is_compiled_from_its_text_the_second_time(tokenizer: Tokenizer):
    manager = StructuredOutputManager(tokenizer.backend, 320, frozenset({0}))
    for _ in range(2):
        manager.compile(AnswerForm(**HERMES))
    manager.compile(AnswerForm(**HERMES, max_calls=2))
    assert len(manager.cache) == 2


def test_optional_keywords_may_be_absent_in_any_combination(tokenizer: Tokenizer):
    schema = {"type": "object", "properties": {k: {"type": "integer"} for k in "abc"}, "required": ["b"]}
    form = AnswerForm(calls=(CallForm("f(", schema, ")"),), allows_text=False, keywords=True)
    manager = StructuredOutputManager(tokenizer.backend, 320, frozenset({0}))
    grammar = manager.compile(form)

    def is_answer(text: str) -> bool:
        matcher = grammar.new_matcher()
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        return matcher.accept_tokens([*token_ids, 0]) == len(token_ids) + 1

    assert all(map(is_answer, ["f(b=1)", "f(a=1, b=2)", "f(b=1, c=2)", "f(a=1, b=2, c=3)"]))
    assert not any(map(is_answer, ["f()", "f(a=1)", "f(c=1, b=2)", "f(, b=1)", "f(b=1,)", "f(b=1, b=2)"]))
    assert json.loads(manager.cache.get(next(iter(manager.cache._texts))) or "")["grammars"]
