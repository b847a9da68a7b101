"""Tools and calls as plain text, for a model whose chat template knows neither.

    with_tools(messages, tools)   a description of the tools in the system message, in the words Hermes models learned
    without_calls(messages)       earlier calls as the assistant's text, their results as the user's
    with_short_ids(messages)      for templates that are particular about ids

The messages are normalised ones (input_processor.py), each content a text. Called by
turn.py. Twin in vLLM: none; there such a model has no tools.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]

OPENING = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>"""
CLOSING = """
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""


def with_tools(messages: Sequence[Message], tools: Sequence[Message], has_system_role: bool) -> list[Message]:
    """The tools behind the system message's own text; in front of the first user message where there is no system."""
    lines = "".join(f"\n{json.dumps(tool, ensure_ascii=False)}" for tool in tools)
    text = f"{OPENING}{lines}{CLOSING}"
    roles = [message["role"] for message in messages]
    if not has_system_role:
        index = roles.index("user") if "user" in roles else 0
        changed = {**messages[index], "content": f"{text}\n\n{messages[index].get('content', '')}"}
        return [*messages[:index], changed, *messages[index + 1 :]]
    if roles[0] in ("system", "developer"):
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def without_calls(messages: Sequence[Message]) -> list[Message]:
    """Every call as text. Results that follow one another are one message: many templates want turns to alternate."""
    found: list[Message] = []
    follows_result = False
    for message in messages:
        is_result = message["role"] == "tool"
        if is_result:
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if follows_result:
                text = f"{found.pop()['content']}\n{text}"
            found.append({"role": "user", "content": text})
        else:
            found.append(_with_calls_as_text(message))
        follows_result = is_result
    return found


def _with_calls_as_text(message: Message) -> Message:
    functions = [call["function"] for call in message.get("tool_calls", ())]
    if not functions:
        return message
    texts = [message["content"]] if message.get("content") else []
    for function in functions:
        call = {"name": function.get("name"), "arguments": function["arguments"]}
        texts.append(f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>")
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**rest, "content": "\n".join(texts)}


# ------------------------------------------------------------------ ids
def with_short_ids(messages: Sequence[Message], num_chars: int) -> list[Message]:
    """Ids of calls with exactly so many letters and digits; equal ones stay equal."""
    return [_with_short_ids(message, num_chars) for message in messages]


def _with_short_ids(message: Message, num_chars: int) -> Message:
    changed = dict(message)
    if "tool_call_id" in message:
        changed["tool_call_id"] = _short_id(message["tool_call_id"], num_chars)
    if "tool_calls" in message:
        calls = [{**call, "id": _short_id(call.get("id"), num_chars)} for call in message["tool_calls"]]
        changed["tool_calls"] = calls
    return changed


def _short_id(call_id: Any, num_chars: int) -> str:
    text = str(call_id)
    if len(text) == num_chars and text.isascii() and text.isalnum():
        return text
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:num_chars]
