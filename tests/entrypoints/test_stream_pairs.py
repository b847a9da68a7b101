"""A stream and a whole answer are one answer: 500 random requests, each sent both ways and compared in everything that
a client can see: text, thinking, tool calls, token ids, logprobs, reasons, usage.

The requests are drawn by number, so that a failing one can be asked for again: test_pair[chat 17].
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from minivllm import LLM, AsyncEngine
from minivllm.entrypoints.service import ServerConfig
from tests.engine.test_async_engine import assert_idle
from tests.entrypoints.helpers import CHAT, COMPLETIONS, Reply, Web
from tests.entrypoints.response_helpers import RESPONSES, nameless
from tests.entrypoints.response_helpers import streamed as streamed_response
from tests.entrypoints.tool_models import THINKS, closing_bias, tiny_llm

NUM_CHAT, NUM_COMPLETIONS, NUM_RESPONSES = 200, 150, 150
WORDS = ["the", "capital", "of", "a", "river", "is", "7", "é", "한", "{", "]", "\n", "\t", "value,", "ok?", "😀"]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "n"],
    "additionalProperties": False,
}
TOOL = {"name": "look_up", "description": "Looks up", "parameters": SCHEMA}


# ------------------------------------------------------------------ the requests
def maybe(draw: random.Random, chance: float, field: str, value: Any) -> dict[str, Any]:
    return {field: value} if draw.random() < chance else {}


def text(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(1, 12)))


def drawing(draw: random.Random, bias: dict[str, float]) -> dict[str, Any]:
    """How an answer is drawn, where it stops: fields that all three endpoints share."""
    fields: dict[str, Any] = {"seed": draw.randrange(1000), "temperature": draw.choice([0, 0.01, 0.7, 1, 2])}
    fields |= maybe(draw, 0.3, "top_p", draw.uniform(0.05, 1)) | maybe(draw, 0.3, "top_k", draw.randint(-1, 50))
    fields |= maybe(draw, 0.2, "min_p", draw.random()) | maybe(draw, 0.2, "min_tokens", draw.randint(0, 4))
    fields |= maybe(draw, 0.3, "presence_penalty", draw.uniform(-2, 2))
    fields |= maybe(draw, 0.3, "frequency_penalty", draw.uniform(-2, 2))
    fields |= maybe(draw, 0.3, "repetition_penalty", draw.uniform(0.5, 2))
    fields |= maybe(draw, 0.4, "stop", draw.sample(["a", "e", "the", " ", "}", "is", "\n"], draw.randint(1, 4)))
    fields |= maybe(draw, 0.3, "include_stop_str_in_output", True) | maybe(draw, 0.2, "ignore_eos", True)
    fields |= maybe(draw, 0.3, "skip_special_tokens", draw.random() < 0.5)
    if "min_tokens" not in fields:  # it would forbid them, and a grammar may need them
        fields |= maybe(draw, 0.3, "stop_token_ids", draw.sample(range(256), 40))
    return fields | maybe(draw, 0.1, "bad_words", ["the", "a b"]) | maybe(draw, 0.6, "logit_bias", bias)


def shape(draw: random.Random, temperature: float) -> dict[str, Any]:
    """What chat and completions have beside that."""
    fields: dict[str, Any] = {"max_tokens": draw.randint(4, 40), **maybe(draw, 0.3, "return_token_ids", True)}
    return fields | (maybe(draw, 0.4, "n", draw.randint(1, 3)) if temperature else {})


def form(draw: random.Random) -> dict[str, Any]:
    """The form of the answer; mostly none."""
    forms = [
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA}}},
        {"guided_regex": "[a-c]{2,5}(x|yz)"},
        {"guided_choice": ["one", "one more", "two"]},
    ]
    return draw.choice(forms) if draw.random() < 0.35 else {}


def chat_request(draw: random.Random, bias: dict[str, float]) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": text(draw)}], **drawing(draw, bias)}
    body |= shape(draw, body["temperature"])
    body |= {"logprobs": True, "top_logprobs": draw.randint(0, 5)} if draw.random() < 0.4 else {}
    body |= maybe(draw, 0.3, "chat_template_kwargs", {"enable_thinking": draw.random() < 0.5})
    if draw.random() < 0.5:
        body["tools"] = [{"type": "function", "function": TOOL}, {"type": "function", "function": {"name": "now"}}]
        named = {"type": "function", "function": {"name": "look_up"}}
        body["tool_choice"] = draw.choice(["auto", "none", "required", named])
        body |= maybe(draw, 0.5, "parallel_tool_calls", draw.random() < 0.5)
        body["max_tokens"] += 60
        return body
    return body | form(draw)


def completion_request(draw: random.Random, bias: dict[str, float]) -> dict[str, Any]:
    body = {"prompt": text(draw), **drawing(draw, bias), **form(draw)}
    body |= shape(draw, body["temperature"])
    body |= maybe(draw, 0.4, "logprobs", draw.randint(0, 5)) | maybe(draw, 0.3, "echo", True)
    body |= maybe(draw, 0.2, "prompt", [text(draw), text(draw)])
    return body


def response_request(draw: random.Random, bias: dict[str, float]) -> dict[str, Any]:
    body = {"input": text(draw), "max_output_tokens": draw.randint(4, 40), **drawing(draw, bias), "store": False}
    if draw.random() < 0.4:
        body |= {"include": ["message.output_text.logprobs"], "top_logprobs": draw.randint(0, 5)}
    if draw.random() < 0.5:
        body["tools"] = [{"type": "function", **TOOL}, {"type": "function", "name": "now", "parameters": None}]
        body["tool_choice"] = draw.choice(["auto", "none", "required", {"type": "function", "name": "look_up"}])
        body["max_output_tokens"] += 60
    elif draw.random() < 0.4:
        body["text"] = {"format": {"type": "json_schema", "name": "it", "schema": SCHEMA}}
    return body


# ------------------------------------------------------------------ what a client knows in the end
def known() -> dict[str, Any]:
    return {
        "content": "", "reasoning": "", "calls": [], "logprobs": None, "token_ids": [], "prompt_token_ids": None,
        "finish_reason": None, "stop_reason": None,
    }  # fmt: skip


def add_piece(choice: dict[str, Any], piece: dict[str, Any], message: dict[str, Any]) -> None:
    """piece: a choice of a chunk or of a body; message: its delta, its message, or its text as a message."""
    choice["content"] += message.get("content") or ""
    choice["reasoning"] += message.get("reasoning") or ""
    for number, call in enumerate(message.get("tool_calls") or ()):
        if call.get("index", number) == len(choice["calls"]):
            choice["calls"].append({"name": call["function"]["name"], "arguments": ""})
        choice["calls"][call.get("index", number)]["arguments"] += call["function"]["arguments"]
    if piece.get("logprobs") is not None:
        lists = choice["logprobs"] = choice["logprobs"] or {name: [] for name in piece["logprobs"]}
        for name, entries in piece["logprobs"].items():
            lists[name] += entries
    choice["token_ids"] += piece.get("token_ids") or []
    for name in ("prompt_token_ids", "finish_reason", "stop_reason"):
        if piece.get(name) is not None:
            assert choice[name] is None, f"{name} came twice"
            choice[name] = piece[name]


def message_of(piece: dict[str, Any]) -> dict[str, Any]:
    return piece.get("delta") or piece.get("message") or {"content": piece.get("text")}


def whole_answer(reply: Reply) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Its choices and its usage."""
    assert reply.status == 200, reply.text
    choices = []
    for piece in reply.body["choices"]:
        choices.append(known())
        add_piece(choices[-1], piece, message_of(piece))
    return choices, reply.body["usage"]


def streamed_answer(reply: Reply) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The same, put together from the chunks."""
    assert reply.status == 200, reply.text
    *chunks, last, done = [event for event in reply.events if not isinstance(event, str) or event[0] != ":"]
    assert done == "[DONE]" and last["choices"] == []
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for piece in chunk["choices"]:
            choice = choices.setdefault(piece["index"], known())
            assert choice["finish_reason"] is None, "something came behind the end"
            add_piece(choice, piece, message_of(piece))
    return [choices[index] for index in sorted(choices)], last["usage"]


# ------------------------------------------------------------------ the pairs
@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return tiny_llm(tmp_path_factory.mktemp("tiny"), THINKS)


@pytest.fixture(scope="module")
def web(model: LLM) -> Iterator[Web]:
    engine = AsyncEngine(model.llm_engine)
    yield Web(engine, ServerConfig(served_model_names=("tiny",)))
    engine.shutdown()
    assert_idle(model)


@pytest.fixture
def ask(web: Web, model: LLM) -> Callable[..., Reply]:
    """Every request finds an empty prefix cache: cached tokens are part of usage."""

    def send(path: str, body: dict[str, Any]) -> Reply:
        model.reset_prefix_cache()
        return web.call("POST", path, body)

    return send


Pair = Callable[[random.Random, dict[str, float]], dict[str, Any]]
PAIRS: list[Any] = [
    pytest.param(path, request, number, id=f"{name} {number}")
    for name, path, request, count in (
        ("chat", CHAT, chat_request, NUM_CHAT),
        ("completions", COMPLETIONS, completion_request, NUM_COMPLETIONS),
    )
    for number in range(count)
]


@pytest.mark.parametrize(("path", "request_of", "number"), PAIRS)
def test_pair(ask: Callable[..., Reply], model: LLM, path: str, request_of: Pair, number: int):
    body = request_of(random.Random(f"{path} {number}"), closing_bias(model))
    expected = whole_answer(ask(path, body))
    assert all(choice["finish_reason"] for choice in expected[0])
    assert streamed_answer(ask(path, {**body, "stream": True, "stream_options": {"include_usage": True}})) == expected


@pytest.mark.parametrize("number", range(NUM_RESPONSES))
def test_pair_of_responses(ask: Callable[..., Reply], model: LLM, number: int):
    body = response_request(random.Random(f"{RESPONSES} {number}"), closing_bias(model))
    reply = ask(RESPONSES, body)
    assert reply.status == 200, reply.text
    streamed = streamed_response(ask(RESPONSES, {**body, "stream": True}))
    assert nameless(streamed) == nameless(reply.body)
    assert streamed["usage"] == reply.body["usage"]


def test_the_pairs_reach_what_they_are_for(ask: Callable[..., Reply], model: LLM):
    """Calls, each reason to stop and logprobs all occur: a comparison of empty answers would prove nothing."""
    seen: set[str] = set()
    for number in range(NUM_CHAT):
        body = chat_request(random.Random(f"{CHAT} {number}"), closing_bias(model))
        for choice in whole_answer(ask(CHAT, body))[0]:
            seen |= {name for name in ("content", "reasoning", "calls", "logprobs", "token_ids") if choice[name]}
            seen |= {choice["finish_reason"]} | ({"two calls"} if len(choice["calls"]) > 1 else set())
            seen |= {type(choice["stop_reason"]).__name__}
    wanted = {"content", "calls", "logprobs", "token_ids", "stop", "length", "tool_calls", "two calls", "str", "int"}
    assert wanted <= seen, wanted - seen
