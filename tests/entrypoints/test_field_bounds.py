"""Every field of every body at its bounds: what is allowed to the very edge is answered, one step further is a 400 that
names the field, and the engine goes on.

The table must have an entry for each field that /v1/engine/capabilities calls implemented: a new field without bounds
fails here. A field is sent with what it cannot do without (COMPANIONS).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from minivllm import LLM, AsyncEngine
from minivllm.entrypoints.protocol import MAX_EMBEDDING_INPUTS, MAX_PROMPTS
from minivllm.entrypoints.service import ServerConfig
from minivllm.sampling_params import (
    MAX_BAD_WORDS,
    MAX_ENUM_VALUES,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_REGEX_BYTES,
    MAX_SCHEMA_DEPTH,
    MAX_SEQUENCES,
    MAX_STOP_STRING_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
)
from tests.engine.test_async_engine import assert_idle
from tests.entrypoints.helpers import CHAT, COMPLETIONS, EMBEDDINGS, HELLO, Reply, Web
from tests.entrypoints.response_helpers import RESPONSES
from tests.entrypoints.tool_models import HERMES, tiny_llm

SCORE, TOKENIZE, DETOKENIZE = "/v1/score", "/tokenize", "/detokenize"
CONTEXT, VOCAB = 2048, 320  # of the model below
INT64 = 2**63
NOT_A_FLAG = ["yes", 1, [], {}]
FLAG = ([True, False, None], NOT_A_FLAG)
TEXTS_ONLY = [5, ["a"], {}, True]

Bounds = dict[str, tuple[list[Any], list[Any]]]  # field -> (allowed, refused)


def nested(depth: int) -> Any:
    """A schema whose objects and arrays are nested `depth` deep."""
    schema: Any = {"type": "integer"}
    for _ in range((depth - 1) // 2):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def format_of(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}


def function(name: Any = "look", **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


def repeated(count: int) -> list[dict[str, Any]]:
    return [function(f"look_{number}") for number in range(count)]


MODEL = (["tiny", "alias", "", None], ["gpt", 5, ["tiny"]])
SAMPLING: Bounds = {
    "min_tokens": ([0, 1, 6, None], [-1, 7, 1.5, "1", True]),
    "temperature": ([0, 0.0, 1e-9, 0.01, 1, 2, 2.0, None], [-0.01, 2.01, "1", True, [1], 10**400]),
    "top_p": ([1e-9, 0.5, 1, None], [0, -0.1, 1.01, "1", True]),
    "top_k": ([-1, 0, 1, 2**31 - 1, None], [-2, 2**31, 1.5, "1", True]),
    "min_p": ([0, 0.5, 1, None], [-0.01, 1.01, "0", True]),
    "presence_penalty": ([-2, 0, 2, None], [-2.01, 2.01, "0", True]),
    "frequency_penalty": ([-2, 0, 2, None], [-2.01, 2.01, "0", True]),
    "repetition_penalty": ([0.01, 1, 10, None], [0, -1, 10.01, "1", True]),
    "seed": ([-INT64, -1, 0, INT64 - 1, None], [-INT64 - 1, INT64, 1.5, "1", True]),
    "stop": (
        ["a", [], ["a"] * MAX_STOP_STRINGS, ["a" * MAX_STOP_STRING_CHARS], None],
        ["", [""], ["a"] * (MAX_STOP_STRINGS + 1), ["a" * (MAX_STOP_STRING_CHARS + 1)], 5, [5], {}],
    ),
    "stop_token_ids": (
        [[], [0], [VOCAB - 1], [0] * MAX_STOP_TOKEN_IDS, None],
        [[-1], [VOCAB], [0] * (MAX_STOP_TOKEN_IDS + 1), [1.5], ["a"], 5],
    ),
    "ignore_eos": FLAG,
    "include_stop_str_in_output": FLAG,
    "skip_special_tokens": FLAG,
    "spaces_between_special_tokens": FLAG,
    "logit_bias": (
        [{}, {"0": -100}, {str(VOCAB - 1): 100}, {"5": 1000}, None],
        [{"-1": 1}, {str(VOCAB): 1}, {"a": 1}, {"1": "1"}, {"1": None}, [1], 5]
        + [{str(number): 1 for number in range(MAX_LOGIT_BIAS + 1)}],
    ),
    "allowed_token_ids": ([[0], [VOCAB - 1], list(range(VOCAB)), None], [[], [-1], [VOCAB], ["a"], 5]),
    "bad_words": (
        [[], ["a"], ["a"] * MAX_BAD_WORDS, None],
        [[""], ["a"] * (MAX_BAD_WORDS + 1), ["a" * (MAX_STOP_STRING_CHARS + 1)], "a", [5], 5],
    ),
    "stream": FLAG,
    "priority": ([-INT64, 0, INT64 - 1, None], [-INT64 - 1, INT64, 1.5, "1", True]),
    "cache_salt": (["a", "é" * 100, None], ["", *TEXTS_ONLY]),
    "structured_outputs": (
        [{"json": {}}, {"json": True}, {"json": '{"type": "integer"}'}, {"regex": "a"}, {"choice": ["a"]}]
        + [{"grammar": 'start: "a"'}, {"json_object": True}, {"json": nested(MAX_SCHEMA_DEPTH)}, None]
        + [{"choice": [str(number) for number in range(MAX_ENUM_VALUES)]}, {"regex": "a" * MAX_REGEX_BYTES}],
        [{}, {"json": {}, "regex": "a"}, {"regex": ""}, {"regex": "("}, {"choice": []}, {"choice": [5]}, "json", 5]
        + [{"json": "{"}, {"json": 5}, {"grammar": "start: other"}, {"json_object": False}, {"xml": "a"}]
        + [{"json": nested(MAX_SCHEMA_DEPTH + 3)}, {"regex": "a" * (MAX_REGEX_BYTES + 1)}]
        + [{"choice": [str(number) for number in range(MAX_ENUM_VALUES + 1)]}, {"json": {"$ref": "http://a/b"}}],
    ),
    "guided_json": (
        [{}, {"type": "integer"}, '{"type": "integer"}', None],
        ["", "{", [1], 5, True, {"type": "nothing"}, {"$ref": "#/definitions/none"}],
    ),
    "guided_regex": (["a", "[0-9]{2}", None], ["", "(", "a\0", "(?=a)", *TEXTS_ONLY]),
    "guided_choice": ([["a"], ["a", "ab"], None], [[], [5], "a", 5, {}]),
    "guided_grammar": (['start: "a"', 'root ::= "a"', None], ["", "start: other", "nothing", *TEXTS_ONLY]),
}
GENERATION: Bounds = {
    "n": ([1, 2, MAX_SEQUENCES, None], [0, -1, MAX_SEQUENCES + 1, 1.5, "1", True]),
    "best_of": ([1, 2, MAX_SEQUENCES, None], [0, -1, MAX_SEQUENCES + 1, 1.5, "1", True]),
    "use_beam_search": FLAG,
    "length_penalty": ([-10, 0, 1, 10, None], [-10.01, 10.01, "1", True]),
    "max_tokens": ([1, CONTEXT, 2**31 - 1, None], [-1, 2**31, 1.5, "1", True]),
    "prompt_logprobs": ([0, 1, MAX_LOGPROBS, None], [-1, MAX_LOGPROBS + 1, 1.5, "1", True]),
    "stream_options": (
        [{}, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}, None],
        [{"include_usage": 1}, {"continuous_usage_stats": True}, {"other": True}, 5, []],
    ),
    "return_token_ids": FLAG,
    "add_special_tokens": FLAG,
    "truncate_prompt_tokens": ([-1, 1, CONTEXT, None], [0, -2, CONTEXT + 1, 1.5, "1", True]),
    "truncation_side": (["left", "right", None], ["middle", "", 5]),
    "response_format": (
        [{"type": "text"}, {"type": "json_object"}, format_of({}), format_of(True), None],
        [{}, {"type": "xml"}, {"type": "json_schema"}, format_of("{}"), format_of(None), format_of([]), "json", 5]
        + [{"type": "text", "other": 1}, format_of({"type": "nothing"}), format_of(nested(MAX_SCHEMA_DEPTH + 3))],
    ),
}
TOOLS: Bounds = {
    "tools": (
        [[], [function()], [function("a" * 64, parameters={}, description="", strict=True)], repeated(128), None],
        [[{}], [{"type": "function"}], [function("")], [function("a" * 65)], [function("a b")], [function(5)], "a", 5]
        + [repeated(1) * 2, repeated(129), [function(parameters=[])], [function(parameters={"type": "string"})]],
    ),
    "tool_choice": (
        ["auto", "none", "required", {"type": "function", "function": {"name": "look"}}, None],
        ["any", "", {}, {"type": "function"}, {"type": "function", "function": {"name": "other"}}, 5, []],
    ),
    "parallel_tool_calls": FLAG,
    "chat_template_kwargs": ([{}, {"enable_thinking": False}, None], [5, "a", []]),
}
MESSAGES: tuple[list[Any], list[Any]] = (
    [HELLO, [{"role": "user", "content": [{"type": "text", "text": "a"}]}]]
    + [[{"role": "system", "content": "a"}, *HELLO]],
    [[], [{}], [{"role": "user"}], [{"role": 5, "content": "a"}], [{"content": "a"}], ["a"], "a", 5, None]
    + [[{"role": "user", "content": 5}], [{"role": "user", "content": [{"type": "image_url"}]}]],
)  # fmt: skip
VECTOR: Bounds = {
    "priority": SAMPLING["priority"],
    "cache_salt": SAMPLING["cache_salt"],
    "add_special_tokens": FLAG,
    "truncate_prompt_tokens": GENERATION["truncate_prompt_tokens"],
    "truncation_side": GENERATION["truncation_side"],
    "use_activation": ([True, None], [False, 0, "yes"]),
    "normalize": ([True, None], [False, 0, "yes"]),
}
INPUTS = ([["a"], "a", [1, 2], [[1], [2]]], ["", [], [""], [[]], [-1], [VOCAB], [1.5], {}, 5, None, ["a", 5]])
PAIR = (["a", ["a", "b"]], ["", [], [""], {}, 5, [VOCAB]])

TABLE: dict[str, Bounds] = {
    CHAT: {
        "model": MODEL, **SAMPLING, **GENERATION, **TOOLS,
        "messages": MESSAGES,
        "max_completion_tokens": ([1, CONTEXT, 2**31 - 1, None], [0, -1, 2**31, 1.5, "1", True]),
        "logprobs": FLAG,
        "top_logprobs": ([0, 1, MAX_LOGPROBS, None], [-1, MAX_LOGPROBS + 1, 1.5, "1", True]),
        "add_generation_prompt": FLAG,
        "continue_final_message": FLAG,
        "documents": ([[], [{"title": "a", "text": "b"}], None], [5, "a", {}]),
    },
    COMPLETIONS: {
        "model": MODEL, **SAMPLING, **GENERATION,
        "prompt": (INPUTS[0] + [["a"] * MAX_PROMPTS], INPUTS[1] + [["a"] * (MAX_PROMPTS + 1)]),
        "logprobs": ([0, 1, MAX_LOGPROBS, None], [-1, MAX_LOGPROBS + 1, 1.5, "1", True]),
        "echo": FLAG,
    },
    RESPONSES: {
        "model": MODEL, **SAMPLING,
        "input": (
            ["a", [{"role": "user", "content": "a"}], [{"type": "message", "role": "user", "content": "a"}]],
            ["", [], [5], [{}], [{"type": "nothing"}], 5, {}, [{"type": "item_reference", "id": 5}]],
        ),
        "instructions": (["a", "", None], [5, ["a"], {}]),
        "max_output_tokens": ([1, CONTEXT, 2**31 - 1, None], [0, -1, 2**31, 1.5, "1", True]),
        "tools": (
            [[], [{"type": "function", "name": "look"}], None],
            [[{}], [{"type": "function"}], [{"type": "web_search"}], [{"type": "function", "name": ""}], "a", 5],
        ),
        "tool_choice": (
            ["auto", "none", "required", {"type": "function", "name": "look"}, None],
            ["any", "", {}, {"type": "function"}, {"type": "function", "name": "other"}, 5, []],
        ),
        "parallel_tool_calls": FLAG,
        "text": (
            [{}, {"format": {"type": "text"}}, {"format": {"type": "json_schema", "name": "a", "schema": {}}}]
            + [{"verbosity": "low"}, None],
            [{"format": {}}, {"format": {"type": "xml"}}, {"verbosity": "loud"}, {"other": 1}, 5, "text"],
        ),
        "include": ([[], ["message.output_text.logprobs"], ["reasoning.encrypted_content"]], [["a"], "a", 5, [5]]),
        "top_logprobs": ([0, 1, MAX_LOGPROBS, None], [-1, MAX_LOGPROBS + 1, 1.5, "1", True]),
        "truncation": (["auto", "disabled", None], ["none", "", 5, True]),
        "store": FLAG,
        "stream_options": ([{}, {"include_obfuscation": False}, None], [{"include_obfuscation": True}, {"a": 1}, 5]),
        "chat_template_kwargs": TOOLS["chat_template_kwargs"],
        "previous_response_id": ([None], ["resp_none", "", 5]),
    },
    EMBEDDINGS: {
        "model": MODEL, **VECTOR,
        "input": (
            INPUTS[0] + [["a"] * MAX_EMBEDDING_INPUTS], INPUTS[1] + [["a"] * (MAX_EMBEDDING_INPUTS + 1)],
        ),
        "encoding_format": (["float", "base64", None], ["int8", "", 5]),
        "dimensions": ([None], [0, -1, 10**6, 1.5, "1", True]),
    },
    SCORE: {
        "model": MODEL, **VECTOR,
        **dict.fromkeys(("text_1", "text_2", "queries", "documents", "items", "data_1", "data_2"), PAIR),
    },
    TOKENIZE: {
        "model": MODEL,
        "prompt": (["a", "é" * 1000], ["", 5, ["a"], {}, None]),
        "messages": (MESSAGES[0], [value for value in MESSAGES[1] if value is not None]),  # null: not sent
        "add_special_tokens": FLAG,
        "return_token_strs": FLAG,
        "add_generation_prompt": FLAG,
        "continue_final_message": FLAG,
        "chat_template_kwargs": TOOLS["chat_template_kwargs"],
    },
    DETOKENIZE: {
        "model": MODEL,
        "tokens": ([[], [0], [VOCAB - 1]], [[-1], [VOCAB], [1.5], ["a"], [True], "a", 5, None]),
    },
}  # fmt: skip
SHORT = {"max_tokens": 6}
PLAIN: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HELLO, **SHORT},
    COMPLETIONS: {"prompt": "a", **SHORT},
    RESPONSES: {"input": "a", "max_output_tokens": 6},
    EMBEDDINGS: {"input": "a"},
    SCORE: {"text_1": "a", "text_2": "b"},
    TOKENIZE: {"prompt": "a"},
    DETOKENIZE: {"tokens": [1]},
}
COMPANIONS: dict[tuple[str, str], dict[str, Any]] = {
    (CHAT, "top_logprobs"): {"logprobs": True},
    (CHAT, "tool_choice"): {"tools": [function()]},
    (RESPONSES, "tool_choice"): {"tools": [{"type": "function", "name": "look"}]},
    (RESPONSES, "top_logprobs"): {"include": ["message.output_text.logprobs"]},
    (CHAT, "continue_final_message"): {
        "messages": [*HELLO, {"role": "assistant", "content": "a"}],
        "add_generation_prompt": False,
    },
    (TOKENIZE, "continue_final_message"): {
        "prompt": None,
        "messages": [*HELLO, {"role": "assistant", "content": "a"}],
        "add_generation_prompt": False,
    },
    (TOKENIZE, "messages"): {"prompt": None},
    **{(path, "stream_options"): {"stream": True} for path in (CHAT, COMPLETIONS, RESPONSES)},
    **{(path, "length_penalty"): {"use_beam_search": True, "n": 2} for path in (CHAT, COMPLETIONS)},
    **{(path, "use_beam_search"): {"n": 2} for path in (CHAT, COMPLETIONS)},
    **{(path, "truncation_side"): {"truncate_prompt_tokens": 2} for path in (CHAT, COMPLETIONS, EMBEDDINGS, SCORE)},
}
PARTNERS = {
    "text_1": "text_2", "text_2": "text_1", "queries": "documents", "documents": "queries",
    "items": "queries", "data_1": "data_2", "data_2": "data_1",
}  # fmt: skip


def body_of(path: str, field: str, value: Any) -> dict[str, Any]:
    body = {**PLAIN[path], **COMPANIONS.get((path, field), {}), field: value}
    if path == SCORE and field in PARTNERS:
        partner = ["a"] * len(value) if isinstance(value, list) and value else "a"
        body = {field: value, PARTNERS[field]: partner}
    if field in ("max_tokens", "max_completion_tokens", "max_output_tokens") and value in (CONTEXT, 2**31 - 1, None):
        body |= {"structured_outputs": {"choice": ["a"]}}  # ends by itself
    return body


def cases(index: int) -> list[Any]:
    """0: allowed, 1: refused."""
    return [
        pytest.param(path, field, value, id=f"{path} {field} {number}")
        for path, fields in TABLE.items()
        for field, bounds in fields.items()
        for number, value in enumerate(bounds[index])
    ]


# ------------------------------------------------------------------ the server
@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return tiny_llm(tmp_path_factory.mktemp("tiny"), HERMES)


@pytest.fixture(scope="module")
def web(model: LLM) -> Iterator[Web]:
    engine = AsyncEngine(model.llm_engine)
    web = Web(engine, ServerConfig(served_model_names=("tiny", "alias")))
    yield web
    engine.shutdown()
    assert_idle(model)


@pytest.fixture(scope="module")
def answer(web: Web) -> str:
    """What a plain request gets, before any other one came."""
    return text_of(web)


def text_of(web: Web) -> str:
    reply = web.post(COMPLETIONS, prompt="the value is", temperature=0, max_tokens=8)
    assert reply.status == 200
    return reply.body["choices"][0]["text"]


# ------------------------------------------------------------------ the proof
def test_every_implemented_field_has_bounds(web: Web, model: LLM):
    config = model.llm_engine.config.model
    assert (config.max_model_len, config.vocab_size) == (CONTEXT, VOCAB)
    endpoints = web.get("/v1/engine/capabilities").body["endpoints"]
    implemented = {
        path: {name for name, state in fields.items() if state == "implemented"} for path, fields in endpoints.items()
    }
    assert implemented == {path: set(fields) for path, fields in TABLE.items()}


@pytest.mark.parametrize(("path", "field", "value"), cases(0))
def test_what_is_allowed_is_answered(web: Web, path: str, field: str, value: Any):
    reply = web.post(path, **body_of(path, field, value))
    assert reply.status == 200, reply.text
    assert "X-Minivllm-Ignored" not in reply.headers


@pytest.mark.parametrize(("path", "field", "value"), cases(1))
def test_one_step_further_is_refused_by_name(web: Web, answer: str, path: str, field: str, value: Any):
    reply: Reply = web.post(path, **body_of(path, field, value))
    expected = 404 if field in ("model", "previous_response_id") and isinstance(value, str) else 400
    assert reply.status == expected, reply.text
    assert reply.error["param"].partition(".")[0] == field and reply.error["message"]
    assert text_of(web) == answer
