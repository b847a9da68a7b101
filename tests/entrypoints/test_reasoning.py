"""Thinking: read however the text is cut, by what the prompt ends with, over HTTP, and with a form of the answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm import LLM, AsyncEngine
from minivllm.entrypoints.reasoning import ReasoningReader, thinking_mode
from minivllm.entrypoints.service import ServerConfig
from minivllm.errors import ConfigError
from tests.engine.test_async_engine import assert_idle
from tests.entrypoints.helpers import Web
from tests.entrypoints.test_tool_calls import pieces_of
from tests.entrypoints.tool_models import BEGINS_THINKING, HERMES, THINKS, closing_bias, tiny_llm

KNOWS = "{{ '<think>' }} {{ '</think>' }}"
Start = Callable[..., tuple[Web, LLM]]


# ------------------------------------------------------------------ reading
def read(mode: str, pieces: list[str]) -> tuple[str, str]:
    reader = ReasoningReader(mode)
    found = [reader.advance(piece, False) for piece in pieces[:-1]] + [reader.advance(pieces[-1], True)]
    return "".join(thinking for thinking, _ in found), "".join(rest for _, rest in found)


@pytest.mark.parametrize(
    ("mode", "text", "expected"),
    [
        ("none", "<think>a</think>b", ("", "<think>a</think>b")),
        ("may", "<think>\na < b\n</think>\n\nc ", ("a < b", "c ")),
        ("may", "\n<think>a</think>b</think>", ("a", "b</think>")),
        ("may", " hi <think>", ("", " hi <think>")),
        ("may", "<thi", ("", "<thi")),
        ("may", "<think>never ends </thi", ("never ends </thi", "")),
        ("begun", "a\n</think>\nb", ("a", "b")),
        ("begun", "</think>b", ("", "b")),
        ("begun", "cut ", ("cut ", "")),
        ("begun_or_not", "a</think>b", ("a", "b")),
        ("begun_or_not", "<think>a</think>b", ("a", "b")),
        ("begun_or_not", "never ends", ("never ends", "")),
    ],
)
def test_what_is_thinking(mode: str, text: str, expected: tuple[str, str]):
    assert read(mode, [text]) == read(mode, list(text)) == expected


@settings(max_examples=200, deadline=None)
@given(
    mode=st.sampled_from(["none", "may", "begun", "begun_or_not"]),
    parts=st.lists(st.sampled_from(["<think>", "</think>", "<", "</th", " ", "\n", "a", "bc"]), max_size=8),
    cuts=st.lists(st.integers(0, 99), max_size=8),
)
def test_pieces_say_what_the_whole_says(mode: str, parts: list[str], cuts: list[int]):
    text = "".join(parts)
    assert read(mode, pieces_of(text, cuts)) == read(mode, [text])


def test_thinking_is_held_back_no_longer_than_it_may_be_its_end():
    reader = ReasoningReader("begun")
    assert reader.advance("a <", False) == ("a", "")
    assert reader.advance("/thi", False) == ("", "")
    assert reader.advance("s", False) == (" </this", "")
    assert reader.advance("</think>\n\nb", False) == ("", "b")
    assert reader.advance(" c", False) == ("", " c")


@pytest.mark.parametrize(
    ("parser", "template", "prompt", "expected"),
    [
        ("auto", "{{ messages }}", "<|im_start|>assistant\n<think>\n", "none"),
        ("auto", KNOWS, "<|im_start|>assistant\n", "may"),
        ("auto", KNOWS, "<|im_start|>assistant\n<think>\n", "begun"),
        ("auto", KNOWS, "<|im_start|>assistant\n<think>\n\n</think>\n\n", "none"),
        ("none", KNOWS, "<think>\n", "none"),
        ("qwen3", "{{ messages }}", "assistant\n", "may"),
        ("deepseek_r1", "{{ messages }}", "assistant\n", "begun_or_not"),
        ("deepseek_r1", "{{ messages }}", "assistant<think>", "begun"),
    ],
)
def test_the_end_of_the_prompt_says_what_comes(parser: str, template: str, prompt: str, expected: str):
    assert thinking_mode(parser, template, prompt) == expected


def test_unknown_parsers_are_refused_at_the_start():
    for name in ("reasoning_parser", "tool_call_parser"):
        with pytest.raises(ConfigError, match=name):
            ServerConfig(**{name: "magic"})  # type: ignore[arg-type]


# ------------------------------------------------------------------ over HTTP
@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LLM]:
    """The mark that ends thinking is one special token of theirs, so that a bias can make a model like it."""
    loaded: dict[str, LLM] = {}

    def load(template: str) -> LLM:
        if template not in loaded:
            loaded[template] = tiny_llm(tmp_path_factory.mktemp("tiny"), template, "</think>")
        return loaded[template]

    return load


@pytest.fixture
def start(models: Callable[[str], LLM]) -> Iterator[Start]:
    running: list[tuple[AsyncEngine, LLM]] = []

    def begin(template: str, **config: Any) -> tuple[Web, LLM]:
        llm = models(template)
        engine = AsyncEngine(llm.llm_engine)
        running.append((engine, llm))
        return Web(engine, ServerConfig(served_model_names=("tiny",), **config)), llm

    yield begin
    for engine, llm in running:
        engine.shutdown()
        assert_idle(llm)


ASK = [{"role": "user", "content": "hi"}]
ENDS_THINKING = {"2": 13.0}
TOOL = {"type": "function", "function": {"name": "now"}}


def answers(web: Web, llm: LLM, **fields: Any) -> tuple[str, str, list[Any], str]:
    """(thinking, content, arguments of calls, reason), which must be the same as a stream."""
    fields = {"messages": ASK, "max_tokens": 60, **fields}
    llm.reset_prefix_cache()
    (choice,) = web.chat(**fields).body["choices"]
    message = choice["message"]
    assert message["reasoning"] == message.get("reasoning_content")
    whole = (
        message["reasoning"] or "",
        message["content"] or "",
        [call["function"]["arguments"] for call in message.get("tool_calls", ())],
        choice["finish_reason"],
    )
    llm.reset_prefix_cache()
    thinking, content, calls, reason = "", "", [], None
    for chunk in web.chat(stream=True, **fields).events[:-1]:
        (part,) = chunk["choices"]
        delta, reason = part["delta"], part["finish_reason"]
        assert delta.get("reasoning") == delta.get("reasoning_content")
        thinking += delta.get("reasoning") or ""
        content += delta.get("content") or ""
        for call in delta.get("tool_calls", ()):
            calls += [""] if "id" in call else []
            calls[-1] += call["function"]["arguments"]
    assert (thinking, content, calls, reason) == whole
    return whole


def test_a_prompt_that_opens_thinking(start: Start):
    web, llm = start(BEGINS_THINKING)
    found = [answers(web, llm, seed=seed, logit_bias=ENDS_THINKING, ignore_eos=True) for seed in range(3)]
    assert all(thinking and "think>" not in thinking for thinking, _, _, _ in found)
    assert any(content for _, content, _, _ in found) and all("think>" not in content for _, content, _, _ in found)
    cut = answers(web, llm, max_tokens=3, seed=1, logit_bias={"2": -100})
    assert cut[0] and cut[1:] == ("", [], "length")
    assert web.chat(ASK, max_tokens=3, seed=1, logit_bias={"2": -100}).body["choices"][0]["message"]["content"] is None


def test_a_prompt_that_closes_thinking_and_a_server_that_looks_for_none(start: Start):
    web, llm = start(THINKS)
    assert answers(web, llm, chat_template_kwargs={"enable_thinking": False}, temperature=0)[0] == ""
    web, llm = start(BEGINS_THINKING, reasoning_parser="none")
    thinking, content, _, _ = answers(web, llm, temperature=0, ignore_eos=True)
    assert thinking == "" and content


def test_the_form_of_the_answer_begins_behind_its_thinking(start: Start):
    web, llm = start(BEGINS_THINKING)
    for fields, check in (
        ({"response_format": {"type": "json_object"}}, lambda text: isinstance(json.loads(text), dict)),
        ({"guided_choice": ["yes", "no"]}, lambda text: text in ("yes", "no")),
        ({"guided_regex": "[ab]{3}"}, lambda text: len(text) == 3 and set(text) <= set("ab")),
    ):
        bias = closing_bias(llm) | ENDS_THINKING
        found = [answers(web, llm, seed=seed, logit_bias=bias, max_tokens=150, **fields) for seed in range(3)]
        ended = [content for _, content, _, reason in found if reason == "stop"]
        assert ended and all(check(content) for content in ended)
        assert any(thinking for thinking, _, _, _ in found)


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "now"}}], ids=["any", "named"]
)
def test_a_forced_call_comes_behind_the_thinking(start: Start, choice: Any):
    web, llm = start(BEGINS_THINKING)
    bias = closing_bias(llm) | ENDS_THINKING
    thinking, content, calls, reason = answers(
        web, llm, tools=[TOOL], tool_choice=choice, parallel_tool_calls=False, seed=2, logit_bias=bias, max_tokens=200
    )
    assert (
        thinking and (content, calls) == ("", ["{}"]) and reason == ("tool_calls" if choice == "required" else "stop")
    )


def test_history_keeps_its_thinking_for_the_template(start: Start):
    template = HERMES.replace("{{ m['content'] or '' }}", "{{ m['content'] or '' }}{{ m.reasoning_content }}")
    web, llm = start(template)
    for name in ("reasoning", "reasoning_content"):
        messages = [*ASK, {"role": "assistant", "content": "x", name: "secret thought"}, *ASK]
        body = web.chat(messages, max_tokens=1, return_token_ids=True).body
        assert "xsecret thought" in llm.llm_engine.decode(body["prompt_token_ids"])
