"""Trace: everything that happened in an engine, as data, and the file that holds it, one JSON object per line.

    {"schema": "minivllm.trace", "version": 1, "settings": {...}, "engine": {...}, "environment": {...}, ...}
    {"event": "added", "request_id": "1", "prompt_token_ids": [...], "sampling_params": {...}, ...}
    {"event": "step", "number": 1, "rows": [{"request_id": "1", "action": "prefill", ...}], ...}

A field that has its default is left out, so a step of many requests is a few kilobytes and a file can be written while
the engine runs. A dict with "kind" is that class of sampling_params.py.

Knows no engine. Called by everybody in trace/. Twin in vLLM: none.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from minivllm.errors import ClientError
from minivllm.sampling_params import AnswerForm, CallForm, SamplingParams, StructuredOutputsParams
from minivllm.trace.records import (
    EVENTS,
    SCHEMA,
    SCHEMA_VERSION,
    Aborted,
    Added,
    CacheReset,
    Candidate,
    Draw,
    Event,
    Row,
    Stage,
    Step,
    belongs_to,
)

_FORMS: Mapping[str, type] = types.MappingProxyType(
    {kind.__name__: kind for kind in (StructuredOutputsParams, AnswerForm, CallForm)}
)
_HINTS: Mapping[type, dict[str, Any]] = types.MappingProxyType(
    {
        kind: typing.get_type_hints(kind)
        for kind in (*EVENTS.values(), Row, Draw, Stage, Candidate, SamplingParams, *_FORMS.values())
    }
)


class Moment(NamedTuple):
    """The cache in one step. A table is the block ids of one sequence, in order; a hash names a full block."""

    step: Step
    before: dict[str, list[int]]  # tables when the step is scheduled
    tables: dict[str, list[int]]  # while it is computed
    hashes: dict[int, str]  # of every block that a lookup can find

    def owners(self) -> dict[int, list[str]]:
        """{block: the sequences that hold it}"""
        found: dict[int, list[str]] = {}
        for request_id, block_ids in self.tables.items():
            for block_id in block_ids:
                found.setdefault(block_id, []).append(request_id)
        return found


@dataclass(slots=True)
class Trace:
    """Everything that happened, as data. `to_json` and `from_json` are inverse to each other."""

    header: dict[str, Any]
    events: list[Event] = field(default_factory=list)

    @property
    def steps(self) -> list[Step]:
        return [event for event in self.events if isinstance(event, Step)]

    @property
    def requests(self) -> list[Added]:
        return [event for event in self.events if isinstance(event, Added)]

    @property
    def request_ids(self) -> list[str]:
        """Of every sequence that some step decided about, in the order of their first decision."""
        return list(dict.fromkeys(row.request_id for step in self.steps for row in step.rows))

    @property
    def block_size(self) -> int:
        return int(self.header["engine"]["block_size"])

    def prompt_of(self, request_id: str) -> Added | None:
        """The request of a sequence: its own, or its parent's ("0_id" is a child of "id")."""
        return next((added for added in self.requests if belongs_to(request_id, added.request_id)), None)

    def output_token_ids(self, request_id: str) -> list[int]:
        """The output of a sequence."""
        rows = (step.row(request_id) for step in self.steps)
        return [token_id for row in rows if row is not None for token_id in row.new_token_ids]

    def text_of(self, request_id: str) -> str:
        """The texts of its tokens, joined; empty for a recording."""
        rows = (step.row(request_id) for step in self.steps)
        return "".join(text for row in rows if row is not None for text in row.new_texts)

    def moments(self) -> Iterator[Moment]:
        """What the cache looks like in each step."""
        tables: dict[str, list[int]] = dict(self.header["tables"])
        hashes: dict[int, str] = dict(self.header["named_blocks"])
        for event in self.events:
            if isinstance(event, Aborted):
                tables = {key: ids for key, ids in tables.items() if not belongs_to(key, event.request_id)}
            elif isinstance(event, CacheReset):
                hashes = {}
            elif isinstance(event, Step):
                before = tables
                tables = _tables_in(event, before)
                for row in event.rows:  # a block that is given away forgets what it held
                    hashes = {
                        key: h for key, h in hashes.items() if key not in row.new_block_ids or key in row.prefix_hits
                    }
                hashes = hashes | event.named_blocks
                yield Moment(event, before, tables, hashes)
                ended = {row.request_id for row in event.rows if row.finish_reason is not None}
                tables = {key: ids for key, ids in tables.items() if key not in ended}

    # ------------------------------------------------------------------ the file
    def lines(self) -> Iterator[str]:
        """The file, line by line."""
        yield header_line(self.header)
        yield from map(event_line, self.events)

    def to_json(self) -> str:
        return "\n".join(self.lines()) + "\n"

    def save(self, file: str | Path) -> None:
        """Write the file that `load` reads."""
        Path(file).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def from_json(cls, lines: str | Iterable[str]) -> Trace:
        """Raises ClientError for what is no trace, or one of another version."""
        found = lines.split("\n") if isinstance(lines, str) else lines
        objects = (_parse(number, line) for number, line in enumerate(found, 1) if line.strip())
        header = next(objects, {})
        if header.get("schema") != SCHEMA or header.get("version") != SCHEMA_VERSION:
            got = f"{header.get('schema')!r} version {header.get('version')!r}"
            raise ClientError(f"expected a trace, schema {SCHEMA} version {SCHEMA_VERSION}, got {got}.")
        trace = cls(header)
        for item in objects:
            if item.get("event") not in EVENTS:
                raise ClientError(f"a trace has no event {item.get('event')!r}; it has {', '.join(EVENTS)}.")
            trace.events.append(_build(EVENTS[item.pop("event")], item))
        return trace

    @classmethod
    def load(cls, file: str | Path) -> Trace:
        """Read a file. Raises ClientError where it cannot be read or is no trace."""
        try:
            with Path(file).open(encoding="utf-8") as lines:
                return cls.from_json(lines)
        except (OSError, UnicodeDecodeError) as error:
            raise ClientError(f"cannot read {file}: {getattr(error, 'strerror', 'it is not UTF-8')}") from None


def _tables_in(step: Step, before: dict[str, list[int]]) -> dict[str, list[int]]:
    """The tables of a step, from those before it."""
    tables = dict(before)
    for row in step.rows:
        if row.action == "preempt":
            tables.pop(row.request_id, None)
        elif row.num_scheduled_tokens:
            tables[row.request_id] = [*tables.get(row.request_id, ()), *row.new_block_ids]
    return tables


def header_line(header: dict[str, Any]) -> str:
    """The first line."""
    return _to_line(header)


def event_line(event: Event) -> str:
    """One JSON object."""
    name = next(name for name, kind in EVENTS.items() if type(event) is kind)
    return _to_line({"event": name, **plain(event)})


def _to_line(value: dict[str, Any]) -> str:
    """Text stays readable; half of a surrogate pair, which has no UTF-8 form, makes its line ASCII."""
    line = json.dumps(value, ensure_ascii=False)
    return line if line.isascii() or not any("\ud800" <= char <= "\udfff" for char in line) else json.dumps(value)


def plain(value: Any) -> Any:
    """Records as dicts without the fields that have their default."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = {"kind": type(value).__name__} if type(value).__name__ in _FORMS else {}
        names = [of.name for of in dataclasses.fields(value) if not _is_default(value, of)]
        return kind | {name: plain(getattr(value, name)) for name in names}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value] if value and not isinstance(value[0], int) else list(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


def _is_default(record: Any, of: dataclasses.Field[Any]) -> bool:
    value = getattr(record, of.name)
    if of.default_factory is not dataclasses.MISSING:
        return bool(value == of.default_factory())
    return type(value) is type(of.default) and bool(value == of.default)


def _parse(number: int, line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ClientError(f"line {number} of the trace is no JSON object; the run that wrote it may have been cut off.")
    return found


def _build(kind: Any, item: dict[str, Any]) -> Any:
    """A record from a dict, by the types of its fields. Raises ClientError."""
    hints = _HINTS[kind]
    try:
        return kind(**{name: _convert(hints[name], value) for name, value in item.items()})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ClientError(f"the trace has a {kind.__name__} that is none: {error!r}") from None


def _convert(hint: Any, value: Any) -> Any:
    """A JSON value as the type `hint` says: records, lists and dicts of them; everything else is as it is."""
    if isinstance(value, dict) and value.get("kind") in _FORMS:
        return _build(_FORMS[value["kind"]], {name: item for name, item in value.items() if name != "kind"})
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is types.UnionType:
        fits = [
            one for one in arguments if isinstance(value, dict) and (dataclasses.is_dataclass(one) or _is_dict(one))
        ]
        return _convert(fits[0], value) if fits else value
    if dataclasses.is_dataclass(hint):
        return _build(hint, value)
    if typing.get_origin(hint) in (list, tuple) and arguments[0] is not int:
        return typing.get_origin(hint)(_convert(arguments[0], item) for item in value)
    if _is_dict(hint) and arguments[0] is int:
        return {int(key): item for key, item in value.items()}
    return value


def _is_dict(hint: Any) -> bool:
    return typing.get_origin(hint) is dict
