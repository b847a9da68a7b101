"""Items of the Responses API -> the messages, tools and tool choice that chat has.

    input, previous_response_id ── expand ──▶ items, references replaced ── to_messages ──▶ messages
    {type: function, name, ...} ── to_chat_tools ──▶ {type: function, function: {name, ...}}

Items are taken as clients really send them: without type, id or status, with texts in place of parts. What an assistant
said and called in one go is one message, however many items it came in.

Knows no HTTP and no engine. Called by responses.py. Twin in vLLM: vllm/entrypoints/openai/responses/utils.py.
"""

from __future__ import annotations

from typing import Any

from minivllm.entrypoints.response_store import Item, ResponseStore
from minivllm.errors import InvalidRequestError, show

Message = dict[str, Any]
ROLES = ("assistant", "developer", "system", "user")
TEXT_PARTS = ("input_text", "output_text", "text")
MAX_ITEMS = 2048  # of one conversation


# ------------------------------------------------------------------ which items
def expand(
    given: str | list[Any] | None, previous_response_id: str | None, store: ResponseStore
) -> tuple[list[Item], int]:
    """The whole conversation as items, and how many of them are from earlier turns. Raises ClientError."""
    if not given:
        raise InvalidRequestError("input must be a text or a list of at least one item.", parameter="input")
    items: list[Item] = []
    if previous_response_id is not None:
        previous = store.get(previous_response_id, "previous_response_id")
        response = previous.read()
        if response["status"] == "in_progress":
            raise InvalidRequestError(
                "previous_response_id is still running: wait for its end, or cancel it.",
                parameter="previous_response_id",
            )
        items += [*previous.history, *response["output"]]
    num_earlier = len(items)
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if len(items) + len(given) > MAX_ITEMS:
        raise InvalidRequestError(
            f"input must have at most {MAX_ITEMS} items, got {len(items) + len(given)} with the earlier turns.",
            parameter="input",
        )
    for index, item in enumerate(given):
        if not isinstance(item, dict):
            raise _bad(f"input[{index}]", f"must be an object, got {show(item, 60)}")
        if _kind(item) == "item_reference":
            item = store.item(_text(item.get("id"), f"input[{index}].id"), "input")
        items.append(item)
    return items, num_earlier


def _kind(item: Item) -> Any:
    """The type, which clients leave out of messages and references."""
    kind = item.get("type")
    if kind is None:
        return "message" if "role" in item else "item_reference" if set(item) <= {"id", "type"} else None
    return kind


# ------------------------------------------------------------------ messages
def to_messages(items: list[Item], instructions: str | None, num_earlier: int = 0) -> list[Message]:
    """num_earlier: errors count from there. Raises InvalidRequestError."""
    conversation = _Conversation(instructions)
    for number, item in enumerate(items):
        conversation.add(item, f"input[{number - num_earlier}]")
    for message in conversation.messages:
        if message["content"] is None and "tool_calls" not in message:  # it was cut while it was thinking
            message["content"] = ""
    return conversation.messages


class _Conversation:
    """Messages, as items are added to them."""

    def __init__(self, instructions: str | None):
        self.messages: list[Message] = [] if instructions is None else [{"role": "system", "content": instructions}]
        self._call_ids: set[str] = set()

    def add(self, item: Item, place: str) -> None:
        kind = _kind(item)
        if kind == "message":
            self._add_message(item, place)
        elif kind == "function_call":
            self._add_call(item, place)
        elif kind == "function_call_output":
            self._add_output(item, place)
        elif kind == "reasoning":
            self._add_reasoning(item, place)
        else:
            raise _bad(
                f"{place}.type",
                "must be message, function_call, function_call_output, reasoning or item_reference, "
                f"got {show(kind, 60)}",
            )

    def _add_message(self, item: Item, place: str) -> None:
        role = item.get("role")
        if role not in ROLES:
            advice = "; the answer of a tool is an item {type: function_call_output}" if role == "tool" else ""
            raise _bad(f"{place}.role", f"must be one of {', '.join(ROLES)}, got {show(role, 60)}{advice}")
        content = _content(item.get("content"), f"{place}.content")
        if role == "assistant":
            message = self._turn("content")
            message["content"] = content
        elif role == "system" and len(self.messages) == 1 and self.messages[0]["role"] == "system":
            both = (_joined(self.messages[0]["content"]), _joined(content))
            self.messages[0]["content"] = "\n\n".join(both)  # many templates take one, in front
        else:
            self.messages.append({"role": role, "content": content})

    def _add_call(self, item: Item, place: str) -> None:
        call_id = _text(item.get("call_id"), f"{place}.call_id")
        function = {key: _text(item.get(key), f"{place}.{key}") for key in ("name", "arguments")}
        calls = self._turn().setdefault("tool_calls", [])
        calls.append({"id": call_id, "type": "function", "function": function})
        self._call_ids.add(call_id)

    def _add_output(self, item: Item, place: str) -> None:
        call_id = _text(item.get("call_id"), f"{place}.call_id")
        if call_id not in self._call_ids:
            raise _bad(f"{place}.call_id", f"{show(call_id, 60)} is no earlier function_call's: send that item too")
        output = _joined(_content(item.get("output"), f"{place}.output"))
        self.messages.append({"role": "tool", "tool_call_id": call_id, "content": output})

    def _add_reasoning(self, item: Item, place: str) -> None:
        parts = item.get("content") or item.get("summary") or []
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            raise _bad(f"{place}.content", "must be a list of {type: reasoning_text, text}")
        text = "".join(_text(part.get("text"), f"{place}.content") for part in parts)
        if text:
            self._turn("reasoning_content")["reasoning_content"] = text
        elif item.get("encrypted_content"):
            raise _bad(f"{place}.encrypted_content", "cannot be read here: leave the item out")

    def _turn(self, needed: str | None = None) -> Message:
        """The assistant's message that is being put together; a new one when `needed` is taken in it."""
        last = self.messages[-1] if self.messages else None
        if last is None or last["role"] != "assistant" or (needed and last.get(needed) is not None):
            last = {"role": "assistant", "content": None}
            self.messages.append(last)
        return last


def _content(content: Any, place: str) -> str | list[dict[str, str]]:
    """A text, or text parts as chat has them."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _bad(place, f"must be a text or a list of text parts, got {show(content, 60)}")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind in TEXT_PARTS:
            texts.append(_text(part.get("text"), f"{place}[{index}].text"))
        elif kind == "refusal":
            texts.append(_text(part.get("refusal"), f"{place}[{index}].refusal"))
        else:
            raise _bad(f"{place}[{index}].type", f"must be a text: this model sees no {show(kind, 60)}")
    if len(texts) < 2:
        return "".join(texts)
    return [{"type": "text", "text": text} for text in texts]


def _joined(content: str | list[dict[str, str]]) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise _bad(place, f"must be a string, got {show(value, 60)}")
    return value


def _bad(place: str, what: str) -> InvalidRequestError:
    return InvalidRequestError(f"{place} {what}.", parameter="input")


# ------------------------------------------------------------------ turns
def num_turns(messages: list[Message]) -> int:
    """A turn is what the user says, with all that follows it."""
    return sum(message["role"] == "user" for message in messages)


def without_turns(messages: list[Message], num_dropped: int) -> list[Message]:
    """Without the oldest turns; what the system said stays."""
    if not num_dropped:
        return messages
    starts = [index for index, message in enumerate(messages) if message["role"] == "user"]
    kept = [message for message in messages[: starts[num_dropped]] if message["role"] in ("system", "developer")]
    return kept + messages[starts[num_dropped] :]


# ------------------------------------------------------------------ tools
def to_chat_tools(tools: list[Any] | None) -> list[dict[str, Any]]:
    """Flat function tools, as chat has them. Raises InvalidRequestError."""
    found = []
    for index, tool in enumerate(tools or ()):
        kind = tool.get("type") if isinstance(tool, dict) else None
        if kind != "function":
            raise InvalidRequestError(
                f"tools[{index}].type must be function, got {show(kind, 60)}: no tool runs inside this server.",
                parameter="tools",
            )
        if "function" in tool:
            raise InvalidRequestError(
                f"tools[{index}] must be flat: {{type, name, description, parameters}}, without `function`.",
                parameter="tools",
            )
        function = {key: value for key, value in tool.items() if key != "type" and value is not None}
        found.append({"type": "function", "function": function})
    return found


def to_chat_tool_choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    """{type: function, name} as chat has it; words as they are. Raises InvalidRequestError."""
    if choice in (None, "auto", "none", "required"):
        return choice
    if not isinstance(choice, dict) or choice.get("type") != "function" or not isinstance(choice.get("name"), str):
        raise InvalidRequestError(
            f'tool_choice must be "auto", "none", "required" or {{type: "function", name}}, got {show(choice, 60)}.',
            parameter="tool_choice",
        )
    return {"type": "function", "function": {"name": choice["name"]}}
