"""Tools and thinking through /v1/responses, with real turns: a model whose template knows both, and room for them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minivllm import LLM, AsyncEngine
from minivllm.entrypoints.service import ServerConfig
from tests.entrypoints.helpers import Web
from tests.entrypoints.response_helpers import RESPONSES, assert_complete, nameless, streamed

HI = "what is the capital"
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }} <tool_call><|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['reasoning_content'] %}<think>{{ message['reasoning_content'] }}</think>{% endif %}"
    "{{ message['content'] or '' }}{% for call in message['tool_calls'] %}<tool_call>{{ call['function'] | tojson }}"
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if think %}<think>{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def llm(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """As every test's, with a longer context and the template above."""
    folder = tmp_path_factory.mktemp("tools") / "llama"
    shutil.copytree(tiny_model("llama"), folder)
    for name, fields in (
        ("config.json", {"max_position_embeddings": 1024}),
        ("tokenizer_config.json", {"model_max_length": 1024, "chat_template": TEMPLATE}),
    ):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(settings | fields))
    return LLM(folder, dtype="float32", num_gpu_blocks_override=160, max_num_seqs=2, batch_invariant=True, seed=7)


@pytest.fixture
def web(engine: AsyncEngine) -> Web:
    """The model does not think unless a test lets it."""
    return Web(engine, ServerConfig(served_model_names=("tiny",), reasoning_parser="none"))


def create(web: Web, items: Any = HI, **fields: Any) -> dict[str, Any]:
    """A response, whole and streamed: the same."""
    reply = web.post(RESPONSES, input=items, **fields)
    assert reply.status == 200, reply.text
    assert_complete(reply.body)
    assert nameless(streamed(web.post(RESPONSES, input=items, stream=True, **fields))) == nameless(reply.body)
    return reply.body


PARAMETERS = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
PICK = {"type": "function", "name": "pick", "parameters": PARAMETERS}
NAMED = {"type": "function", "name": "pick"}


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_call_that_must_come_comes(web: Web, choice: Any):
    """With a random model: the grammar of the turn sees to it."""
    fields = {"tools": [PICK], "tool_choice": choice, "parallel_tool_calls": False, "temperature": 1.5, "seed": 4}
    fields |= {"max_output_tokens": 60, "ignore_eos": False}
    response = create(web, **fields)
    (item,) = response["output"]
    assert (item["type"], item["name"], item["status"]) == ("function_call", "pick", "completed")
    assert json.loads(item["arguments"])["a"] in (1, 2) and response["status"] == "completed"


def test_errors_about_tools_speak_of_flat_ones(web: Web):
    for tool, says in (
        ({**PICK, "name": "a b"}, "tools[0].name"),
        ({**PICK, "parameters": {"type": "object", "properties": {"a": {"type": "moon"}}}}, "tools[0].parameters"),
    ):
        reply = web.post(RESPONSES, input=HI, tools=[tool], tool_choice="required")
        assert (reply.status, reply.error["param"]) == (400, "tools")
        assert says in reply.error["message"] and "function.name" not in reply.error["message"]
    for choice in ("sometimes", {"type": "function", "name": "other"}):
        reply = web.post(RESPONSES, input=HI, tools=[PICK], tool_choice=choice)
        assert (reply.status, reply.error["param"]) == (400, "tool_choice")


def test_a_tool_may_take_nothing(web: Web):
    """Clients lose a call whose arguments are an empty text."""
    tool = {"type": "function", "name": "now"}
    (item,) = create(web, tools=[tool], tool_choice={"type": "function", "name": "now"})["output"]
    assert json.loads(item["arguments"]) == {}


def test_two_calls_have_two_ids(web: Web, llm: LLM):
    """A model that does not want to end; the last of its calls is cut."""
    no_end = {str(token_id): -100 for token_id in llm.llm_engine.eos_token_ids}
    fields = {"tools": [PICK], "tool_choice": "required", "logit_bias": no_end, "max_output_tokens": 150}
    items = create(web, **fields, seed=1)["output"]
    assert len(items) > 1 and {item["type"] for item in items} == {"function_call"}
    assert len({item["call_id"] for item in items}) == len({item["id"] for item in items}) == len(items)
    assert all(json.loads(item["arguments"]) for item in items if item["status"] == "completed")


def test_a_call_and_its_result_go_back_in(web: Web, llm: LLM):
    """By the id of the answer, and by everything that was said."""
    first = create(web, tools=[PICK], tool_choice=NAMED, temperature=1.5, seed=4, max_output_tokens=60)
    result = {"type": "function_call_output", "call_id": first["output"][0]["call_id"], "output": "it is 5"}
    fields = {"tools": [PICK], "tool_choice": "none", "temperature": 0, "max_output_tokens": 4, "ignore_eos": True}
    by_id = create(web, [result], previous_response_id=first["id"], **fields)
    inline = create(web, [{"role": "user", "content": HI}, first["output"][0], result], **fields)
    assert by_id["usage"]["input_tokens"] == inline["usage"]["input_tokens"]
    assert nameless(by_id) == nameless(inline) | {"previous_response_id": first["id"]}
    without = create(web, HI, **fields)
    assert inline["usage"]["input_tokens"] > without["usage"]["input_tokens"] + 10


def test_no_tool_is_called_where_none_may_be(web: Web):
    fields = {"tools": [PICK], "tool_choice": "none", "max_output_tokens": 30, "ignore_eos": True, "seed": 1}
    assert [item["type"] for item in create(web, **fields)["output"]] == ["message"]


def test_thinking_is_an_item_of_its_own_and_is_shown_again(engine: AsyncEngine):
    """The template begins it; a random model never ends it."""
    web = Web(engine)
    fields = {"temperature": 0, "max_output_tokens": 12, "ignore_eos": True}
    thinking = {"chat_template_kwargs": {"think": True}}
    response = create(web, **thinking, **fields)
    (item,) = response["output"]
    assert item["type"] == "reasoning" and item["content"][0]["text"] and item["summary"] == []
    assert response["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    following = create(web, "go on", previous_response_id=response["id"], **fields)
    forgetful = create(web, [{"role": "user", "content": HI}, {"role": "user", "content": "go on"}], **fields)
    assert following["usage"]["input_tokens"] > forgetful["usage"]["input_tokens"] + 5
