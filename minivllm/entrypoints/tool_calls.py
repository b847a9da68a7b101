"""How models write tool calls, by model family; and a reader that finds the calls in a growing text.

    hermes        <tool_call>\\n{"name": "f", "arguments": {...}}\\n</tool_call>     Qwen 2.5 and 3, Hermes; fallback
    llama3_json   {"name": "f", "parameters": {...}}; {...}                      Llama 3.1 and later
    mistral       [TOOL_CALLS][{"name": "f", "arguments": {...}}, {...}]         Mistral up to 2024
    mistral_args  [TOOL_CALLS]f[ARGS]{...}                                       Mistral since
    pythonic      [f(a=1, b="x"), g()]                                           Llama 3.2 small, Llama 4

A ToolFormat is both: what the grammar makes a model write (`answer_fields`), and what CallReader reads. The grammar
leaves no choice but the text before a call, the tools' names and the arguments, so the reader knows every call to the
character, arguments stream as they are written, and nothing is guessed or repaired. In every format arguments are JSON:
in the pythonic one each value is.

transformers' streaming ResponseParser was tried and is not used: a `</tool_call>` inside of a JSON string ends its
region and raises in the middle of the stream, an answer that is cut inside of a call raises at the end, and arguments
come out only as raw pieces of the whole region (5.24).

Knows no HTTP. Called by turn.py. Twin in vLLM: vllm/tool_parsers/.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from minivllm.entrypoints.deltas import ContentDelta, Delta, ToolCallDelta
from minivllm.entrypoints.reasoning import held_back
from minivllm.sampling_params import CallForm


# ------------------------------------------------------------------ formats
@dataclasses.dataclass(frozen=True, slots=True)
class ToolFormat:
    """opening, then calls with separators between them, then closing; a call is `before` name `between` arguments
    `after`. The other fields are AnswerForm's.

    in_templates: texts by which a chat template shows that its model writes so; one of them is enough.
    id_chars: of the ids of calls, where the template is particular about them.
    """

    before: str
    between: str
    after: str
    trigger: str
    opening: str = ""
    separator: str = ""
    closing: str = ""
    only_at_start: bool = False
    keywords: bool = False
    in_templates: tuple[str, ...] = ()
    not_in_templates: tuple[str, ...] = ()
    id_chars: int = 0

    def begin(self, name: str) -> str:
        """A call up to its arguments."""
        return f"{self.before}{name}{self.between}"

    def answer_fields(self, schemas: Mapping[str, tuple[Any, str]]) -> dict[str, Any]:
        """Fields of AnswerForm. schemas: name -> (schema of the arguments, what errors call it)."""
        calls = tuple(
            CallForm(self.begin(name), schema, self.after, label) for name, (schema, label) in schemas.items()
        )
        names = ("opening", "separator", "closing", "trigger", "only_at_start", "keywords")
        return {"calls": calls, **{name: getattr(self, name) for name in names}}

    def new_id(self) -> str:
        return secrets.token_hex(16)[: self.id_chars] if self.id_chars else f"call_{secrets.token_hex(12)}"


TOOL_FORMATS: Mapping[str, ToolFormat] = MappingProxyType(
    {
        "hermes": ToolFormat(
            before='<tool_call>\n{"name": "',
            between='", "arguments": ',
            after="}\n</tool_call>",
            trigger="<tool_call>",
            separator="\n",
            in_templates=("<tool_call>",),
            not_in_templates=("<function=", "<arg_key>"),  # XML inside of the same mark: not built
        ),
        "mistral_args": ToolFormat(
            before="[TOOL_CALLS]",
            between="[ARGS]",
            after="",
            trigger="[TOOL_CALLS]",
            in_templates=("[ARGS]",),
            not_in_templates=("[CALL_ID]",),
            id_chars=9,
        ),
        "mistral": ToolFormat(
            before='{"name": "',
            between='", "arguments": ',
            after="}",
            trigger="[TOOL_CALLS]",
            opening="[TOOL_CALLS][",
            separator=", ",
            closing="]",
            in_templates=("[TOOL_CALLS]",),
            not_in_templates=("[ARGS]",),
            id_chars=9,
        ),
        "llama3_json": ToolFormat(
            before='{"name": "',
            between='", "parameters": ',
            after="}",
            trigger='{"name": "',
            separator="; ",
            only_at_start=True,
            in_templates=('{"name": function name, "parameters":', '"parameters": dictionary of argument name'),
        ),
        "pythonic": ToolFormat(
            before="",
            between="(",
            after=")",
            trigger="[",
            opening="[",
            separator=", ",
            closing="]",
            only_at_start=True,
            keywords=True,
            in_templates=("[func_name1(", "[func_name("),
        ),
    }
)
ALIASES: Mapping[str, str] = MappingProxyType(
    {"qwen": "hermes", "qwen3_json": "hermes", "llama4_pythonic": "pythonic", "llama4_json": "llama3_json"}
)
TOOL_CALL_PARSERS = frozenset({"auto", *TOOL_FORMATS, *ALIASES})


def find_format(parser: str, template: str) -> tuple[ToolFormat, bool]:
    """The format that the server's --tool-call-parser names, or the template's; and whether the template knows it.

    A template that shows no known format: Hermes, and the template cannot be trusted to tell the model about tools.
    """
    for name, shape in TOOL_FORMATS.items():
        is_shown = any(text in template for text in shape.in_templates)
        if is_shown and not any(text in template for text in shape.not_in_templates):
            shown = name
            break
    else:
        shown = ""
    wanted = ALIASES.get(parser, parser)
    chosen = (shown or "hermes") if wanted == "auto" else wanted
    return TOOL_FORMATS[chosen], chosen == shown or (wanted != "auto" and not shown)


# ------------------------------------------------------------------ JSON as it grows
class JSONEnd:
    """Finds the end of one JSON value in a text that grows."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._is_escaped = False
        self._is_bare = False  # a number, true, false or null: ends before what follows

    def advance(self, text: str) -> int | None:
        """The number of characters of this text that belong to the value when it ends here; None: all, and more."""
        for index, char in enumerate(text):
            if self._in_string:
                if self._is_escaped:
                    self._is_escaped = False
                elif char == "\\":
                    self._is_escaped = True
                elif char == '"':
                    self._in_string = False
                    if not self._depth:
                        return index + 1
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]" and self._depth:
                self._depth -= 1
                if not self._depth:
                    return index + 1
            elif not self._depth and self._is_bare and char in ",)]} \n":
                return index
            elif not self._depth and not char.isspace():
                self._is_bare = True
        return None


# ------------------------------------------------------------------ reading
class CallReader:
    """Reads one choice: text, then calls in one format. What turns out to be no call comes out as text.

    Attributes:
        num_calls: so far.
        is_cut: the text ended inside of a call.
    """

    def __init__(self, shape: ToolFormat, names: Sequence[str]):
        self.num_calls = 0
        self.is_cut = False
        self._shape = shape
        self._first = {shape.opening + shape.begin(name): name for name in names}
        self._next = {shape.separator + shape.begin(name): name for name in names}
        self._text = ""  # not yet understood
        self._blanks = ""  # before it: part of the text unless a call follows
        self._step: Callable[[bool], list[Delta] | None] = self._read_text
        self._json = JSONEnd()
        self._num_keywords = 0

    def advance(self, text: str, is_last: bool) -> list[Delta]:
        """What new text means. is_last: nothing follows, so nothing may be held back."""
        self._text += text
        found: list[Delta] = []
        while True:
            step = self._step
            deltas = step(is_last)
            found += deltas or []
            if deltas is None or (not self._text and self._step == step):
                break
        if is_last:
            self.is_cut = self.num_calls > 0 and self._step not in (self._read_more, self._read_rest)
            rest, self._blanks, self._text = self._blanks + self._text, "", ""
            if rest and not self.num_calls:
                found.append(ContentDelta(rest))
        return found

    # Every step takes what it understands off self._text. None: it needs more.
    def _read_text(self, is_last: bool) -> list[Delta] | None:
        """Text before a call, up to where a call may begin."""
        if self._shape.only_at_start:
            return self._read_start()
        start = self._text.find(self._shape.trigger)
        num_held = 0 if is_last else held_back(self._text, self._shape.trigger)
        end = len(self._text) - num_held if start < 0 else len(self._text[:start].rstrip())
        text = self._text[:end]
        if start >= 0:
            self._blanks, self._text = self._text[end:start], self._text[start:]
            self._step = self._read_first
            return [ContentDelta(text)] if text else []
        self._text = self._text[end:]
        return [ContentDelta(text)] if text else None

    def _read_start(self) -> list[Delta] | None:
        stripped = self._text.lstrip(" \n")  # what the grammar allows before a call
        if any(stripped.startswith(begin) for begin in self._first):
            self._blanks, self._text = self._text[: len(self._text) - len(stripped)], stripped
            self._step = self._read_first
            return []
        if any(begin.startswith(stripped) for begin in self._first):
            return None
        self._step = self._read_rest
        return []

    def _read_rest(self, is_last: bool) -> list[Delta] | None:
        """Only text follows."""
        text, self._text = self._text, ""
        return [ContentDelta(text)] if text else None

    def _read_first(self, is_last: bool) -> list[Delta] | None:
        return self._read_begin(self._first)

    def _read_more(self, is_last: bool) -> list[Delta] | None:
        """Another call, or the end of all calls."""
        if self._shape.closing and self._text.startswith(self._shape.closing):
            self._text = self._text[len(self._shape.closing) :]
            self._step = self._read_rest
            return []
        return self._read_begin(self._next)

    def _read_begin(self, begins: Mapping[str, str]) -> list[Delta] | None:
        for begin, name in begins.items():
            if self._text.startswith(begin):
                self._text, self._blanks = self._text[len(begin) :], ""
                self._json, self._num_keywords = JSONEnd(), 0
                self._step = self._read_keyword if self._shape.keywords else self._read_arguments
                self.num_calls += 1
                return [ToolCallDelta(self.num_calls - 1, "", self._shape.new_id(), name)]
        if any(begin.startswith(self._text) for begin in begins):
            return None
        self._text, self._blanks = self._blanks + self._text, ""
        self._step = self._read_rest
        return []

    def _read_arguments(self, is_last: bool) -> list[Delta] | None:
        """A JSON value: all arguments, or one keyword's."""
        end = self._json.advance(self._text)
        fragment, self._text = self._text[:end], self._text[len(self._text[:end]) :]
        if end is not None:
            self._step = self._read_keyword if self._shape.keywords else self._read_end
        return self._fragment(fragment) or (None if end is None else [])

    def _read_keyword(self, is_last: bool) -> list[Delta] | None:
        """name= or , name= or the end of the call."""
        if self._text.startswith(self._shape.after):
            self._step = self._read_end
            return self._fragment("}" if self._num_keywords else "{}")
        name, mark, rest = self._text.partition("=")
        if not mark:
            return None
        self._text = rest
        opening = ", " if self._num_keywords else "{"
        self._json, self._num_keywords = JSONEnd(), self._num_keywords + 1
        self._step = self._read_arguments
        return self._fragment(f"{opening}{json.dumps(name.removeprefix(', '))}: ")

    def _read_end(self, is_last: bool) -> list[Delta] | None:
        after = self._shape.after
        if self._text.startswith(after):
            self._text = self._text[len(after) :]
            self._step = self._read_more
            return []
        if after.startswith(self._text):
            return None
        self._step = self._read_rest
        return []

    def _fragment(self, text: str) -> list[Delta]:
        return [ToolCallDelta(self.num_calls - 1, text)] if text else []


class NamedReader:
    """Reads the bare arguments of the one tool that had to be called."""

    def __init__(self, name: str):
        self.num_calls = 0
        self.is_cut = False
        self._name = name
        self._json = JSONEnd()

    def advance(self, text: str, is_last: bool) -> list[Delta]:
        """The call as soon as there is something of it."""
        found: list[Delta] = []
        if text and not self.num_calls:
            self.num_calls, self.is_cut = 1, True
            found.append(ToolCallDelta(0, "", f"call_{secrets.token_hex(12)}", self._name))
        if text:
            self.is_cut = self.is_cut and self._json.advance(text) is None
            found.append(ToolCallDelta(0, text))
        return found
