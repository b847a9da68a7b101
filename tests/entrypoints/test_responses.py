"""POST /v1/responses and what is remembered: whole = stream, multi-turn, bad input, failures, other ends."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from minivllm import LLM, AsyncEngine, SamplingParams
from minivllm.entrypoints import responses
from minivllm.entrypoints.protocol import ChatRequest, CompletionRequest, ResponsesRequest, field_states
from minivllm.entrypoints.service import ServerConfig
from minivllm.entrypoints.turn import ContentDelta, Delta, MessageReader, ReasoningDelta, ToolCallDelta, Turn
from tests.engine.test_async_engine import Gate, settle
from tests.entrypoints.helpers import HELLO, PATIENCE, Web, eventually
from tests.entrypoints.response_helpers import (
    GREEDY,
    RESPONSES,
    assert_complete,
    checked,
    named_events,
    nameless,
    streamed,
    text_of,
)
from tests.entrypoints.test_chat import break_steps

HI = "what is the capital"  # the same as HELLO
LOGPROBS = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}


def create(web: Web, items: Any = HI, **fields: Any) -> dict[str, Any]:
    """A whole response."""
    reply = web.post(RESPONSES, input=items, **{**GREEDY, **fields})
    assert reply.status == 200, reply.text
    assert_complete(reply.body)
    return reply.body


# ------------------------------------------------------------------ whole
def test_the_answer_is_the_engines_own(llm: LLM, engine: AsyncEngine):
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    expected = list(engine.submit(llm.llm_engine.render_chat(HELLO), params))[-1]
    llm.reset_prefix_cache()
    response = create(Web(engine))
    (item,) = response["output"]
    assert item["content"][0]["text"] == expected.outputs[0].text
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "incomplete")
    assert response["incomplete_details"] == {"reason": "max_output_tokens"} and response["status"] == "incomplete"
    num_prompt = len(expected.prompt_token_ids)
    assert response["usage"] == {
        "input_tokens": num_prompt,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": num_prompt // 16 * 16},
        "output_tokens": 8,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": num_prompt + 8,
    }
    details = create(Web(engine))["usage"]["input_tokens_details"]
    assert details == {"cached_tokens": num_prompt // 16 * 16, "cache_write_tokens": 0}


def test_an_answer_that_ends_by_itself_is_completed(web: Web):
    response = create(web, stop=["e", "a", "t"], max_output_tokens=60, temperature=1.5, seed=1)
    assert response["status"] == response["output"][0]["status"] == "completed" and response["completed_at"]


def test_an_answer_without_words_is_an_empty_message(web: Web, llm: LLM):
    """Clients read output[0].content[0].text."""
    (eos,) = sorted(llm.llm_engine.eos_token_ids)[:1]
    fields = {"allowed_token_ids": [eos], "ignore_eos": False, **LOGPROBS}
    response = create(web, **fields)
    assert response["output"][0]["content"][0]["text"] == "" and response["status"] == "completed"
    assert len(response["output"][0]["content"][0]["logprobs"]) == response["usage"]["output_tokens"] == 1
    assert nameless(streamed(web.post(RESPONSES, input=HI, stream=True, **{**GREEDY, **fields}))) == nameless(response)


def test_what_was_asked_for_comes_back(web: Web):
    asked = {
        "metadata": {"a": "b"},
        "user": "me",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "max_tool_calls": 3,
        "reasoning": {"effort": "low", "summary": None},
        "instructions": "be brief",
        "temperature": 0.5,
        "top_p": 0.5,
        "truncation": "disabled",
        "parallel_tool_calls": False,
        "max_output_tokens": 4,
        "text": {"format": {"type": "text"}, "verbosity": "low"},
    }
    reply = web.post(RESPONSES, input=HI, service_tier="auto", store=False, **asked)
    assert {name: reply.body[name] for name in asked} == asked
    assert (reply.body["service_tier"], reply.body["store"]) == ("default", False)
    assert "X-Minivllm-Ignored" not in reply.headers
    plain = create(web)
    assert (plain["store"], plain["tool_choice"], plain["tools"]) == (True, "auto", [])
    assert plain["text"] == {"format": {"type": "text"}, "verbosity": "medium"} and plain["metadata"] == {}


def test_unknown_fields_are_named_and_less_than_asked_for_is_said(web: Web):
    for stream in ({}, {"stream": True}):
        reply = web.post(RESPONSES, input=HI, temprature=1, max_output_tokens=5000, ignore_eos=True, **stream)
        assert reply.headers["X-Minivllm-Ignored"] == "temprature"
        assert reply.headers["X-Minivllm-Clamped"].startswith("max_tokens=")


def test_instructions_and_roles_reach_the_model(web: Web):
    """The same conversation, said in two ways, is the same prompt as chat's."""
    chat = web.chat([{"role": "system", "content": "be brief"}, *HELLO], temperature=0, max_tokens=8, ignore_eos=True)
    expected = chat.body["choices"][0]["message"]["content"]
    system = {"role": "system", "content": "be brief"}
    user = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": HI}]}
    for text, fields in (
        (HI, {"instructions": "be brief"}),
        ([user], {"instructions": "be brief"}),
        ([system, user], {}),
    ):
        response = create(web, text, **fields)
        assert text_of(response) == expected
        assert response["usage"]["input_tokens"] == chat.body["usage"]["prompt_tokens"]
    assert text_of(create(web)) != expected


def test_the_sampling_fields_of_the_other_endpoints_work(web: Web):
    fields = {"temperature": 1.3, "seed": 5, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.2, "ignore_eos": True}
    chat = web.chat(HELLO, max_tokens=12, **fields).body["choices"][0]["message"]["content"]
    assert text_of(create(web, max_output_tokens=12, **fields)) == chat
    assert text_of(create(web, max_output_tokens=12, **{**fields, "seed": 6})) != chat
    assert text_of(create(web, guided_choice=["yes", "no"], ignore_eos=False)) in ("yes", "no")


SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}


@pytest.mark.parametrize("strict", [True, False])
def test_text_format_makes_the_answer_follow_the_schema(web: Web, strict: bool):
    """Also when it is not strict: a small model would not follow it by itself."""
    form = {"type": "json_schema", "name": "response", "schema": SCHEMA, "strict": strict}
    fields = {"text": {"format": form}, "temperature": 1.5, "seed": 3, "max_output_tokens": 30, "ignore_eos": False}
    response = create(web, **fields)
    assert json.loads(text_of(response))["a"] in (1, 2) and response["status"] == "completed"
    assert response["text"]["format"] == form
    assert nameless(streamed(web.post(RESPONSES, input=HI, stream=True, **fields))) == nameless(response)


def test_logprobs_are_in_the_part_and_only_on_request(web: Web):
    (part,) = create(web, **LOGPROBS)["output"][0]["content"]
    assert len(part["logprobs"]) == 8 and all(len(entry["top_logprobs"]) == 2 for entry in part["logprobs"])
    assert "".join(bytes(entry["bytes"]).decode("utf-8", "replace") for entry in part["logprobs"]) == part["text"]
    assert create(web)["output"][0]["content"][0]["logprobs"] == []
    only = create(web, include=LOGPROBS["include"])
    assert all(entry["top_logprobs"] == [] for entry in only["output"][0]["content"][0]["logprobs"])
    assert only["top_logprobs"] == 0


# ------------------------------------------------------------------ streams
VARIANTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "logprobs": LOGPROBS,
    "halves": {"temperature": 1.7, "seed": 8, "max_output_tokens": 40, **LOGPROBS},
    "stop": {"temperature": 1.5, "seed": 1, "max_output_tokens": 60, "stop": ["e", "the"], **LOGPROBS},
    "one token": {"max_output_tokens": 1},
    "not stored": {"store": False},
}


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_stream_is_the_whole_answer_in_pieces(web: Web, llm: LLM, fields: dict[str, Any]):
    whole = create(web, **fields)
    llm.reset_prefix_cache()
    response = streamed(web.post(RESPONSES, input=HI, stream=True, **{**GREEDY, **fields}))
    assert nameless(response) == nameless(whole)
    assert response["usage"]["total_tokens"] == whole["usage"]["total_tokens"]


class ByPosition(MessageReader):
    """A model that thinks, speaks and calls twice, whatever it really says: by the number of characters."""

    def __init__(self) -> None:
        super().__init__()
        self._num_chars = 0

    def advance(self, text: str, is_last: bool) -> list[Delta]:
        deltas: list[Delta] = []
        for char in text:
            number, self._num_chars = self._num_chars, self._num_chars + 1
            if number < 4:
                deltas.append(ReasoningDelta(char))
            elif number < 8:
                deltas.append(ContentDelta(char))
            else:
                index = 0 if number < 11 else 1
                first = {"id": f"call_{index}", "name": "fg"[index]} if number in (8, 11) else {}
                deltas.append(ToolCallDelta(index, char, **first))
        return deltas


@pytest.fixture
def versatile(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every answer thinks, speaks and calls; what was asked of the turn is collected."""
    asked: list[Any] = []
    begin = responses.begin_turn

    class Versatile(Turn):
        def new_reader(self) -> MessageReader:
            return ByPosition()

    def begin_turn(service: Any, messages: Any, **options: Any) -> Turn:
        asked.append((messages, options))
        turn = begin(service, messages[:1])  # the context is short
        return Versatile(turn.prompt, turn.sampling_fields)

    monkeypatch.setattr(responses, "begin_turn", begin_turn)
    return asked


TOOLS = [
    {"type": "function", "name": name, "description": "d", "parameters": {"type": "object", "properties": {}}}
    for name in "fg"
]


def test_thinking_words_and_calls_are_items_in_a_stream_and_whole(web: Web, versatile: list[Any]):
    fields = {"max_output_tokens": 20, "tools": TOOLS, "tool_choice": {"type": "function", "name": "f"}}
    whole = create(web, **fields, parallel_tool_calls=False)
    kinds = [item["type"] for item in whole["output"]]
    assert kinds == ["reasoning", "message", "function_call", "function_call"]
    assert [item["status"] for item in whole["output"]] == ["completed"] * 3 + ["incomplete"]
    assert whole["output"][0]["summary"] == [] and len(whole["output"][0]["content"][0]["text"]) == 4
    assert 0 < whole["usage"]["output_tokens_details"]["reasoning_tokens"] <= 4
    stream = streamed(web.post(RESPONSES, input=HI, stream=True, parallel_tool_calls=False, **{**GREEDY, **fields}))
    assert nameless(stream) == nameless(whole)
    _, options = versatile[0]
    assert options["tools"][0] == {"type": "function", "function": {k: v for k, v in TOOLS[0].items() if k != "type"}}
    assert options["tool_choice"] == {"type": "function", "function": {"name": "f"}}
    assert options["parallel_tool_calls"] is False
    assert whole["tools"][0] == {**TOOLS[0], "strict": None} and whole["tool_choice"] == fields["tool_choice"]


def test_a_cut_call_says_that_it_is_cut(web: Web, versatile: list[Any]):
    """Clients must not run it; a call without a status is lost in some of them, and an error in others."""
    events = named_events(web.post(RESPONSES, input=HI, stream=True, **{**GREEDY, "max_output_tokens": 20}).text)
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert [item["status"] for item in done if item["type"] == "function_call"] == ["completed", "incomplete"]
    assert checked(events)["status"] == "incomplete"


def test_the_logprobs_of_thinking_and_calls_are_nobodys(web: Web, versatile: list[Any]):
    response = streamed(web.post(RESPONSES, input=HI, stream=True, **{**GREEDY, **LOGPROBS, "max_output_tokens": 20}))
    (part,) = (item["content"][0] for item in response["output"] if item["type"] == "message")
    assert 0 < len(part["logprobs"]) < 12


def test_the_first_events_leave_before_the_engine_has_done_anything(gate: Gate, engine: AsyncEngine):
    web = Web(engine, ServerConfig(keep_alive_seconds=0.0, poll_seconds=0.001))
    response = web.streamed(RESPONSES, input=HI, **GREEDY)
    pieces = response.iter_encoded()
    first = next(pieces).decode()
    assert first.startswith("event: response.created\n") and "event: response.in_progress\n" in first
    assert next(pieces) == next(pieces) == b": keep-alive\n\n"
    gate.open()
    rest = b"".join(pieces).decode()
    assert checked(named_events(first + rest))["status"] == "incomplete"
    response.close()


# ------------------------------------------------------------------ more than one turn
def test_an_earlier_answer_is_continued(web: Web):
    """By its id, by references, or by sending everything: one prompt, one answer."""
    first = create(web, max_output_tokens=6)
    assert web.get(f"{RESPONSES}/{first['id']}").body == first
    by_id = create(web, "and then", previous_response_id=first["id"])
    user = {"role": "user", "content": HI}
    again = {"role": "user", "content": [{"type": "input_text", "text": "and then"}]}
    reference = {"type": "item_reference", "id": first["output"][0]["id"]}
    said = {"role": "assistant", "content": [{"type": "output_text", "text": text_of(first)}]}
    others = [create(web, [user, item, again]) for item in (reference, first["output"][0], said)]
    chat = web.chat(
        [user, {"role": "assistant", "content": text_of(first)}, {"role": "user", "content": "and then"}],
        temperature=0,
        max_tokens=8,
        ignore_eos=True,
    ).body
    assert {text_of(response) for response in (by_id, *others)} == {chat["choices"][0]["message"]["content"]}
    assert {r["usage"]["input_tokens"] for r in (by_id, *others)} == {chat["usage"]["prompt_tokens"]}
    assert by_id["previous_response_id"] == first["id"]
    third = create(web, "go on", previous_response_id=by_id["id"], max_output_tokens=2)  # two turns back
    assert third["usage"]["input_tokens"] > by_id["usage"]["total_tokens"]


def test_a_chain_survives_the_loss_of_its_first_links(web: Web):
    first = create(web, max_output_tokens=2)
    second = create(web, "b", previous_response_id=first["id"], max_output_tokens=2)
    assert web.call("DELETE", f"{RESPONSES}/{first['id']}").body == {
        "id": first["id"],
        "object": "response",
        "deleted": True,
    }
    third = create(web, "c", previous_response_id=second["id"], max_output_tokens=2)
    assert third["usage"]["input_tokens"] > second["usage"]["total_tokens"]
    for path, method in ((first["id"], "GET"), (first["id"], "DELETE"), (f"{first['id']}/cancel", "POST")):
        reply = web.call(method, f"{RESPONSES}/{path}")
        assert (reply.status, reply.error["param"]) == (404, "response_id")


def test_instructions_are_not_carried_over(web: Web):
    plain = create(web, max_output_tokens=2)
    told = create(web, max_output_tokens=2, instructions="be brief")
    nexts = [create(web, "b", previous_response_id=one["id"], max_output_tokens=2) for one in (plain, told)]
    longer = create(web, "b", previous_response_id=plain["id"], instructions="be brief", max_output_tokens=2)
    extra = nexts[1]["usage"]["input_tokens"] - nexts[0]["usage"]["input_tokens"]
    assert abs(extra) <= 4  # the two answers differ, the prompts have no instructions
    assert longer["usage"]["input_tokens"] > nexts[0]["usage"]["input_tokens"] + 4


def test_calls_and_their_results_are_continued(web: Web, versatile: list[Any]):
    """The step loop of a client: call, result, answer; with inline items and with references."""
    first = create(web, max_output_tokens=20)
    call = first["output"][2]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "5"}
    other = {**result, "call_id": first["output"][3]["call_id"]}
    references = [{"type": "item_reference", "id": item["id"]} for item in first["output"]]
    user = {"role": "user", "content": HI}
    create(web, [result, other], previous_response_id=first["id"], max_output_tokens=1)
    create(web, [user, *references, result, other], max_output_tokens=1)
    create(web, [user, *first["output"], result, other], max_output_tokens=1)
    conversations = [messages for messages, _ in versatile[1:]]
    assert conversations[0] == conversations[1] == conversations[2]
    assert [message["role"] for message in conversations[0]] == ["user", "assistant", "tool", "tool"]
    assistant = conversations[0][1]
    assert [call["id"] for call in assistant["tool_calls"]] == ["call_0", "call_1"]
    assert len(assistant["content"]) == len(assistant["reasoning_content"]) == 4


def test_truncation_drops_the_oldest_turns_and_says_so(web: Web):
    """As few as need be; never a part of one, and never what the system said."""
    said = [{"role": role, "content": f"{'word ' * 8}{n}"} for n in range(6) for role in ("user", "assistant")]
    items = [{"role": "system", "content": "be brief"}, *said, {"role": "user", "content": "go on"}]
    reply = web.post(RESPONSES, input=items, max_output_tokens=1)
    assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")
    for stream in (False, True):
        reply = web.post(RESPONSES, input=items, truncation="auto", max_output_tokens=1, stream=stream)
        name, number = reply.headers["X-Minivllm-Truncated"].split("=")
        num_dropped = int(number)
        assert name == "turns" and 1 <= num_dropped <= 6
        response = streamed(reply) if stream else reply.body
        rest = [items[0], *items[1 + 2 * num_dropped :]]
        expected = create(web, rest, max_output_tokens=1)
        assert response["usage"]["input_tokens"] == expected["usage"]["input_tokens"]
        more = [items[0], *items[1 + 2 * (num_dropped - 1) :]]
        assert web.post(RESPONSES, input=more).status == 400
    reply = web.post(RESPONSES, input=rest, truncation="auto", max_output_tokens=1)
    assert reply.status == 200 and "X-Minivllm-Truncated" not in reply.headers


def test_truncation_leaves_alone_what_just_fits(web: Web, llm: LLM):
    """One token of room is room."""
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    room = llm.llm_engine.config.model.max_model_len - create(web, [*said, said[0]])["usage"]["input_tokens"]
    items = [*said, {"role": "user", "content": "a" + "\x01" * (room - 1)}]  # a character that is always one token
    reply = web.post(RESPONSES, input=items, truncation="auto", **GREEDY)
    assert reply.body["usage"]["input_tokens"] == llm.llm_engine.config.model.max_model_len - 1
    assert "X-Minivllm-Truncated" not in reply.headers
    items[-1]["content"] += "\x01"
    assert web.post(RESPONSES, input=items, truncation="auto").headers["X-Minivllm-Truncated"] == "turns=1"


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_not_stored_is_not_found(web: Web, stream: bool):
    """store: false is the client's word; a limit of nothing is the server's."""
    for site, fields in ((web, {"store": False}), (Web(web.service.engine, ServerConfig(max_stored_responses=0)), {})):
        reply = site.post(RESPONSES, input=HI, stream=stream, **{**GREEDY, **fields})
        response = streamed(reply) if stream else reply.body
        assert response["store"] is False and site.service.responses.num_responses == 0
        assert site.get(f"{RESPONSES}/{response['id']}").status == 404
        reference = {"type": "item_reference", "id": response["output"][0]["id"]}
        for body, param in (
            ({"input": "x", "previous_response_id": response["id"]}, "previous_response_id"),
            ({"input": [reference]}, "input"),
        ):
            reply = site.post(RESPONSES, **body)
            assert (reply.status, reply.error["param"]) == (404, param)
            assert (reference["id"] if param == "input" else response["id"]) in reply.error["message"]


def test_the_store_is_bounded(engine: AsyncEngine):
    web = Web(engine, ServerConfig(max_stored_responses=3))
    made = [create(web, max_output_tokens=1)["id"] for _ in range(5)]
    assert web.service.responses.num_responses == web.service.responses.num_items == 3
    assert [web.get(f"{RESPONSES}/{name}").status for name in made] == [404, 404, 200, 200, 200]


# ------------------------------------------------------------------ bad input
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no input": ({"input": None}, "input"),
    "empty input": ({"input": []}, "input"),
    "number": ({"input": 5}, "input"),
    "image": ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
    "unknown item": ({"input": [{"type": "mcp_call"}]}, "input"),
    "too long": ({"input": "word " * 200}, "input"),
    "lone output": ({"input": [{"type": "function_call_output", "call_id": "x", "output": "5"}]}, "input"),
    "instructions list": ({"instructions": ["x"]}, "instructions"),
    "zero tokens": ({"max_output_tokens": 0}, "max_output_tokens"),
    "text tokens": ({"max_output_tokens": "5"}, "max_output_tokens"),
    "min above max": ({"min_tokens": 9}, "min_tokens"),
    "temperature": ({"temperature": 3}, "temperature"),
    "top_p": ({"top_p": 0}, "top_p"),
    "stop": ({"stop": ["a"] * 5}, "stop"),
    "top_logprobs alone": ({"top_logprobs": 2}, "top_logprobs"),
    "top_logprobs 21": ({"include": LOGPROBS["include"], "top_logprobs": 21}, "top_logprobs"),
    "negative top_logprobs": ({"include": LOGPROBS["include"], "top_logprobs": -1}, "top_logprobs"),
    "include": ({"include": ["file_search_call.results"]}, "include"),
    "include number": ({"include": [5]}, "include"),
    "background": ({"background": True}, "background"),
    "conversation": ({"conversation": "conv_1"}, "conversation"),
    "prompt": ({"prompt": {"id": "pmpt_1"}}, "prompt"),
    "newest turn too long": ({"truncation": "auto", "input": "word " * 200}, "input"),
    "truncation word": ({"truncation": "some"}, "truncation"),
    "hosted tool": ({"tools": [{"type": "web_search"}]}, "tools"),
    "chat's tool": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    "tool_choice": ({"tool_choice": {"type": "file_search"}}, "tool_choice"),
    "text.format": ({"text": {"format": {"type": "xml"}}}, "text.format"),
    "schema": ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "moon"}}}}, "text.format"),
    "text key": ({"text": {"fromat": {}}}, "text"),
    "verbosity": ({"text": {"verbosity": "loud"}}, "text"),
    "two forms": ({"text": {"format": {"type": "json_object"}}, "guided_choice": ["a"]}, "guided_choice"),
    "guided": ({"guided_regex": "("}, "guided_regex"),
    "metadata number": ({"metadata": {"a": 1}}, "metadata"),
    "metadata pairs": ({"metadata": {f"k{i}": "" for i in range(17)}}, "metadata"),
    "metadata value": ({"metadata": {"k": "x" * 513}}, "metadata"),
    "stream_options": ({"stream_options": {"include_obfuscation": False}, "stream": False}, "stream_options"),
    "obfuscation": ({"stream_options": {"include_obfuscation": True}, "stream": True}, "stream_options"),
    "messages": ({"messages": HELLO}, "messages"),
    "max_tokens": ({"max_tokens": 5}, "max_tokens"),
    "n": ({"n": 2}, "n"),
    "response_format": ({"response_format": {"type": "json_object"}}, "response_format"),
    "logprobs": ({"logprobs": True}, "logprobs"),
    "cache_salt": ({"cache_salt": ""}, "cache_salt"),
    "chat_template_kwargs": ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
}


@pytest.mark.parametrize(("fields", "param"), BAD.values(), ids=BAD.keys())
def test_a_bad_request_is_a_400_that_names_the_field_also_for_a_stream(web: Web, fields: dict[str, Any], param: str):
    """And nothing of it is remembered."""
    for stream in ({}, {"stream": True}):
        reply = web.post(RESPONSES, **{"input": HI, "max_output_tokens": 8, **stream, **fields})
        assert (reply.status, reply.error["param"]) == (400, param)
    assert web.service.responses.num_responses == 0


def test_an_unknown_id_or_model_is_a_404(web: Web):
    reply = web.post(RESPONSES, input=HI, previous_response_id="resp_x", stream=True)
    assert (reply.status, reply.error["param"], reply.error["code"]) == (
        404,
        "previous_response_id",
        "response_not_found",
    )
    assert (web.post(RESPONSES, input=HI, model="other").status, web.get(f"{RESPONSES}/x").status) == (404, 404)


def test_advice_names_the_field_that_is_meant(web: Web):
    assert "max_output_tokens" in web.post(RESPONSES, input=HI, max_tokens=5).error["message"]
    assert "text.format" in web.post(RESPONSES, input=HI, response_format={"type": "json_object"}).error["message"]
    assert web.post(RESPONSES, input=HI, max_output_tokens=1, n=1, background=False, max_tokens=None).status == 200


def test_too_long_says_so(web: Web):
    assert web.post(RESPONSES, input="word " * 200).error["code"] == "context_length_exceeded"


def test_capabilities_say_what_only_comes_back():
    states = field_states(ResponsesRequest)
    assert states["metadata"] == states["reasoning"] == "no-op" and states["input"] == "implemented"
    assert states["background"] == states["conversation"] == states["max_tokens"] == "refused"


def test_no_field_of_the_other_endpoints_is_merely_ignored():
    states = field_states(ResponsesRequest)
    assert set(states) >= ChatRequest.model_fields.keys() | CompletionRequest.model_fields.keys()


def test_events_of_an_answer_are_not_sent_twice(web: Web):
    name = create(web)["id"]
    for query, param in (("stream=true", "stream"), ("starting_after=3", "starting_after")):
        reply = web.get(f"{RESPONSES}/{name}?{query}")
        assert (reply.status, reply.error["param"]) == (400, param)
    reply = web.get(f"{RESPONSES}/{name}?stream=false&include[]=message.output_text.logprobs")
    assert reply.status == 200 and "X-Minivllm-Ignored" not in reply.headers
    assert (
        web.get(f"{RESPONSES}/{name}?strem=true&a%0d%0aX-Evil:1").headers["X-Minivllm-Ignored"] == "a??X-Evil?1, strem"
    )


# ------------------------------------------------------------------ while it runs
def begin(web: Web, gate: Gate, num_steps: int = 3, **fields: Any) -> tuple[Any, Any, str, str]:
    """A stream in the middle: the reply, what is still to come, what came, the id."""
    response = web.streamed(RESPONSES, input=HI, **{**GREEDY, "max_output_tokens": 40, **fields})
    pieces = response.iter_encoded()
    text = next(pieces).decode()
    gate.wait()
    gate.steps(num_steps)
    while "output_text.delta" not in text:
        text += next(pieces).decode()
    return response, pieces, text, json.loads(text.split("data: ")[1].split("\n")[0])["response"]["id"]


def test_a_running_answer_is_found_and_grows(web: Web, gate: Gate):
    response, pieces, text, name = begin(web, gate)
    running = web.get(f"{RESPONSES}/{name}").body
    assert running["status"] == running["output"][0]["status"] == "in_progress" and text_of(running)
    assert running["usage"] is None
    reply = web.post(RESPONSES, input="x", previous_response_id=name)
    assert (reply.status, reply.error["param"]) == (400, "previous_response_id")
    gate.open()
    final = checked(named_events(text + b"".join(pieces).decode()))
    assert web.get(f"{RESPONSES}/{name}").body == final
    assert text_of(final).startswith(text_of(running)) and len(text_of(final)) > len(text_of(running))
    response.close()


def test_a_stream_can_be_cancelled_from_outside(web: Web, gate: Gate, engine: AsyncEngine):
    response, pieces, text, name = begin(web, gate)
    reply = web.call("POST", f"{RESPONSES}/{name}/cancel")
    assert reply.status == 200 and reply.body["status"] == "cancelled"
    assert_complete(reply.body)
    assert reply.body["output"][0]["status"] == "incomplete"
    gate.open()
    *_, error, last = named_events(text + b"".join(pieces).decode())
    assert (error["type"], error["code"], error["error"]["code"]) == ("error", "499", "499")
    assert (last["type"], last["response"]) == ("response.incomplete", reply.body)
    response.close()
    eventually(lambda: engine.num_unfinished_requests == 0)
    assert web.call("POST", f"{RESPONSES}/{name}/cancel").body == web.get(f"{RESPONSES}/{name}").body == reply.body


def test_the_first_end_is_the_only_one(web: Web, gate: Gate):
    """A step may be on its way while somebody cancels: nothing is told of it, and nothing changes."""
    response, _, _, name = begin(web, gate)
    answer: Any = web.service.responses.get(name, "x").read.__self__  # type: ignore[attr-defined]
    newest = answer._usage.newest[0]
    (completion,) = newest.outputs
    later = dataclasses.replace(completion, text=f"{completion.text}!", token_ids=[*completion.token_ids, 5])
    answer.cancel()
    cancelled = answer.read()
    assert answer.advance(dataclasses.replace(newest, outputs=[later])) == []
    answer.fail(RuntimeError("too late"))
    answer.cancel()
    assert answer.read() == cancelled and cancelled["status"] == "cancelled"
    gate.open()
    response.close()


def test_what_has_ended_cannot_be_cancelled(web: Web):
    response = create(web)
    reply = web.call("POST", f"{RESPONSES}/{response['id']}/cancel")
    assert (reply.status, reply.error["param"]) == (400, "response_id") and "incomplete" in reply.error["message"]
    assert web.get(f"{RESPONSES}/{response['id']}").body == response


def test_a_deleted_stream_is_read_to_its_end_and_does_not_come_back(web: Web, gate: Gate):
    response, pieces, text, name = begin(web, gate)
    assert web.call("DELETE", f"{RESPONSES}/{name}").status == 200
    gate.open()
    assert checked(named_events(text + b"".join(pieces).decode()))["status"] == "incomplete"
    response.close()
    assert web.get(f"{RESPONSES}/{name}").status == 404
    assert web.service.responses.num_items == web.service.responses.num_bytes == 0


def test_what_was_seen_of_a_stream_that_was_left_can_be_referred_to(web: Web, gate: Gate, engine: AsyncEngine):
    """A user presses stop; the next message of the chat refers to what was on the screen."""
    response, _, text, name = begin(web, gate)
    response.close()
    gate.open()
    settle(engine)
    assert engine.num_unfinished_requests == 0
    left = web.get(f"{RESPONSES}/{name}").body
    assert left["status"] == "cancelled" and left["output"][0]["id"] in text and text_of(left)
    reference = {"type": "item_reference", "id": left["output"][0]["id"]}
    assert create(web, [{"role": "user", "content": HI}, reference, {"role": "user", "content": "go on"}])
    assert create(web, "go on", previous_response_id=name)


def test_a_stream_that_nobody_reads_is_given_up(web: Web, gate: Gate, engine: AsyncEngine):
    response = web.streamed(RESPONSES, input=HI, temperature=0, ignore_eos=True)
    assert web.service.responses.num_responses == 1
    response.close()
    gate.open()
    settle(engine)
    assert engine.num_unfinished_requests == 0
    (stored,) = web.service.responses._responses.values()
    assert stored.read()["status"] == "cancelled"


# ------------------------------------------------------------------ failures
def test_a_failed_step_is_a_500_and_nothing_is_remembered(web: Web, llm: LLM, monkeypatch: pytest.MonkeyPatch):
    break_steps(llm, monkeypatch, 0)
    reply = web.post(RESPONSES, input=HI, **GREEDY)
    assert (reply.status, reply.error["type"]) == (500, "internal_error") and "secret" not in reply.text
    assert web.service.responses.num_responses == 0
    monkeypatch.undo()
    assert create(web)


def failed(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The error event and the response of a stream that broke."""
    events = named_events(text)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    *_, error, last = events
    flat = {key: error[key] for key in ("code", "message", "param")}
    assert error["error"] == {"type": error["error"]["type"], **flat} and isinstance(error["code"], str)
    assert last["type"] == "response.failed"
    assert_complete(last["response"])
    assert last["response"]["error"] == {"code": "server_error", "message": error["message"]}
    return error, last["response"]


def test_a_step_that_fails_in_a_stream_is_an_error_and_then_a_failed_response(
    web: Web, llm: LLM, monkeypatch: pytest.MonkeyPatch
):
    """Every generation of clients reads one of the two."""
    break_steps(llm, monkeypatch, 3)
    reply = web.post(RESPONSES, input=HI, stream=True, **GREEDY)
    error, response = failed(reply.text)
    assert (reply.status, error["code"], error["error"]["type"]) == (200, "500", "internal_error")
    assert "secret" not in reply.text and response["output"][0]["status"] == "incomplete"
    assert web.get(f"{RESPONSES}/{response['id']}").body == response


def test_an_accident_in_a_reader_is_an_error_too(web: Web, versatile: list[Any], monkeypatch: pytest.MonkeyPatch):
    def accident(*_: Any) -> list[Delta]:
        raise KeyError("secret")

    monkeypatch.setattr(ByPosition, "advance", accident)
    reply = web.post(RESPONSES, input=HI, stream=True, **GREEDY)
    assert failed(reply.text)[0]["code"] == "500" and "secret" not in reply.text
    assert web.post(RESPONSES, input=HI, **GREEDY).status == 500


def test_an_engine_that_dies_ends_its_streams(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("threading.excepthook", lambda _: None)  # the thread's own death is expected
    gate = Gate(llm, monkeypatch)
    engine = AsyncEngine(llm.llm_engine)
    web = Web(engine)
    response = web.streamed(RESPONSES, input=HI, **GREEDY)
    pieces = response.iter_encoded()
    text = next(pieces).decode()
    gate.wait()

    def die() -> list[Any]:
        raise KeyboardInterrupt("secret")

    monkeypatch.setattr(llm.llm_engine, "step", die)
    gate.open()  # one more real step, then the end
    error, last = failed(text + b"".join(pieces).decode())
    assert (error["code"], error["error"]["type"]) == ("503", "service_unavailable")
    response.close()
    eventually(lambda: not engine.is_alive)
    reply = web.post(RESPONSES, input=HI)
    assert reply.status == 503 and reply.error["type"] == "service_unavailable" and "Retry-After" in reply.headers
    assert web.get(f"{RESPONSES}/{last['id']}").body == last  # what is remembered needs no engine
    for request_id in list(llm.llm_engine.output_processor._parents):
        llm.llm_engine.abort_request(request_id)
    engine._thread.join(PATIENCE)
