"""Schemas before llguidance sees them: annotations go, what changes the meaning is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from minivllm import InvalidRequestError
from minivllm.structured_output.schema import prepare_schema

LOOK_AHEAD = r"^(?!\.)(?!.*\.\.)[a-z.]+@[a-z]+\.[a-z]{2,}$"  # as zod 4 writes e-mail addresses


@pytest.mark.parametrize(
    ("schema", "prepared"),
    [
        (True, True),
        ({"$schema": "x", "$id": "y", "title": "t", "default": 1, "examples": [], "x-guidance": {}, "odd": 1}, {}),
        ({"type": "string", "format": "cuid"}, {"type": "string"}),
        ({"type": "string", "format": "date"}, {"type": "string", "format": "date"}),
        ({"format": "email", "pattern": LOOK_AHEAD}, {"type": "string", "format": "email"}),
        ({"type": "string", "pattern": LOOK_AHEAD}, {"type": "string", "pattern": LOOK_AHEAD}),  # refused later
        ({"type": "array", "uniqueItems": False}, {"type": "array"}),
        (
            {"properties": {"title": {"title": "T"}}},
            {"properties": {"title": {}}, "type": "object", "additionalProperties": False},
        ),
        (
            {"properties": {"a": {"not": {}}}},
            {"properties": {"a": False}, "type": "object", "additionalProperties": False},
        ),
        ({"minimum": 1}, {"minimum": 1, "type": "number"}),
        ({"items": [{"maxLength": 1}]}, {"items": [{"maxLength": 1, "type": "string"}], "type": "array"}),
        ({"allOf": [{"required": ["a"]}]}, {"allOf": [{"required": ["a"]}]}),
        ({"enum": [{"title": 1}], "minimum": 0}, {"enum": [{"title": 1}], "minimum": 0}),
        ({"minimum": 1, "minLength": 1}, {"minimum": 1, "minLength": 1}),  # two kinds: both may be
        ({"type": "object", "propertyNames": {"type": "string"}}, {"type": "object"}),
        (
            {"propertyNames": {"type": "string", "enum": ["a", "b"]}, "additionalProperties": {"type": "null"}},
            {
                "properties": {"a": {"type": "null"}, "b": {"type": "null"}},
                "additionalProperties": False,
                "type": "object",
            },
        ),
        (
            {"propertyNames": {"pattern": "^a"}, "additionalProperties": {"type": "null"}},
            {"patternProperties": {"^a": {"type": "null"}}, "additionalProperties": False, "type": "object"},
        ),
    ],
)
def test_a_schema_keeps_what_constrains(schema: Any, prepared: Any):
    assert prepare_schema(schema) == prepared


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {"type": "object", "properties": {}},
        {"type": "object", "properties": {"a": {}}, "additionalProperties": True},
        {"type": "object", "properties": {"a": {}}, "additionalProperties": {"type": "null"}},
        {"type": "object", "properties": {"a": {}}, "patternProperties": {"^b": {}}},
        {"type": "object", "properties": {"a": {}}, "required": ["b"]},
        {"type": "object", "properties": {"a": {}}, "minProperties": 2},
        {"allOf": [{"type": "object", "properties": {"a": {}}}, {"type": "object", "properties": {"b": {}}}]},
    ],
    ids=str,
)
def test_objects_that_need_other_properties_stay_open(schema: Any):
    assert prepare_schema(schema) == schema


def test_objects_that_list_their_properties_have_no_others_however_deep():
    inner = {"type": "object", "properties": {"a": {}}}
    schema = {"type": "array", "items": {"anyOf": [inner, {"type": "object", "additionalProperties": inner}]}}
    schema["$defs"] = {"d": inner}
    closed = inner | {"additionalProperties": False}
    expected = {"type": "array", "items": {"anyOf": [closed, {"type": "object", "additionalProperties": closed}]}}
    assert prepare_schema(schema) == expected | {"$defs": {"d": closed}}


def test_everything_that_cannot_be_honoured_is_listed_with_its_place():
    schema = {
        "not": {"type": "null"},
        "properties": {"a": {"uniqueItems": True}, "not": {"contains": {}}},
        "propertyNames": {"minLength": 2},
    }
    with pytest.raises(InvalidRequestError) as caught:
        prepare_schema(schema)
    assert caught.value.parameter == "structured_outputs"
    listed = "#/not, #/properties/a/uniqueItems, #/properties/not/contains, #/propertyNames."
    assert caught.value.message.endswith(listed)


def test_the_schema_of_the_caller_stays_as_it_is():
    schema = {"title": "t", "properties": {"a": {"title": "x"}}}
    prepare_schema(schema)
    assert schema == {"title": "t", "properties": {"a": {"title": "x"}}}


@pytest.mark.parametrize("multiples", [[0.01], [100], [5, 7, 0.5], [20_000], [1e300], [19_999]])
def test_small_multiples_and_powers_of_ten_are_taken(multiples: list[float]):
    prepare_schema({"anyOf": [{"multipleOf": value} for value in multiples]})


@pytest.mark.parametrize("multiples", [[20_001], [1_000_003], [149, 151], [7] * 3000, [1.0000001], [1e-300 * 20_001]])
def test_multiples_that_need_too_many_states_are_refused(multiples: list[float]):
    """A million took llguidance five seconds and 260 MB; 1009 and 1013 in one allOf took eleven."""
    with pytest.raises(InvalidRequestError, match="multipleOf"):
        prepare_schema({"allOf": [{"multipleOf": value} for value in multiples]})


def patterns(count: int) -> list[dict[str, str]]:
    return [{"pattern": f"a{{{number}}}b"} for number in range(count)]


@pytest.mark.parametrize(
    "meeting",
    [
        lambda several: {"allOf": several},
        lambda several: {"type": "string", "minLength": 3, "anyOf": several},
        lambda several: {"$ref": "#/$defs/0", "maxLength": 9, "$defs": dict(enumerate(several))},
    ],
    ids=["allOf", "anyOf", "$ref"],
)
def test_patterns_that_may_meet_are_few(meeting: Any):
    """Thirty of them in one allOf, in a schema of a kilobyte, kept llguidance busy for minutes: 2 ** 30 steps."""
    prepare_schema(meeting(patterns(8)))
    with pytest.raises(InvalidRequestError, match="at most 8 different patterns"):
        prepare_schema(meeting(patterns(9)))


def test_patterns_that_never_meet_may_be_many():
    prepare_schema({"properties": {str(number): one for number, one in enumerate(patterns(500))}})
    prepare_schema({"anyOf": patterns(500)})


def test_pattern_properties_are_few():
    """700 of them in one object kept llguidance busy for more than a minute."""
    prepare_schema({"patternProperties": {f"^{number}": {} for number in range(8)}})
    with pytest.raises(InvalidRequestError, match="#/patternProperties .more than 8."):
        prepare_schema({"patternProperties": {f"^{number}": {} for number in range(9)}})
