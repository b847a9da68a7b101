"""StructuredOutputsParams: exactly one kind, and every limit on both sides of it."""

from __future__ import annotations

from typing import Any

import pytest

from minivllm import InvalidRequestError, SamplingParams, StructuredOutputsParams


def nested(depth: int) -> dict[str, Any]:
    """A schema of `depth` objects, one in the other."""
    schema: dict[str, Any] = {}
    for _ in range(depth - 1):
        schema = {"not_a_keyword": schema}
    return schema


def refusal(**fields: Any) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        StructuredOutputsParams(**fields)
    assert caught.value.parameter == "structured_outputs"
    return caught.value.message


def test_exactly_one_kind_is_given():
    assert refusal().endswith("got none.")
    assert "exactly one of json, regex, choice, grammar, json_object" in refusal(json={}, regex="a")


@pytest.mark.parametrize(
    ("within", "beyond", "reason"),
    [
        ({"json": nested(64)}, {"json": nested(65)}, "at most 64 deep"),
        ({"json": {"enum": [0] * 1000}}, {"json": {"items": {"enum": [0] * 1001}}}, "more than 1000 values"),
        ({"json": {"$ref": "#/a"}}, {"json": {"$ref": "http://example.com/a"}}, "references to other documents"),
        ({"json": {"a": "x" * 65_527}}, {"json": {"a": "x" * 65_528}}, "at most 65536 bytes"),
        ({"json": '{"a":"é"}'}, {"json": '{"a":"' + "é" * 33_000 + '"}'}, "at most 65536 bytes"),
        ({"regex": "a" * 2048}, {"regex": "a" * 2049}, "at most 2048 bytes"),
        ({"regex": "é" * 1024}, {"regex": "é" * 1025}, "at most 2048 bytes"),
        ({"choice": ["a"] * 1000}, {"choice": ["a"] * 1001}, "1 to 1000 strings"),
        ({"choice": ["a" * 65_535]}, {"choice": ["a" * 65_536]}, "65536 bytes"),
        ({"grammar": "a" * 65_536}, {"grammar": "a" * 65_537}, "65536 bytes"),
    ],
)
def test_a_limit_is_named_when_it_is_passed(within: dict[str, Any], beyond: dict[str, Any], reason: str):
    StructuredOutputsParams(**within)
    message = refusal(**beyond)
    assert reason in message and f"structured_outputs.{next(iter(beyond))} " in message
    assert len(message) < 500


@pytest.mark.parametrize(
    "fields",
    [
        {"json": "{"},
        {"json": "[1]"},
        {"json": "null"},
        {"json": 7},
        {"json": {"a": float("nan")}},
        {"json": '{"a": Infinity}'},
        {"json": {"a": object}},
        {"json": "[" * 60_000},
        {"json": '{"a": ' + "1" * 5000 + "}"},
        {"json": "\ud800"},
        {"regex": ""},
        {"regex": 3},
        {"regex": "a\0"},
        {"regex": "\ud800"},
        {"choice": []},
        {"choice": "abc"},
        {"choice": ["a", 1]},
        {"choice": ["\ud800"]},
        {"grammar": ""},
        {"grammar": b"root"},
        {"json_object": False},
        {"json_object": 1},
    ],
    ids=str,
)
def test_what_is_no_schema_regex_choice_or_grammar_is_refused(fields: dict[str, Any]):
    assert f"structured_outputs.{next(iter(fields))} must be" in refusal(**fields)


def test_a_schema_that_holds_itself_is_refused():
    schema: dict[str, Any] = {}
    schema["items"] = schema
    refusal(json=schema)


def test_sampling_params_take_nothing_else():
    with pytest.raises(InvalidRequestError, match="StructuredOutputsParams") as caught:
        SamplingParams(structured_outputs={"json": {}})  # type: ignore[arg-type]
    assert caught.value.parameter == "structured_outputs"


def test_the_kind_is_the_field_that_is_set():
    assert StructuredOutputsParams(json=False).kind == "json"
    assert StructuredOutputsParams(choice=("a", "b")).kind == "choice"
    assert StructuredOutputsParams(json='{"type": "null"}').schema() == {"type": "null"}
