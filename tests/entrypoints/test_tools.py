"""Tools over HTTP: calls are valid whatever the model, streamed and whole are equal, choices are kept, loops end."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema
import openai
import pytest

from golden.tiny import CHAT_TEMPLATE
from minivllm import LLM, AsyncEngine
from minivllm.entrypoints.server import make_server
from minivllm.entrypoints.service import ServerConfig
from minivllm.entrypoints.tool_choice import read_choice
from tests.engine.test_async_engine import assert_idle
from tests.entrypoints.helpers import CHAT, Reply, Web
from tests.entrypoints.tool_models import FAMILIES, HERMES, MISTRAL, MISTRAL_ARGS, closing_bias, tiny_llm

ASK = [{"role": "user", "content": "weather?"}]
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "unit": {"enum": ["C", "F", None]},
        "days": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 3},
    },
    "required": ["city", "days"],
}


def tool(name: str, parameters: dict[str, Any] | None = None, **others: Any) -> dict[str, Any]:
    function = {"name": name, **others} | ({} if parameters is None else {"parameters": parameters})
    return {"type": "function", "function": function}


TOOLS = [tool("get_weather", WEATHER, description="Weather"), tool("now")]
SCHEMAS = {"get_weather": WEATHER | {"additionalProperties": False}, "now": {"maxProperties": 0, "type": "object"}}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
Start = Callable[..., tuple[Web, LLM]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str | None], LLM]:
    """Tiny models by template and special token, each loaded once."""
    loaded: dict[tuple[str, str | None], LLM] = {}

    def load(template: str, special: str | None = None) -> LLM:
        key = (template, special)
        if key not in loaded:
            loaded[key] = tiny_llm(tmp_path_factory.mktemp("tiny"), template, special)
        return loaded[key]

    return load


@pytest.fixture
def start(models: Callable[[str, str | None], LLM]) -> Iterator[Start]:
    """A server on one of them; afterwards nothing runs and no block is taken."""
    running: list[tuple[AsyncEngine, LLM]] = []

    def begin(template: str = HERMES, special: str | None = None, **config: Any) -> tuple[Web, LLM]:
        llm = models(template, special)
        engine = AsyncEngine(llm.llm_engine)
        running.append((engine, llm))
        return Web(engine, ServerConfig(served_model_names=("tiny",), **config)), llm

    yield begin
    for engine, llm in running:
        engine.shutdown()
        assert_idle(llm)


def folded(reply: Reply) -> list[dict[str, Any]]:
    """What a client knows after a stream: for each choice its content, calls and reason. Checks the order of deltas."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in reply.events[:-1]:
        for choice in chunk["choices"]:
            known = choices.setdefault(choice["index"], {"content": "", "tool_calls": [], "finish_reason": None})
            assert known["finish_reason"] is None
            delta = choice["delta"]
            known["content"] += delta.get("content") or ""
            for call in delta.get("tool_calls", ()):
                _fold_call(known["tool_calls"], call)
            known["finish_reason"] = choice["finish_reason"]
            if choice["finish_reason"] and known["tool_calls"]:
                assert delta == {}
    return [choices[index] for index in sorted(choices)]


def _fold_call(calls: list[dict[str, Any]], call: dict[str, Any]) -> None:
    function = call["function"]
    if call["index"] == len(calls):
        assert call["type"] == "function" and call["id"] and function["name"] and function["arguments"] == ""
        calls.append({"name": function["name"], "arguments": "", "id": call["id"]})
    else:
        assert call["index"] == len(calls) - 1 and set(call) == {"index", "function"}
        assert set(function) == {"arguments"} and function["arguments"]
        calls[-1]["arguments"] += function["arguments"]


def without_ids(choice: dict[str, Any]) -> dict[str, Any]:
    """Ids are drawn anew for every answer."""
    calls = [{key: call[key] for key in ("name", "arguments")} for call in choice["tool_calls"]]
    return {**choice, "tool_calls": calls}


def whole(choice: dict[str, Any]) -> dict[str, Any]:
    """A choice of a body, in the form of a folded one."""
    message = choice["message"]
    calls = [{**call["function"], "id": call["id"]} for call in message.get("tool_calls", ())]
    assert (message["content"] is None) if calls and not message["content"] else isinstance(message["content"], str)
    return {"content": message["content"] or "", "tool_calls": calls, "finish_reason": choice["finish_reason"]}


def check_calls(choice: dict[str, Any]) -> None:
    """All of them are valid, unless the answer was cut."""
    for call in choice["tool_calls"]:
        try:
            arguments = json.loads(call["arguments"])
        except ValueError:
            assert choice["finish_reason"] == "length"
        else:
            jsonschema.validate(arguments, SCHEMAS[call["name"]])


# ------------------------------------------------------------------ forced
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tool_choice", ["required", NAMED], ids=["required", "named"])
def test_a_random_model_makes_valid_calls(start: Start, family: str, tool_choice: Any):
    web, llm = start(FAMILIES[family])
    ended = 0
    for seed in range(3):
        fields = {"tools": TOOLS, "tool_choice": tool_choice, "seed": seed, "n": 2, "max_tokens": 150}
        fields["logit_bias"] = closing_bias(llm)
        llm.reset_prefix_cache()
        choices = [whole(choice) for choice in web.chat(ASK, **fields).body["choices"]]
        llm.reset_prefix_cache()
        streamed = folded(web.chat(ASK, stream=True, **fields))
        assert [without_ids(choice) for choice in streamed] == [without_ids(choice) for choice in choices]
        for choice in choices:
            check_calls(choice)
            assert choice["tool_calls"] or choice["finish_reason"] == "length"
            if choice["finish_reason"] != "length":
                ended += 1
                assert choice["content"] == ""
                assert choice["finish_reason"] == ("tool_calls" if tool_choice == "required" else "stop")
            if tool_choice == NAMED:
                assert [call["name"] for call in choice["tool_calls"]] == ["get_weather"]
        ids = [call["id"] for choice in choices for call in choice["tool_calls"]]
        assert len(set(ids)) == len(ids)
    assert ended >= 3


def test_one_call_at_most(start: Start):
    web, llm = start(FAMILIES["pythonic"])
    bias = closing_bias(llm, **{",": 30.0})  # it wants another call after every call
    fields = {"tools": [TOOLS[1]], "tool_choice": "required", "logit_bias": bias, "seed": 1, "max_tokens": 300}
    several = whole(web.chat(ASK, **fields).body["choices"][0])
    assert len(several["tool_calls"]) == 16 and several["finish_reason"] == "tool_calls"  # the most there can be
    one = whole(web.chat(ASK, parallel_tool_calls=False, **fields).body["choices"][0])
    assert [call["arguments"] for call in one["tool_calls"]] == ["{}"] and one["finish_reason"] == "tool_calls"


# ------------------------------------------------------------------ auto
@pytest.mark.parametrize(
    ("template", "special"),
    [
        (HERMES, "<tool_call>"),
        (MISTRAL, "[TOOL_CALLS]"),
        (MISTRAL_ARGS, "[TOOL_CALLS]"),
        (CHAT_TEMPLATE, "<tool_call>"),
    ],
    ids=["hermes", "mistral", "mistral_args", "no tools in the template"],
)
def test_auto_is_text_until_the_model_begins_a_call(start: Start, template: str, special: str):
    """The opening mark is one special token, so that a bias can make the model like it."""
    web, llm = start(template, special)
    found = []
    for seed in range(3):
        bias = closing_bias(llm) | {"2": 14.0}
        fields = {"tools": TOOLS, "seed": seed, "max_tokens": 110, "logit_bias": bias, "logprobs": True}
        fields["parallel_tool_calls"] = seed > 0
        llm.reset_prefix_cache()
        body = web.chat(ASK, **fields).body
        llm.reset_prefix_cache()
        reply = web.chat(ASK, stream=True, **fields)
        choice = whole(body["choices"][0])
        assert [without_ids(one) for one in folded(reply)] == [without_ids(choice)]
        entries = [
            e for chunk in reply.events[:-1] for c in chunk["choices"] for e in (c["logprobs"] or {}).get("content", ())
        ]
        assert entries == body["choices"][0]["logprobs"]["content"] and len(entries) >= 5
        check_calls(choice)
        assert special not in choice["content"] and "<|" not in choice["content"]
        assert choice["finish_reason"] in ("tool_calls", "length")
        found.append(choice)
    assert any(choice["finish_reason"] == "tool_calls" for choice in found)
    assert any(choice["content"] for choice in found) and all(choice["tool_calls"] for choice in found)


def test_auto_may_be_text(start: Start):
    web, _ = start()
    for fields in ({"tools": TOOLS}, {"tools": TOOLS, "tool_choice": "auto"}, {"tools": TOOLS, "tool_choice": None}):
        body = web.chat(ASK, max_tokens=6, temperature=0, **fields).body
        message = body["choices"][0]["message"]
        assert isinstance(message["content"], str) and "tool_calls" not in message
        assert body["choices"][0]["finish_reason"] == "length"


def test_none_is_as_if_there_were_no_tools(start: Start):
    web, _ = start()
    fields = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}
    expected = web.chat(ASK, **fields).body
    body = web.chat(ASK, tools=TOOLS, tool_choice="none", **fields).body
    assert (
        body["choices"] == expected["choices"] and body["usage"]["prompt_tokens"] == expected["usage"]["prompt_tokens"]
    )
    assert web.chat(ASK, tools=TOOLS, **fields).body["usage"]["prompt_tokens"] > expected["usage"]["prompt_tokens"]
    assert web.chat(ASK, tools=[], tool_choice="auto", **fields).body["choices"] == expected["choices"]


def test_a_form_of_the_text_leaves_calls_alone(start: Start):
    web, llm = start(HERMES, "<tool_call>")
    form = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["yes", "no"]}}}}
    fields = {"tools": TOOLS, "max_tokens": 200, "seed": 3, **form}
    likes_calls = closing_bias(llm) | {"2": 30.0}
    assert whole(web.chat(ASK, logit_bias=likes_calls, **fields).body["choices"][0])["tool_calls"]
    text = whole(web.chat(ASK, logit_bias={"2": -100}, **fields).body["choices"][0])
    assert json.loads(text["content"]) in ("yes", "no") and not text["tool_calls"]
    web, _ = start(FAMILIES["llama3_json"])
    assert web.chat(ASK, **fields).error["param"] == "tools"


# ------------------------------------------------------------------ cut answers
@pytest.mark.parametrize("tool_choice", ["required", NAMED], ids=["required", "named"])
def test_every_length_parses_or_says_length(start: Start, tool_choice: Any):
    web, llm = start()
    for max_tokens in range(1, 90, 13):
        fields = {"tools": TOOLS, "tool_choice": tool_choice, "seed": 5, "logit_bias": closing_bias(llm)}
        choice = whole(web.chat(ASK, max_tokens=max_tokens, **fields).body["choices"][0])
        check_calls(choice)
        llm.reset_prefix_cache()
        streamed = folded(web.chat(ASK, max_tokens=max_tokens, stream=True, **fields))
        assert without_ids(streamed[0]) == without_ids(choice)


def test_a_stop_text_inside_of_a_call_cuts_it_and_says_so(start: Start):
    web, llm = start()
    fields = {"tools": [TOOLS[0]], "tool_choice": "required", "logit_bias": closing_bias(llm), "seed": 2}
    choice = whole(web.chat(ASK, stop=['"days'], max_tokens=200, **fields).body["choices"][0])
    assert choice["finish_reason"] == "length" and choice["tool_calls"][0]["arguments"].startswith('{"city"')


# ------------------------------------------------------------------ what the model sees
CALLED = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Ulm"}'}}
HISTORY: list[dict[str, Any]] = [
    {"role": "developer", "content": "be brief"},
    *ASK,
    {"role": "assistant", "content": None, "tool_calls": [CALLED, {**CALLED, "id": "call_2"}]},
    {"role": "tool", "tool_call_id": "call_1", "content": "7 C"},
    {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "8 C"}]},
]


def prompt_text(web: Web, llm: LLM, messages: Any, **fields: Any) -> str:
    body = web.chat(messages, max_tokens=1, return_token_ids=True, **fields).body
    return llm.llm_engine.decode(body["prompt_token_ids"], skip_special_tokens=False)


@pytest.mark.parametrize("content", ["", None], ids=["empty", "null"])
def test_a_template_with_tools_gets_them_as_objects(start: Start, content: Any):
    web, llm = start(HERMES)
    messages = [*HISTORY[:2], {**HISTORY[2], "content": content}, *HISTORY[3:]]
    text = prompt_text(web, llm, messages, tools=TOOLS)
    assert "get_weather now " in text and "CALL get_weather [('city', 'Ulm')] call_1" in text and "8 Ccall_2" in text
    assert "system\nbe brief" in text
    assert "now" not in prompt_text(web, llm, ASK, tools=TOOLS, tool_choice=NAMED)


def test_mistrals_template_gets_ids_that_it_takes(start: Start):
    web, llm = start(MISTRAL)
    text = prompt_text(web, llm, HISTORY, tools=TOOLS)
    shown = text.split("[('city', 'Ulm')] ")[1].split("CALL")[0]
    assert len(shown) == 9 and shown.isalnum() and f"7 C{shown}" in text
    again = prompt_text(
        web, llm, [*HISTORY[:2], {**HISTORY[2], "tool_calls": [{**CALLED, "id": "abcdef123"}]}], tools=TOOLS
    )
    assert "abcdef123" in again


def test_a_template_without_tools_gets_them_as_text(start: Start):
    web, llm = start(CHAT_TEMPLATE)
    text = prompt_text(web, llm, HISTORY, tools=TOOLS)
    system, user, call, result = (turn.split("\n", 1) for turn in text.split("<|im_start|>")[1:5])
    assert system[0] == "system" and system[1].startswith("be brief\n\n# Tools\n") and json.dumps(TOOLS[0]) in system[1]
    assert call[1].count('<tool_call>\n{"name": "get_weather", "arguments": {"city": "Ulm"}}\n</tool_call>') == 2
    assert result[0] == "user"
    assert result[1].startswith("<tool_response>\n7 C\n</tool_response>\n<tool_response>\n8 C\n</tool_response>")
    assert "# Tools" not in prompt_text(web, llm, HISTORY) and "7 C" in prompt_text(web, llm, HISTORY)


def test_a_model_without_a_system_role_is_told_by_the_user(start: Start):
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    web, llm = start(refuses + CHAT_TEMPLATE)
    text = prompt_text(web, llm, ASK, tools=TOOLS)
    assert text.startswith("<|im_start|>user\n# Tools") and text.count("weather?") == 1


# ------------------------------------------------------------------ loops
@contextlib.contextmanager
def listening(web: Web) -> Iterator[openai.OpenAI]:
    """A client of the same application behind a socket."""
    server = make_server(web.service.engine, ServerConfig(port=0, served_model_names=("tiny",), poll_seconds=0.02))
    server.start()
    try:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            yield client
    finally:
        server.drain(5.0)
        server.stop()


@pytest.mark.parametrize("template", [HERMES, CHAT_TEMPLATE], ids=["tools in the template", "none"])
def test_two_steps_with_the_openai_client(start: Start, template: str):
    """Its pydantic models take every answer, and what it gives back is taken as history."""
    web, llm = start(template)
    bias = {int(token): value for token, value in closing_bias(llm).items()}
    options: dict[str, Any] = {"model": "tiny", "tools": TOOLS, "max_tokens": 150, "seed": 3, "logit_bias": bias}
    messages: list[Any] = list(ASK)
    with listening(web) as client:
        with client.chat.completions.stream(messages=messages, tool_choice=NAMED, **options) as stream:
            for _ in stream:
                pass
            message = stream.get_final_completion().choices[0].message
        (call,) = message.tool_calls or ()
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS["get_weather"])
        messages += [message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": "7 C"}]
        answer = client.chat.completions.create(messages=messages, tool_choice="none", **options)
        assert answer.choices[0].message.content is not None and not answer.choices[0].message.tool_calls


# ------------------------------------------------------------------ schemas
@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        (None, {"type": "object", "properties": {}, "additionalProperties": False}),
        ({}, {"type": "object"}),
        ({"properties": {"a": {}}}, {"properties": {"a": {}}, "type": "object", "additionalProperties": False}),
        ({"properties": {}, "additionalProperties": True}, {"properties": {}, "additionalProperties": True}),
        ({"properties": {}, "anyOf": [{}]}, {"properties": {}, "anyOf": [{}], "type": "object"}),
    ],
    ids=["none", "any", "declared", "open", "elsewhere"],
)
def test_arguments_are_an_object_with_what_is_declared(parameters: Any, expected: dict[str, Any]):
    choice = read_choice([tool("f", parameters)], "auto", True)
    assert choice.schemas["f"] == ({"type": "object", **expected}, "tools[0].function.parameters")


# ------------------------------------------------------------------ refusals
BAD_SCHEMA = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"tools": [tool("a b")]}, "tools", "tools[0].function.name"),
        ({"tools": [tool("")]}, "tools", "tools[0].function.name"),
        ({"tools": [tool("a"), tool("a")]}, "tools", "tools[1].function.name"),
        ({"tools": [tool(f"t{i}") for i in range(129)]}, "tools", "128"),
        ({"tools": [{"type": "web_search"}]}, "tools", "function"),
        ({"tools": [tool("f", {"type": "array"})]}, "tools", "tools[0].function.parameters.type"),
        ({"tools": [tool("f"), tool("g", BAD_SCHEMA)]}, "tools", "tools[1].function.parameters"),
        ({"tools": [tool("g", {"properties": {"a": {"pattern": "("}}})]}, "tools", "tools[0].function.parameters"),
        ({"tools": [tool("g", {"$ref": "http://x/y"})]}, "tools", "tools[0].function.parameters"),
        ({"tools": [tool("g", {"type": "object", "enum": []})]}, "tools", "tools"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tool_choice": NAMED}, "tool_choice", "needs tools"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice", "must be"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice", "must be"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "not among"),
        ({"tools": TOOLS, "use_beam_search": True, "n": 2}, "tools", "beams"),
        ({"functions": [{"name": "f"}]}, "functions", "functions"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_what_cannot_be_honoured_is_a_400_also_for_a_stream(
    start: Start, fields: dict[str, Any], param: str, says: str
):
    web, _ = start()
    for stream in ({}, {"stream": True}):
        reply = web.post(CHAT, messages=ASK, **stream, **fields)
        assert (reply.status, reply.error["param"]) == (400, param)
        assert says in reply.error["message"] and "structured_outputs" not in reply.error["message"]


def test_a_schema_that_keywords_cannot_say_is_refused(start: Start):
    web, _ = start(FAMILIES["pythonic"])
    for parameters in ({"properties": {"a-b": {}}}, {"anyOf": [{"type": "object"}]}, {"required": ["z"]}):
        error = web.chat(ASK, tools=[tool("f", parameters)]).error
        assert error["param"] == "tools" and "tools[0].function.parameters cannot be written" in error["message"]


def test_bad_messages_are_named_where_the_caller_has_them(start: Start):
    for template in (HERMES, CHAT_TEMPLATE):
        web, _ = start(template)
        for bad in ({"role": "tool", "tool_call_id": "x"}, {"role": "assistant", "content": "", "tool_calls": [3]}):
            error = web.chat([*ASK, bad], tools=TOOLS).error
            assert error["param"] == "messages" and "messages[1]" in error["message"]


def test_the_servers_setting_wins(start: Start):
    web, llm = start(HERMES, tool_call_parser="pythonic")
    fields = {"tools": [TOOLS[1]], "tool_choice": "required", "max_tokens": 40, "return_token_ids": True}
    choice = web.chat(ASK, logit_bias=closing_bias(llm), **fields).body["choices"][0]
    assert llm.llm_engine.decode(choice["token_ids"]).startswith("[now()")
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "now", "arguments": "{}"}
