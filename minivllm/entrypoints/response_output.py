"""The output of one answer of the Responses API: items that grow, and the events that tell of every change.

    deltas of the turn ── add ──▶ output_item.added, content_part.added, ...delta ──┐
    the end            ── close ─▶ ...done, content_part.done, output_item.done ────┴─▶ events without numbers

One item grows at a time: what belongs to another ends it. An item is the same in its last event and in the body.

Knows no HTTP and no engine. Called by response_object.py. Twin in vLLM: vllm/entrypoints/openai/responses/
streaming_events.py.
"""

from __future__ import annotations

import uuid
from typing import Any

from minivllm.entrypoints.deltas import ContentDelta, Delta, ReasoningDelta
from minivllm.entrypoints.response_store import Item

Event = dict[str, Any]
Logprobs = list[dict[str, Any]]  # one entry per token


def new_id(prefix: str) -> str:
    """Long enough that nobody guesses the id of somebody else's answer."""
    return f"{prefix}_{uuid.uuid4().hex}"


class Output:
    """The items of one answer, in order."""

    def __init__(self) -> None:
        self._items: list[_Item] = []

    @property
    def is_empty(self) -> bool:
        return not self._items

    @property
    def reasoning(self) -> str:
        """All that was thought."""
        return "".join(item.text for item in self._items if isinstance(item, _Reasoning))

    @property
    def ends_in_message(self) -> bool:
        return bool(self._items) and isinstance(self._items[-1], _Message)

    def as_list(self) -> list[Item]:
        """As the body has it; copies."""
        return [item.as_dict() for item in self._items]

    def add(self, delta: Delta, logprobs: Logprobs | None = None) -> list[Event]:
        """logprobs: of the tokens that came out as this text."""
        key = _key(delta)
        events: list[Event] = []
        if not self._items or self._items[-1].key != key:
            events += self.close("completed")
            item = _KINDS[key[0]](len(self._items), key, delta)
            self._items.append(item)
            events += item.opened()
        text = delta.text if isinstance(delta, ContentDelta | ReasoningDelta) else delta.arguments
        return events + self._items[-1].grown(text, logprobs or [])

    def close(self, status: str, quietly: bool = False) -> list[Event]:
        """Nothing more comes for the last item. quietly: nobody is told."""
        if not self._items or self._items[-1].status != "in_progress":
            return []
        self._items[-1].status = status
        return [] if quietly else self._items[-1].closed()


def _key(delta: Delta) -> tuple[str, int]:
    """Which item a delta belongs to."""
    if isinstance(delta, ContentDelta):
        return ("message", 0)
    if isinstance(delta, ReasoningDelta):
        return ("reasoning", 0)
    return ("function_call", delta.index)


class _Item:
    """An item: what it is called, where it stands, and what it says so far."""

    prefix = ""

    def __init__(self, output_index: int, key: tuple[str, int], delta: Delta):
        self.key = key
        self.id = new_id(self.prefix)
        self.status = "in_progress"
        self._output_index = output_index
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def as_dict(self) -> Item:
        """Status included."""
        raise NotImplementedError

    def opened(self) -> list[Event]:
        return [self._item_event("response.output_item.added")]

    def grown(self, text: str, logprobs: Logprobs) -> list[Event]:
        """More text. Nothing is nothing to tell."""
        raise NotImplementedError

    def closed(self) -> list[Event]:
        return [self._item_event("response.output_item.done")]

    def _item_event(self, kind: str) -> Event:
        return {"type": kind, "output_index": self._output_index, "item": self.as_dict()}

    def _event(self, kind: str, **fields: Any) -> Event:
        return {"type": kind, "item_id": self.id, "output_index": self._output_index, **fields}


class _Spoken(_Item):
    """An item with one part of text in it."""

    event_prefix = ""
    _has_part = False

    def part(self) -> dict[str, Any]:
        raise NotImplementedError

    def opened(self) -> list[Event]:
        events = super().opened()  # without the part, which is told of by itself
        self._has_part = True
        return [*events, self._part_event("response.content_part.added")]

    def closed(self) -> list[Event]:
        done = self._event(f"{self.event_prefix}.done", content_index=0, **self._done_fields())
        return [done, self._part_event("response.content_part.done"), *super().closed()]

    def content(self) -> list[dict[str, Any]]:
        return [self.part()] if self._has_part else []

    def _done_fields(self) -> dict[str, Any]:
        return {"text": self.text}

    def _part_event(self, kind: str) -> Event:
        return self._event(kind, content_index=0, part=self.part())


class _Message(_Spoken):
    """What the model says."""

    prefix, event_prefix = "msg", "response.output_text"

    def __init__(self, output_index: int, key: tuple[str, int], delta: Delta):
        super().__init__(output_index, key, delta)
        self._logprobs: Logprobs = []

    def as_dict(self) -> Item:
        fields = {"id": self.id, "type": "message", "status": self.status, "role": "assistant"}
        return {**fields, "content": self.content()}

    def part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": list(self._logprobs)}

    def grown(self, text: str, logprobs: Logprobs) -> list[Event]:
        if not text and not logprobs:
            return []
        self._texts.append(text)
        self._logprobs += logprobs
        return [self._event("response.output_text.delta", content_index=0, delta=text, logprobs=logprobs)]

    def _done_fields(self) -> dict[str, Any]:
        return {"text": self.text, "logprobs": list(self._logprobs)}


class _Reasoning(_Spoken):
    """What the model thinks before."""

    prefix, event_prefix = "rs", "response.reasoning_text"

    def as_dict(self) -> Item:
        fields = {"id": self.id, "type": "reasoning", "status": self.status, "summary": []}
        return {**fields, "content": self.content(), "encrypted_content": None}

    def part(self) -> dict[str, Any]:
        return {"type": "reasoning_text", "text": self.text}

    def grown(self, text: str, logprobs: Logprobs) -> list[Event]:
        if not text:
            return []
        self._texts.append(text)
        return [self._event("response.reasoning_text.delta", content_index=0, delta=text)]


class _Call(_Item):
    """A call of a function: the item has an id, and the call has another, which the function's answer names."""

    prefix = "fc"

    def __init__(self, output_index: int, key: tuple[str, int], delta: Delta):
        super().__init__(output_index, key, delta)
        self._call_id = getattr(delta, "id", None) or new_id("call")
        self._name = getattr(delta, "name", None) or ""

    def as_dict(self) -> Item:
        fields = {"id": self.id, "type": "function_call", "status": self.status, "call_id": self._call_id}
        return {**fields, "name": self._name, "arguments": self.text}

    def grown(self, text: str, logprobs: Logprobs) -> list[Event]:
        if not text:
            return []
        self._texts.append(text)
        return [self._event("response.function_call_arguments.delta", delta=text)]

    def closed(self) -> list[Event]:
        done = self._event("response.function_call_arguments.done", name=self._name, arguments=self.text)
        return [done, *super().closed()]


_KINDS: dict[str, type[_Item]] = {"message": _Message, "reasoning": _Reasoning, "function_call": _Call}
