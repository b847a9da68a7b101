"""Bodies: what is JSON, which fields are known, and what an error says."""

from __future__ import annotations

import json
from typing import Any

import pytest

from minivllm.entrypoints.protocol import (
    BODIES,
    MAX_JSON_DEPTH,
    MAX_PROMPTS,
    NO_OP_FIELDS,
    REFUSED_FIELDS,
    SAMPLING_FIELDS,
    ChatRequest,
    CompletionRequest,
    describe_error,
    field_states,
    parse,
    parse_json,
    prompts_of,
    to_json,
)
from minivllm.errors import EngineDeadError, InvalidRequestError, OverloadedError, ServerError

CHAT = {"messages": []}


def nested(depth: int) -> bytes:
    """An object with lists in it; `depth` in all."""
    return b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


# ------------------------------------------------------------------ JSON
def test_an_object_is_read():
    raw = '{"prompt": "Grüße 😀 \\ud83d\\ude00", "n": 1, "x": [1.5, null, true]}'.encode()
    assert parse_json(raw) == {"prompt": "Grüße 😀 😀", "n": 1, "x": [1.5, None, True]}


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "must be JSON"),
        (b"{", "must be JSON"),
        (b'{"a": 1} x', "must be JSON"),
        (b"[]", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b"\xef\xbb\xbf{}", "must be JSON"),  # a byte order mark
        ('{"a": 1}'.encode("utf-16"), "UTF-8"),
        (b'{"a": "\xff"}', "UTF-8: byte 7"),
        (b'{"a": NaN}', "finite"),
        (b'{"a": -Infinity}', "finite"),
        (b'{"a": [1e400]}', "finite"),
        (b'{"a": ' + b"9" * 5000 + b"}", "must be JSON"),  # Python refuses to read it
        (b'{"a": 1, "a": 2}', "'a' twice"),
        (b'{"x": {"a": 1, "b": 2, "a": 1}}', "'a' twice"),
    ],
)
def test_what_is_no_sound_json_object_is_refused(raw: bytes, says: str):
    """NaN, 1e400 and repeated keys are fine for Python's own reader."""
    with pytest.raises(InvalidRequestError, match=says):
        parse_json(raw)


def test_depth_is_limited_and_the_deepest_allowed_is_read():
    assert parse_json(nested(MAX_JSON_DEPTH))
    for depth in (MAX_JSON_DEPTH + 1, 900, 100_000):  # 900: read without a RecursionError
        with pytest.raises(InvalidRequestError, match="nested at most"):
            parse_json(nested(depth))


@pytest.mark.parametrize("raw", [b'{"a": "x\\ud800"}', b'{"a": [{"b": "\\udc00"}]}', b'{"a": {"\\ud800": 1}}'])
def test_half_a_surrogate_pair_names_its_field(raw: bytes):
    """It has no UTF-8 form: it was an error 500 as soon as somebody printed it."""
    with pytest.raises(InvalidRequestError, match="surrogate") as caught:
        parse_json(raw)
    assert caught.value.parameter == "a"


def test_half_a_surrogate_pair_as_a_name_can_still_be_answered():
    with pytest.raises(InvalidRequestError, match="surrogate") as caught:
        parse_json(b'{"\\ud800": 1}')
    assert to_json(describe_error(caught.value)[1])


# ------------------------------------------------------------------ fields
def test_an_unknown_field_is_named_and_a_null_one_has_no_effect_to_name():
    _, unknown = parse(ChatRequest, {**CHAT, "temprature": 1, "top_q": None, "user": "me", "store": True})
    assert unknown == ["temprature"]


@pytest.mark.parametrize("name", sorted(REFUSED_FIELDS))
def test_a_field_that_is_not_built_is_refused_by_name_unless_it_is_off(name: str):
    for off in (None, False, *REFUSED_FIELDS[name]):
        assert parse(ChatRequest, {**CHAT, name: off})[1] == []
    for value in ({"type": "object"}, [{}], "x", 5):
        with pytest.raises(InvalidRequestError, match=name) as caught:
            parse(ChatRequest, {**CHAT, name: value})
        assert caught.value.parameter == name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", "5"),
        ("n", 1.5),
        ("n", True),
        ("temperature", "0.5"),
        ("temperature", True),
        ("temperature", 10**400),
        ("stream", "true"),
        ("stream", 1),
        ("stop", 3),
        ("stop", ["a", 3]),
        ("logit_bias", {"5": "x"}),
        ("logit_bias", [5]),
        ("stop_token_ids", [1.5]),
        ("messages", "hello"),
        ("messages", {}),
        ("model", 5),
        ("stream_options", {"include_usage": "yes"}),
        ("stream_options", {"include_usge": True}),
        ("chat_template_kwargs", []),
        ("logprobs", 3),
    ],
)
def test_a_wrong_type_names_its_field_and_what_came(name: str, value: Any):
    """Nothing is bent into shape: "5" is no number and 1 is no true."""
    with pytest.raises(InvalidRequestError, match=f"^{name}: .* Got ") as caught:
        parse(ChatRequest, {**CHAT, name: value})
    assert caught.value.parameter == name and len(str(caught.value)) < 400


def test_a_missing_field_is_named():
    with pytest.raises(InvalidRequestError, match="messages is missing") as caught:
        parse(ChatRequest, {})
    assert caught.value.parameter == "messages"


def test_null_is_the_default():
    body, _ = parse(CompletionRequest, {"prompt": "x", **dict.fromkeys(SAMPLING_FIELDS)})
    assert all(getattr(body, name) is None for name in SAMPLING_FIELDS)


def test_every_sampling_field_can_be_sent_to_both_generating_endpoints():
    for kind in (ChatRequest, CompletionRequest):
        assert set(kind.model_fields) >= SAMPLING_FIELDS


def test_every_field_has_one_state():
    assert not NO_OP_FIELDS & REFUSED_FIELDS.keys()
    for kind in BODIES.values():
        assert not (NO_OP_FIELDS & kind.model_fields.keys()) - kind.echoed - {"store"}
        assert not kind.refused.keys() & kind.model_fields.keys() and kind.instead.keys() <= {*kind.refused}
        assert kind.echoed <= kind.model_fields.keys()
        states = field_states(kind)
        assert {name for name, state in states.items() if state == "implemented"} == set(
            kind.model_fields
        ) - kind.echoed
    assert field_states(ChatRequest)["functions"] == "refused" and field_states(ChatRequest)["user"] == "no-op"
    assert field_states(ChatRequest)["echo"] == "refused" and field_states(CompletionRequest)["echo"] == "implemented"


# ------------------------------------------------------------------ prompts
@pytest.mark.parametrize(
    ("value", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (["a", [1]], ["a", [1]]),
    ],
)
def test_the_four_forms_of_a_prompt(value: Any, prompts: list[Any]):
    assert prompts_of(value, "prompt") == prompts


@pytest.mark.parametrize("value", [[], [None], [1, "a"], [True], [{}], ["a"] * (MAX_PROMPTS + 1)], ids=repr)
def test_other_lists_are_no_prompts(value: list[Any]):
    with pytest.raises(InvalidRequestError) as caught:
        prompts_of(value, "input")
    assert caught.value.parameter == "input"


# ------------------------------------------------------------------ errors
@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (InvalidRequestError("x", parameter="n"), 400, "invalid_request_error", None),
        (OverloadedError("x", retry_after_seconds=3), 429, "rate_limit_error", "queue_full"),
        (EngineDeadError("x"), 503, "service_unavailable", 503),
        (ServerError("x"), 500, "internal_error", 500),
        (KeyError("x"), 500, "internal_error", 500),
    ],
)
def test_errors_have_one_shape(error: Exception, status: int, kind: str, code: Any):
    found_status, body, headers = describe_error(error)
    assert (found_status, body["error"]["type"], body["error"]["code"]) == (status, kind, code)
    assert ("Retry-After" in headers) == (status in (429, 503))


def test_an_accident_shows_nothing_of_itself():
    for error in (KeyError("secret"), ServerError("the step failed: secret"), RuntimeError("/secret/path")):
        assert "secret" not in json.dumps(describe_error(error))
