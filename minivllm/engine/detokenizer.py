"""Token ids to text while they arrive, and the search for stop strings in that text.

    IncrementalDetokenizer   append(ids) -> the text that is now certain;  flush() -> the rest
    StopStringChecker        append(text) -> the text that may be shown;   flush() -> the rest

What is promised:
- Output text continues the prompt: it is decode(prompt + output) without the text that the prompt alone makes
  certain. So a leading blank of the first word is kept behind a prompt, and a character whose first bytes are the
  prompt's last ones belongs to the output. Without a prompt it is decode(output).
- No part of a character is ever shown. At most three bytes wait for the rest of their character; bytes that can no
  longer become one are U+FFFD at once, so a run of bad bytes neither waits nor costs more than good text.
- The pieces joined do not depend on how the ids were cut, and their cost is linear in their number.
- Byte-fallback tokens (`<0xE4>`) follow sentencepiece: every complete character of a run is shown, every other byte
  is one U+FFFD. (The Rust decoder turns a whole run with one bad byte into U+FFFD, good characters included. That
  cannot be streamed: those characters were shown long ago. Runs without a bad byte, and bad bytes alone, are equal.)

tokenizers' own DecodeStream is not used: it has no flush, waits for ever behind a bad byte and is quadratic there.

Knows no request. Called by output_processor.py, one pair per sequence.
Twin in vLLM: vllm/v1/engine/detokenizer.py.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from os.path import commonprefix

from minivllm.engine.tokenizer import Tokenizer

PROMPT_TAIL_TOKENS = 16  # of the prompt's visible tokens: enough to know a split character and the token before
MAX_CONTEXT_TOKENS = 8  # only ever more than one while tokens decode to nothing
REPLACEMENT = "\ufffd"


class IncrementalDetokenizer:
    """The text of one sequence.

    Args:
        prompt_token_ids: what the output continues; only its tail is read.
        skip_special_tokens: special tokens make no text.
        spaces_between_special_tokens: False joins neighbouring added tokens without the blank that some decoders
            (WordPiece) put between tokens; it matters only when they are shown.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ):
        self._hidden = tokenizer.all_special_ids if skip_special_tokens else frozenset()
        self._text: _ByteLevelText | _PieceText
        if tokenizer.is_byte_level:
            self._text = _ByteLevelText(tokenizer)
        else:
            join_special = not skip_special_tokens and not spaces_between_special_tokens
            self._text = _PieceText(tokenizer, join_special)
        self.append(self._visible_tail(prompt_token_ids))  # its text is the prompt's

    def _visible_tail(self, token_ids: Sequence[int]) -> list[int]:
        tail: list[int] = []
        for token_id in reversed(token_ids):
            if token_id not in self._hidden:
                tail.append(token_id)
                if len(tail) == PROMPT_TAIL_TOKENS:
                    break
        return tail[::-1]

    def append(self, token_ids: Iterable[int]) -> str:
        """Take more tokens; returns the text that they make certain, often "" for half a character."""
        return "".join([self._text.push(token_id) for token_id in token_ids if token_id not in self._hidden])

    def flush(self) -> str:
        """The sequence is over: what still waits is an incomplete character."""
        return self._text.flush()


class _ByteLevelText:
    """Every token is a string of bytes, so the text is the UTF-8 decoding of all of them."""

    def __init__(self, tokenizer: Tokenizer):
        self._token_bytes = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _PieceText:
    """Every token is a piece of text that may depend on its left neighbour (blanks), or one byte of a character.

    A piece is what decode() adds behind the last visible token, so every decoder (Llama's, Metaspace, WordPiece,
    BPE suffixes, none) keeps its own rules for blanks, also those for the first token of a text.
    """

    def __init__(self, tokenizer: Tokenizer, join_special: bool):
        self._tokenizer = tokenizer
        self._joined_tokens = tokenizer.added_tokens if join_special else {}
        self._context: list[int] = []  # the last visible tokens: mostly one
        self._context_broken = False  # it ends in a byte that is no character: bytes behind it decode alone
        self._byte_ids: list[int] = []  # tokens of an incomplete character, at most 3 between calls
        self._last_was_added = False

    def push(self, token_id: int) -> str:
        if not self._tokenizer.has_token(token_id):
            return ""
        if self._tokenizer.token_byte(token_id) is not None:
            self._last_was_added = False
            self._byte_ids.append(token_id)
            return self._take_characters(final=False)
        text = self._take_characters(final=True)
        was_added, self._last_was_added = self._last_was_added, token_id in self._joined_tokens
        if was_added and self._last_was_added:
            self._remember([token_id])
            return text + self._joined_tokens[token_id]
        return text + self._piece([token_id])

    def flush(self) -> str:
        return self._take_characters(final=True)

    def _take_characters(self, final: bool) -> str:
        """Text of the waiting bytes, but for the start of a character that can still be completed."""
        parts = []
        while self._byte_ids:
            data = bytes(self._tokenizer.token_byte(token_id) or 0 for token_id in self._byte_ids)
            try:
                text = data.decode("utf-8")
            except UnicodeDecodeError as error:  # bytes arrive one by one, so the bad ones are in front
                if error.end == len(data) and error.reason == "unexpected end of data" and not final:
                    break
                bad, self._byte_ids = self._byte_ids[: error.end], self._byte_ids[error.end :]
                parts.append(REPLACEMENT * len(bad))
                self._context, self._context_broken = bad[-1:], True
            else:
                parts.append(text if self._context_broken else self._piece(self._byte_ids))
                self._context, self._context_broken, self._byte_ids = self._byte_ids, False, []
        return "".join(parts)

    def _piece(self, token_ids: list[int]) -> str:
        """What these tokens add behind the context."""
        before = self._tokenizer.decode(self._context)
        both = self._tokenizer.decode(self._context + token_ids)
        self._remember(token_ids)
        return both[len(before if both.startswith(before) else commonprefix([before, both])) :]

    def _remember(self, token_ids: list[int]) -> None:
        """The shortest context behind which a token is not the first of its text."""
        self._context_broken = False
        if self._tokenizer.decode(token_ids):
            self._context = list(token_ids)
        else:
            context = self._context + token_ids
            self._context = context[:1] + context[1:][1 - MAX_CONTEXT_TOKENS :]


# ---------------------------------------------------------------------- stop strings
class StopStringChecker:
    """Finds the first stop string in a text that arrives in pieces (an Aho-Corasick automaton).

    It reads like a person who reads one character at a time: the stop string that is complete first ends the text;
    of several that are complete at the same character, the longest. Up to then only that end of the text is held
    back which could still become a stop string, never more. So the joined output does not depend on the pieces, and
    nothing of a stop string is ever shown, or all of it with include_stop_str_in_output (then nothing is held back).
    Cost: linear in the text, whatever the stop strings are.

    Attributes:
        stopped: the stop string that was found, or None.
    """

    def __init__(self, stop: Sequence[str], include_stop_str_in_output: bool = False):
        self.stopped: str | None = None
        self._include = include_stop_str_in_output
        self._held = ""
        self._state = 0  # node of the longest end of the text that begins some stop string
        self._next: list[dict[str, int]] = [{}]  # node -> character -> node; node 0 is the root
        self._fail: list[int] = [0]  # node of the next shorter such end
        self._found: list[str | None] = [None]  # longest stop string that ends here
        self._depth: list[int] = [0]  # characters from the root
        self._hold: list[int] = [0]  # characters that can still become a stop string
        for text in stop:
            self._add(text)
        self._link()

    def _add(self, text: str) -> None:
        node = 0
        for char in text:
            child = self._next[node].get(char)
            if child is None:
                child = self._next[node][char] = len(self._next)
                self._next.append({})
                self._fail.append(0)
                self._found.append(None)
                self._depth.append(self._depth[node] + 1)
                self._hold.append(0)
            node = child
        self._found[node] = text

    def _link(self) -> None:
        """Breadth first, so that the shorter ends are ready when a longer one needs them."""
        queue = [0]
        for node in queue:
            for char, child in self._next[node].items():
                fail = self._step(self._fail[node], char) if node else 0
                self._fail[child] = fail
                self._found[child] = self._found[child] or self._found[fail]
                self._hold[child] = self._depth[child] if self._next[child] else self._hold[fail]
                queue.append(child)

    def _step(self, node: int, char: str) -> int:
        while node and char not in self._next[node]:
            node = self._fail[node]
        return self._next[node].get(char, 0)

    def append(self, text: str, *, may_stop: bool = True) -> str:
        """Take more text; returns what may be shown. After a stop string nothing more is.

        may_stop: False while the sequence is below min_tokens: a stop string that is complete inside this piece is
        ordinary text, but one may begin in it.
        """
        if self.stopped is not None:
            return ""
        state = self._state
        for index, char in enumerate(text):
            state = self._step(state, char)
            found = self._found[state]
            if found is not None and may_stop:
                self.stopped = found
                seen = self._held + text[: index + 1]
                self._held = ""
                return seen if self._include else seen[: len(seen) - len(found)]
        self._state = state
        if self._include:
            return text
        seen = self._held + text
        shown = len(seen) - self._hold[state]
        self._held = seen[shown:]
        return seen[:shown]

    def flush(self) -> str:
        """The text is over: what was held back is no stop string."""
        held, self._held = self._held, ""
        return held
