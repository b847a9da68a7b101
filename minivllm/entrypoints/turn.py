"""One turn of a conversation: what the model is shown, what its answer must look like, and how the answer is read.

    messages, template options ── begin_turn ──▶ Turn: prompt + sampling fields ──▶ the engine
    text of one choice, as it grows ── MessageReader ──▶ [ContentDelta | ReasoningDelta | ToolCallDelta]

A whole answer is read by the same reader, in one piece (`read_message`): so a stream and a body never differ.

Knows no HTTP and no shape of the wire. Called by chat.py. Twin in vLLM: vllm/entrypoints/openai/chat_completion/
serving.py (where it is part of the serving class) and vllm/parser/.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from minivllm.engine.input_processor import PromptType
from minivllm.entrypoints.service import Service


# ------------------------------------------------------------------ what a reader says
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


class MessageReader:
    """Reads the answer of one choice. This one takes everything for content.

    Attributes:
        finish_reason: replaces the engine's "stop" when the answer ended in something else ("tool_calls").
    """

    finish_reason: str | None = None

    def advance(self, text: str, is_last: bool) -> list[Delta]:
        """What new text means. is_last: nothing follows, so nothing may be held back."""
        return [ContentDelta(text)] if text else []


# ------------------------------------------------------------------ a whole message
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


def read_message(reader: MessageReader, text: str) -> Message:
    """A complete text as a message."""
    message = Message()
    for delta in reader.advance(text, is_last=True):
        message.add(delta)
    return message


# ------------------------------------------------------------------ the turn
@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    """sampling_fields: what the turn itself asks of the sampler, such as the form of the answer."""

    prompt: PromptType
    sampling_fields: dict[str, Any] = dataclasses.field(default_factory=dict)

    def new_reader(self) -> MessageReader:
        """One for each choice: a reader remembers what it has seen."""
        return MessageReader()


def begin_turn(service: Service, messages: Any, **template_options: Any) -> Turn:
    """Raises ClientError."""
    return Turn(service.engine.engine.render_chat(messages, **template_options))
