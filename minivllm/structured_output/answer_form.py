"""AnswerForm -> llguidance's grammar of the whole answer: thinking, then text or tool calls.

    thinking   free until its closing mark
    text       free, but never the trigger of a call; or a form of its own (a JSON schema, a regular expression, ...)
    a call     from the trigger on every character is fixed, up to the arguments, which follow the tool's own schema

Three things about llguidance's lexer shape what is written here: a lexeme is as long as it can be and nothing is
tried again, so text that ends at a mark is one lazy lexeme with the mark in it; no lexeme may be empty; and a special
token is no text, so a mark that the tokenizer has as one is written by its id.

Knows no matcher. Called by manager.py. Twin in vLLM: structural tags in vllm/v1/structured_output/backend_guidance.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from minivllm.errors import InvalidRequestError
from minivllm.sampling_params import AnswerForm, CallForm, StructuredOutputsParams
from minivllm.structured_output.schema import Schema, prepare_schema

BLANKS = r"/[ \n]{1,4}/"  # that may stand between thinking and a document or a call
KEYWORD_SCHEMA = frozenset({"type", "properties", "required", "additionalProperties", "$defs", "definitions"})
IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)

Schemas = dict[str, Any]
TextGrammar = Callable[[StructuredOutputsParams], str]


def answer_grammar(
    form: AnswerForm, special_ids: Mapping[str, int], json_options: Mapping[str, Any], text_grammar: TextGrammar
) -> str:
    """llguidance's grammar. Raises InvalidRequestError naming the tool whose schema cannot be used.

    Args:
        special_ids: of the tokens that are no text.
        json_options: how JSON is written, as in every other structured output.
        text_grammar: the grammar of form.text.
    """
    writer = _Writer(form, special_ids, json_options)
    grammars = [{"name": "start", "lark_grammar": writer.lark()}]
    if form.text is not None and form.allows_text:
        own = text_grammar(form.text)
        first, *others = json.loads(own)["grammars"] if own.startswith("{") else [{"lark_grammar": own}]
        grammars += [{**first, "name": "text"}, *others]
    return json.dumps({"grammars": grammars})


class _Writer:
    """Collects the rules of one grammar."""

    def __init__(self, form: AnswerForm, special_ids: Mapping[str, int], json_options: Mapping[str, Any]):
        self._form = form
        self._special_ids = special_ids
        self._json_options = dict(json_options)
        self._rules: list[str] = []

    def lark(self) -> str:
        form = self._form
        answers = self._answers()
        self._rule("answer", answers)
        start = ["answer"]
        if form.thinking != "none":
            opened, closed = form.think_marks
            blanks = "" if form.text is None and form.allows_text else f"({BLANKS})?"
            thinking = f"{self._until('thinking', closed)} {blanks} answer"
            start = [thinking] if form.thinking == "begun" else ["answer", f"{self._mark(opened)} {thinking}"]
        return "\n".join(["%llguidance {}", f"start: {' | '.join(start)}", *self._rules])

    # ------------------------------------------------------------------ an answer behind its thinking
    def _answers(self) -> list[str]:
        """Its alternatives."""
        form = self._form
        answers = []
        if form.allows_text and form.text is not None:
            answers.append("@text")
        elif form.allows_text:
            self._rules.append(f"FREE: {self._free_text()}")
            answers.append("FREE?")
        if not form.calls:
            return answers
        self._rule("call", [self._call(i, form.separator, call) for i, call in enumerate(form.calls)])
        more = f" (call){{0,{form.max_calls - 1}}}" if form.max_calls > 1 else ""
        more += f" {self._mark(form.closing)}"
        if not form.allows_text or form.text is not None or form.only_at_start:
            self._rule("first", [self._call(i, form.opening, call) for i, call in enumerate(form.calls)])
            return [*answers, f"first{more}"]
        rest = [self._call(i, form.opening, call, form.trigger) for i, call in enumerate(form.calls)]
        self._rule("first", rest)
        return [*answers, f"{self._until('head', form.trigger)} first{more}"]

    def _free_text(self) -> str:
        """A regular expression: anything that is no thinking, and holds no trigger where a call could begin."""
        form, parts = self._form, ["/(?s:.+)/"]
        if form.thinking == "may":
            parts.append(f"~/{_regex(form.think_marks[0])}(?s:.*)/")
        if form.calls and form.only_at_start:
            begins = "|".join(_regex((form.opening + call.begin).rstrip()) for call in form.calls)
            parts.append(rf"~/[ \n]*({begins})(?s:.*)/")
        elif form.calls:
            parts.append(f"~/(?s:.*){_regex(form.trigger)}(?s:.*)/")
        return " & ".join(parts)

    def _until(self, name: str, mark: str) -> str:
        """Free text up to a mark, the mark included."""
        if mark in self._special_ids:
            self._rules.append(f"{name.upper()}: /(?s:.+)/ & ~/(?s:.*){_regex(mark)}(?s:.*)/")
            return f"{name.upper()}? {self._mark(mark)}"
        no_thinking = f" & ~/{_regex(self._form.think_marks[0])}(?s:.*)/"
        extra = no_thinking if name == "head" and self._form.thinking == "may" else ""
        self._rules += [f"{name}[lazy]: {name.upper()}", f"{name.upper()}: /(?s:.*){_regex(mark)}/{extra}"]
        return name

    # ------------------------------------------------------------------ calls
    def _call(self, index: int, lead: str, call: CallForm, written: str = "") -> str:
        """One call behind `lead`. written: the beginning that stands there already."""
        name = f"arguments_{index}"
        if not any(rule.startswith(f"{name}: ") for rule in self._rules):
            schema = self._prepared(call)
            if self._form.keywords:
                self._keywords(name, schema, call.label)
            else:
                self._rules.append(f"{name}: {self._json(schema)}")
        begin = (lead + call.begin).removeprefix(written)
        if self._form.only_at_start and self._form.allows_text and lead == self._form.opening:
            return rf"/[ \n]{{0,4}}{_regex(begin)}/ {name} {self._mark(call.end)}"
        return f"{self._mark(begin)} {name} {self._mark(call.end)}"

    def _prepared(self, call: CallForm) -> Schema:
        try:
            schema = prepare_schema(call.schema)
        except InvalidRequestError as error:
            message = error.message.replace("structured_outputs.json", call.label, 1)
            raise InvalidRequestError(message, parameter="tools") from None
        if schema is False:
            raise InvalidRequestError(f"{call.label} cannot be used: no arguments satisfy it.", parameter="tools")
        return schema

    def _keywords(self, name: str, schema: Schema, label: str) -> None:
        """name=value for every property, in order, separated by commas; those that are not required may be absent."""
        fields = schema if isinstance(schema, dict) else {}
        properties = {key: value for key, value in fields.get("properties", {}).items() if value is not False}
        required = set(fields.get("required", ()))
        strange = sorted(fields.keys() - KEYWORD_SCHEMA) + [key for key in properties if not IDENTIFIER.fullmatch(key)]
        strange += sorted(required - properties.keys())
        if strange:
            raise InvalidRequestError(
                f"{label} cannot be written as keyword arguments: {strange[0][:60]}. Use a model with another form of "
                "tool calls, or --tool-call-parser hermes.",
                parameter="tools",
            )
        shared: Schemas = {key: fields[key] for key in ("$defs", "definitions") if key in fields}
        for index, (key, value) in enumerate(properties.items()):
            one = self._json({**value, **shared} if isinstance(value, dict) else value)
            self._rules.append(f"{name}_v{index}: {one}")
            rest, skip = f"{name}_t{index + 1}", key not in required
            text = json.dumps(f"{key}=")
            self._rule(f"{name}_h{index}", [f"{text} {name}_v{index} {rest}", *([f"{name}_h{index + 1}"] * skip)])
            text = json.dumps(f", {key}=")
            self._rule(f"{name}_t{index}", [f"{text} {name}_v{index} {rest}", *([rest] * skip)])
        self._rules += [f'{name}_{kind}{len(properties)}: ""' for kind in "ht"]
        self._rules.append(f"{name}: {name}_h0")

    # ------------------------------------------------------------------ spelling
    def _rule(self, name: str, alternatives: list[str]) -> None:
        self._rules.append(f"{name}: {' | '.join(alternatives)}")

    def _json(self, schema: Schema) -> str:
        whole = schema if isinstance(schema, dict) else {}  # false was refused or left out
        return f"%json {json.dumps({'x-guidance': self._json_options, **whole})}"

    def _mark(self, text: str) -> str:
        """A fixed text, special tokens in it by their ids."""
        if not text:
            return ""
        marks = sorted((mark for mark in self._special_ids if mark in text), key=len, reverse=True)
        pieces = re.split(f"({'|'.join(map(re.escape, marks))})", text) if marks else [text]
        spelled = [f"<[{self._special_ids[p]}]>" if p in self._special_ids else json.dumps(p) for p in pieces if p]
        return " ".join(spelled)


def _regex(text: str) -> str:
    """Text as a regular expression between slashes."""
    return re.escape(text).replace("/", r"\/")
