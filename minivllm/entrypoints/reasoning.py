"""Thinking in front of an answer: whether a model thinks, and where its thinking ends in a growing text.

    thinking_mode(parser, template, prompt) ──▶ "none", "may" or "begun"
    ReasoningReader(mode).advance(text, is_last) ──▶ (thinking, the rest)

All known formats are one: <think> ... </think>. Some templates write the opening mark into the prompt, some let the
model write it, and some write both to switch thinking off; so the end of the prompt says what is to come. Blanks around
the marks belong to neither side.

Knows no tools and no grammar (AnswerForm says the same to structured_output/). Called by turn.py.
Twin in vLLM: vllm/reasoning/basic_parsers.py.
"""

from __future__ import annotations

THINK_MARKS = ("<think>", "</think>")
# vLLM's names of parsers for the same two marks -> whether a model of this kind thinks always.
ALWAYS_THINKS = frozenset({"deepseek_r1"})
REASONING_PARSERS = frozenset({"auto", "none", "qwen3", *ALWAYS_THINKS})


def thinking_mode(parser: str, template: str, prompt: str) -> str:
    """What comes first in an answer to this prompt, as in AnswerForm.thinking.

    parser: one of REASONING_PARSERS; auto: models think whose template speaks of both marks.
    """
    opened, closed = THINK_MARKS
    if parser == "none" or (parser == "auto" and not (opened in template and closed in template)):
        return "none"
    end = prompt.rstrip()
    if end.endswith(opened):
        return "begun"
    if end.endswith(closed):  # the template has switched it off
        return "none"
    return "begun_or_not" if parser in ALWAYS_THINKS else "may"


def held_back(text: str, mark: str) -> int:
    """How many characters at the end of a text may become the mark, with the blanks before them."""
    longest = min(len(text), len(mark) - 1)
    num = next((n for n in range(longest, 0, -1) if text.endswith(mark[:n])), 0)
    kept = text[: len(text) - num]
    return len(text) - len(kept.rstrip())


class ReasoningReader:
    """Splits the text of one choice, however it is cut."""

    def __init__(self, mode: str, marks: tuple[str, str] = THINK_MARKS):
        self._opened, self._closed = marks
        self._state = {"none": "answer", "begun": "thinking"}.get(mode, "undecided")
        self._thinks_without_mark = mode == "begun_or_not"
        self._text = ""
        self._skips_blanks = mode != "none"

    def advance(self, text: str, is_last: bool) -> tuple[str, str]:
        """New thinking, and new text of the answer. is_last: nothing follows, so nothing is held back."""
        self._text += text
        if self._state == "undecided":
            self._decide(is_last)
        thinking = self._take_thinking(is_last) if self._state == "thinking" else ""
        return thinking, self._take_answer() if self._state == "answer" else ""

    def _decide(self, is_last: bool) -> None:
        """Does it begin with the opening mark?"""
        stripped = self._text.lstrip()
        if stripped.startswith(self._opened):
            self._text = stripped.removeprefix(self._opened)
            self._state = "thinking"
        elif is_last or not self._opened.startswith(stripped):
            self._state = "thinking" if self._thinks_without_mark else "answer"
            self._skips_blanks = self._thinks_without_mark

    def _take_thinking(self, is_last: bool) -> str:
        if self._skips_blanks:
            self._text = self._text.lstrip()
            self._skips_blanks = not self._text
        thinking, mark, rest = self._text.partition(self._closed)
        if mark:
            self._state, self._text, self._skips_blanks = "answer", rest, True
            return thinking.rstrip()
        num_held = 0 if is_last else held_back(self._text, self._closed)
        thinking, self._text = self._text[: len(self._text) - num_held], self._text[len(self._text) - num_held :]
        return thinking

    def _take_answer(self) -> str:
        if self._skips_blanks:
            self._text = self._text.lstrip()
            self._skips_blanks = not self._text
        text, self._text = self._text, ""
        return text
