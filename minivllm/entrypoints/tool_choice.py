"""Which tools an answer may call, and whether it must: tools, tool_choice and parallel_tool_calls, checked.

    read_choice(tools, tool_choice, parallel) ──▶ ToolChoice(kind, offered, schemas, max_calls)

Arguments are always a JSON object. A schema that says nothing of other properties than its own allows no others: it
describes what the tool takes, and a small model that may invent some does.

Knows no format of calls and no grammar. Called by turn.py. Twin in vLLM: the validators of
vllm/entrypoints/openai/chat_completion/protocol.py.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from minivllm.errors import InvalidRequestError, show
from minivllm.sampling_params import StructuredOutputsParams

MAX_TOOLS = 128
MAX_CALLS = 16  # in one answer: a small model might never end
TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
# Beside these, other properties may come from elsewhere in the schema.
OPEN_KEYWORDS = frozenset({"additionalProperties", "patternProperties", "$ref", "anyOf", "oneOf", "allOf"})

Tool = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class ToolChoice:
    """kind: none, auto, required or named.

    offered: the tools that the model is told about: none without a choice, one when it is named.
    schemas: name -> (schema of the arguments, what errors call it), of those.
    """

    kind: str
    offered: tuple[Tool, ...] = ()
    schemas: dict[str, tuple[dict[str, Any], str]] = dataclasses.field(default_factory=dict)
    max_calls: int = 1


def read_choice(tools: Sequence[Tool], tool_choice: Any, parallel_tool_calls: bool) -> ToolChoice:
    """Raises InvalidRequestError naming tools or tool_choice."""
    if len(tools) > MAX_TOOLS:
        raise _bad_tools(f"tools must hold at most {MAX_TOOLS} tools, got {len(tools)}")
    schemas: dict[str, tuple[dict[str, Any], str]] = {}
    for index, tool in enumerate(tools):
        name = _checked_name(tool["function"].get("name"), f"tools[{index}].function.name")
        if name in schemas:
            raise _bad_tools(f"tools[{index}].function.name must differ from the others, got {name!r} again")
        label = f"tools[{index}].function.parameters"
        schemas[name] = (_arguments_schema(tool["function"].get("parameters"), label), label)
    kind, named = _read_kind(tool_choice, bool(tools))
    if kind == "none" or not tools:
        return ToolChoice("none")
    if kind == "named":
        if named not in schemas:
            raise _bad_choice(
                f"tool_choice names {show(named, 80)}, which is not among the tools: {', '.join(schemas)}"
            )
        index = list(schemas).index(named)
        return ToolChoice(kind, (tools[index],), {named: schemas[named]})
    return ToolChoice(kind, tuple(tools), schemas, MAX_CALLS if parallel_tool_calls else 1)


def _read_kind(tool_choice: Any, has_tools: bool) -> tuple[str, str]:
    """(kind, the name when it is named)."""
    if tool_choice is None:
        return "auto", ""
    if tool_choice in ("auto", "none"):
        return tool_choice, ""
    if not has_tools:
        raise _bad_choice("tool_choice needs tools: send the tools that may be called")
    if tool_choice == "required":
        return "required", ""
    function = tool_choice.get("function") if isinstance(tool_choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not isinstance(tool_choice, dict) or tool_choice.get("type") != "function":
        raise _bad_choice(
            'tool_choice must be "auto", "none", "required" or {"type": "function", "function": {"name": ...}}, got '
            + show(tool_choice, 100)
        )
    return "named", name


def _checked_name(name: Any, place: str) -> str:
    if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
        raise _bad_tools(f"{place} must be 1 to 64 letters, digits, _ or -, got {show(name, 80)}")
    return name


def _arguments_schema(parameters: Any, label: str) -> dict[str, Any]:
    """The schema of a tool's arguments, limits checked."""
    if parameters is None:
        return dict(NO_PARAMETERS)
    if not isinstance(parameters, dict):
        raise _bad_tools(f"{label} must be a JSON schema of an object, got {show(parameters, 60)}")
    try:
        StructuredOutputsParams(json=parameters)
    except InvalidRequestError as error:
        raise _bad_tools(error.message.replace("structured_outputs.json", label, 1).rstrip(".")) from None
    if parameters.get("type", "object") != "object":
        raise _bad_tools(f"{label}.type must be object, got {show(parameters['type'], 60)}")
    schema = {**parameters, "type": "object"}
    if "properties" in schema and not OPEN_KEYWORDS & schema.keys():
        schema["additionalProperties"] = False
    return schema


def _bad_tools(message: str) -> InvalidRequestError:
    return InvalidRequestError(f"{message}.", parameter="tools")


def _bad_choice(message: str) -> InvalidRequestError:
    return InvalidRequestError(f"{message}.", parameter="tool_choice")
