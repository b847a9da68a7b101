"""What readers of an answer say: more text, more thinking, more of a tool call; and the message that these make.

Knows no format and no wire. Made by reasoning.py and tool_calls.py, put on the wire by chat.py and responses.py.
Twin in vLLM: DeltaMessage in vllm/entrypoints/openai/engine/protocol.py.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class ContentDelta:
    """More of the answer's text."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of what the model thinks before it answers."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """More of a tool call. The first delta of an index has id and name, later ones have neither.

    arguments: a fragment; all fragments of one index joined are one JSON object, unless the answer was cut.
    """

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


Delta = ContentDelta | ReasoningDelta | ToolCallDelta


@dataclasses.dataclass(slots=True)
class ToolCall:
    """One call of a whole message. arguments: JSON text."""

    id: str
    name: str
    arguments: str = ""


@dataclasses.dataclass(slots=True)
class Message:
    """A whole answer, taken apart."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = dataclasses.field(default_factory=list)

    def add(self, delta: Delta) -> None:
        if isinstance(delta, ContentDelta):
            self.content += delta.text
        elif isinstance(delta, ReasoningDelta):
            self.reasoning += delta.text
        elif delta.index == len(self.tool_calls):
            self.tool_calls.append(ToolCall(delta.id or "", delta.name or "", delta.arguments))
        else:
            self.tool_calls[delta.index].arguments += delta.arguments
