"""The form of an answer as the wire asks for it -> StructuredOutputsParams.

    response_format     OpenAI's: {"type": "text" | "json_object" | "json_schema", "json_schema": {name, schema, ...}}
    structured_outputs  vLLM's: {"json" | "regex" | "choice" | "grammar" | "json_object": ...}
    guided_*            vLLM's older names for the same four
    text.format         of the Responses API: as response_format, but flat

At most one of them. `strict` says how OpenAI's own models treat a schema; here every schema is always followed to the
letter, also with strict: false. An unknown key is refused: a form that is half understood is not followed at all.

Knows no grammar: whether a schema or a pattern can be used shows when the request is queued. `naming` makes such an
error speak of the field that the client knows. Called by generation.py and by whoever reads text.format.
Twin in vLLM: to_sampling_params in vllm/entrypoints/openai/chat_completion/protocol.py.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from minivllm.entrypoints.protocol import GenerationBody
from minivllm.errors import ClientError, InvalidRequestError, show
from minivllm.sampling_params import StructuredOutputsParams

GUIDED_FIELDS: Mapping[str, str] = MappingProxyType(
    {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}
)
KINDS = frozenset({"json", "regex", "choice", "grammar", "json_object"})
# Of structured_outputs: what has to be off. JSON is always written on one line, so "no whitespace at all" is no wish
# that could be refused or granted any further.
OFF = frozenset({"whitespace_pattern", "disable_additional_properties", "structural_tag"})
NO_EFFECT = frozenset({"disable_any_whitespace"})
SCHEMA_KEYS: Mapping[str, type] = MappingProxyType({"name": str, "description": str, "strict": bool})
# Where a schema stands in each field.
SCHEMA_PATHS: Mapping[str, str] = MappingProxyType(
    {"response_format": "response_format.json_schema.schema", "text.format": "text.format.schema"}
)


# ------------------------------------------------------------------ from the wire
def from_text_format(text_format: dict[str, Any]) -> StructuredOutputsParams | None:
    """The Responses API's text.format: {"type": "json_schema", "name", "schema", "strict"}, json_object, or text.

    None for text. Raises InvalidRequestError with parameter "text.format". What only compiling can find is raised when
    the request is queued: do that inside `with naming("text.format")`.
    """
    with naming("text.format"):
        return _from_format("text.format", text_format, text_format)


def from_body(body: GenerationBody) -> StructuredOutputsParams | None:
    """What a body asks for; None: free text. Raises InvalidRequestError naming the field, or both of two."""
    name = field_of(body)
    if name is None:
        return None
    value = getattr(body, name)
    with naming(name):
        if name == "response_format":
            return _from_format(name, value, value.get("json_schema"))
        if name == "structured_outputs":
            return StructuredOutputsParams(**_known(value))
        return StructuredOutputsParams(**{GUIDED_FIELDS[name]: value})


def field_of(body: GenerationBody) -> str | None:
    """The field that asks for a form. Raises InvalidRequestError when two of them do."""
    given = [name for name in ("structured_outputs", *GUIDED_FIELDS) if getattr(body, name) is not None]
    if body.response_format is not None and body.response_format != {"type": "text"}:
        given.insert(0, "response_format")
    if len(given) > 1:
        raise InvalidRequestError(
            f"{' and '.join(given[:2])} exclude each other: the answer can have only one form. Leave one out.",
            parameter=given[1],
        )
    return given[0] if given else None


def _from_format(name: str, fields: dict[str, Any], holder: Any) -> StructuredOutputsParams | None:
    """holder: the object that has the schema; the format itself where it is flat."""
    kind = fields.get("type")
    is_flat = holder is fields
    known = {"type"}
    if kind == "json_schema":
        known |= {*SCHEMA_KEYS, "schema"} if is_flat else {"json_schema"}
    elif kind not in ("text", "json_object"):
        raise InvalidRequestError(
            f'{name}.type must be "text", "json_object" or "json_schema", got {show(kind, 60)}.', parameter=name
        )
    _refuse_unknown(name, fields, known)
    if kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutputsParams(json_object=True)
    return StructuredOutputsParams(json=_schema_of(name, holder, is_flat))


def _schema_of(name: str, holder: Any, is_flat: bool) -> dict[str, Any] | bool:
    path = name if is_flat else f"{name}.json_schema"
    if not isinstance(holder, dict):
        raise InvalidRequestError(f"{path} must be an object with a schema, got {show(holder, 60)}.", parameter=name)
    if not is_flat:
        _refuse_unknown(path, holder, {*SCHEMA_KEYS, "schema"}, name)
    for key, kind in SCHEMA_KEYS.items():
        if not isinstance(holder.get(key), kind | None):
            raise InvalidRequestError(
                f"{path}.{key} must be a {'string' if kind is str else 'boolean'}, got {show(holder[key], 60)}.",
                parameter=name,
            )
    schema = holder.get("schema")
    if not isinstance(schema, dict | bool):  # text, which structured_outputs.json may be, is no schema here
        raise InvalidRequestError(f"{path}.schema must be a JSON schema, got {show(schema, 60)}.", parameter=name)
    return schema


def _known(fields: dict[str, Any]) -> dict[str, Any]:
    """structured_outputs without what is null or off."""
    _refuse_unknown("structured_outputs", fields, KINDS | OFF | NO_EFFECT)
    for name in sorted(OFF & fields.keys()):
        if fields[name] not in (None, False):
            raise InvalidRequestError(
                f"structured_outputs.{name} is not supported here: leave it out.", parameter="structured_outputs"
            )
    return {name: value for name, value in fields.items() if name in KINDS}


def _refuse_unknown(path: str, fields: dict[str, Any], known: set[str] | frozenset[str], name: str = "") -> None:
    unknown = sorted(key for key, value in fields.items() if key not in known and value is not None)
    if unknown:
        raise InvalidRequestError(
            f"{path} has no key {show(unknown[0], 60)}; it may hold {', '.join(sorted(known))}.",
            parameter=name or path,
        )


# ------------------------------------------------------------------ what errors call it
@contextlib.contextmanager
def naming(name: str | None) -> Iterator[None]:
    """Errors about structured_outputs name this field instead, in the message as well. None: they stay as they are."""
    try:
        yield
    except ClientError as error:
        if name in (None, "structured_outputs") or error.parameter != "structured_outputs":
            raise
        place = SCHEMA_PATHS.get(name, name) if error.message.startswith("structured_outputs.json ") else name
        message = re.sub(r"^structured_outputs(\.\w+)?", lambda _: place, error.message)
        raise InvalidRequestError(message, parameter=name, code=error.code) from None
