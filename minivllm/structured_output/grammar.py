"""One request's grammar: compiled before the request is queued, then followed token by token.

    GrammarTokenizer   the model's vocabulary as bytes, as llguidance wants it; one per engine
    compile_grammar    (kind, grammar text) -> CompiledGrammar, or InvalidRequestError with the reason
    GrammarMatcher     fill_bitmask, accept_tokens, rollback, is_terminated; one per sequence

JSON is written on one line, as json.dumps writes it: at most one blank after a comma or a colon, and whitespace
nowhere else. So no model can fill its budget with blanks, and a document takes far fewer tokens than an indented one.
The blank is the model's choice: with always one more of the text is forced (a recipe takes 26 steps instead of 33), but
the default model, which ends the guide's recipe after 40 tokens, then repeats itself for ever.

eos is handled here, not by llguidance: its bits are set where the grammar may end and nowhere else, also when a
model's eos is a token that has text.

Every compiled grammar has its own lexer, shared by the sequences of one request and by nobody else: llguidance keeps
the lexer's states for all copies, and once there are too many, all copies are broken.

Knows no request and no scheduler. Called by manager.py.
Twin in vLLM: vllm/v1/structured_output/backend_guidance.py.
"""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import llguidance
import numpy as np
from llguidance.gbnf_to_lark import any_to_lark

from minivllm.errors import InvalidRequestError
from minivllm.sampling_params import AnswerForm, StructuredOutputsParams
from minivllm.structured_output.answer_form import answer_grammar
from minivllm.structured_output.schema import MAX_MET_PATTERNS, prepare_schema

# How JSON is written; the separators are regular expressions.
JSON_OPTIONS: Mapping[str, Any] = MappingProxyType(
    {"whitespace_flexible": False, "coerce_one_of": True, "item_separator": ", ?", "key_separator": ": ?"}
)
MAX_LEXER_STATES = 16_384  # about 4 MB for each running request at the worst
LITERAL_KINDS = frozenset({"json", "regex", "choice"})
MAX_COMPILE_SECONDS = 1.0  # of processor time; llguidance's own limits stop nearly everything within 0.1
_PROBE = '{"a": [" b'

Result = TypeVar("Result")


# ---------------------------------------------------------------------- the vocabulary
class GrammarTokenizer:
    """The vocabulary of one model. Building it takes about 0.3 s for 50,000 tokens.

    Args:
        backend: the `tokenizers` object.
        vocab_size: width of the logits; may be more or less than the tokenizer has.
        eos_token_ids: end the output.
    Raises InvalidRequestError for a tokenizer whose tokens are not known as bytes.
    """

    def __init__(self, backend: Any, vocab_size: int, eos_token_ids: frozenset[int]):
        added = backend.get_added_tokens_decoder()
        special = [token_id for token_id in sorted(eos_token_ids) if token_id in added and added[token_id].special]
        num_tokens = max(vocab_size, backend.get_vocab_size(with_added_tokens=True), max(added, default=0) + 1)
        try:
            self.tokenizer = llguidance.LLTokenizer(backend.to_str(), n_vocab=num_tokens, eos_token=special or None)
            text = self.tokenizer.decode_str(backend.encode(_PROBE, add_special_tokens=False).ids)
        except Exception as error:
            raise _no_tokenizer(f"its tokens are not known as bytes ({_reason(str(error))})") from error
        if text.removeprefix(" ") != _PROBE:  # sentencepiece puts a blank in front
            raise _no_tokenizer(f"{_PROBE!r} is read back as {text!r}")
        self.vocab_size = vocab_size
        self.num_words = -(-vocab_size // 32)  # of a bitmask row
        self.num_all_words = -(-num_tokens // 32)  # of llguidance's rows
        self.eos_token_ids = frozenset(token_id for token_id in eos_token_ids if 0 <= token_id < vocab_size)
        # llguidance takes every added token of the form <...> for a special one, whatever the tokenizer says of it.
        self.special_ids = {t.content: i for i, t in added.items() if self.tokenizer.is_special_token(i)}
        self.eos_bits = self._row_of(self.eos_token_ids)  # [num_words]
        self.no_eos_bits = ~self._row_of(self.eos_token_ids | set(self.tokenizer.eos_tokens))  # [num_words]

    def __contains__(self, token_id: int) -> bool:
        """Whether it is text that the model can write."""
        return token_id < self.vocab_size and token_id not in self.eos_token_ids

    def _row_of(self, token_ids: frozenset[int]) -> np.ndarray:
        """A row, [num_words], with the bits of these tokens."""
        octets = np.zeros(self.num_words * 32, dtype=np.uint8)
        octets[[token_id for token_id in token_ids if token_id < len(octets)]] = 1
        return np.packbits(octets, bitorder="little").view("<i4").astype(np.int32)


def _no_tokenizer(reason: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"structured_outputs cannot be used with this model's tokenizer: {reason}.", parameter="structured_outputs"
    )


# ---------------------------------------------------------------------- compiling
def grammar_text(params: StructuredOutputsParams) -> str:
    """llguidance's own form of what was asked for. Raises InvalidRequestError."""
    try:
        return _guarded(lambda: _grammar_text(params))
    except InvalidRequestError:
        raise
    except Exception as error:
        raise _bad_grammar(params.kind, str(error) or type(error).__name__) from error


def answer_text(tokenizer: GrammarTokenizer, form: AnswerForm) -> str:
    """The same for a whole answer, whose marks may be special tokens of this tokenizer."""
    return answer_grammar(form, tokenizer.special_ids, JSON_OPTIONS, grammar_text)


def _grammar_text(params: StructuredOutputsParams) -> str:
    matcher = llguidance.LLMatcher
    if params.json is not None or params.json_object:
        schema = {"type": "object"} if params.json is None else prepare_schema(params.schema())
        if schema is False:
            raise _bad_grammar(params.kind, "no document can satisfy it")
        schema = {} if schema is True else schema
        options: Any = dict(JSON_OPTIONS)
        return matcher.grammar_from_json_schema(json.dumps(schema), overrides=options)
    if params.regex is not None:
        regex = llguidance.regex_to_lark(params.regex, "dw")  # \d and \w are ASCII, as in JavaScript and JSON schema
        return matcher.grammar_from_lark(f"start: /{regex}/")
    if params.choice is not None:
        alternatives = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in params.choice)
        return matcher.grammar_from_lark(f"start: {alternatives}")
    grammar = params.grammar or ""
    if "%json" in grammar:  # it would go round the limits of schema.py
        raise _bad_grammar(params.kind, "%json is not taken here: use structured_outputs.json")
    if grammar.count("&") > MAX_MET_PATTERNS:  # also in strings: a small price
        raise _bad_grammar(params.kind, f"it has more than {MAX_MET_PATTERNS} times &")
    return matcher.grammar_from_lark(any_to_lark(grammar))


class CompiledGrammar:
    """A grammar that llguidance accepts; `new_matcher` starts one sequence."""

    def __init__(self, tokenizer: GrammarTokenizer, start: llguidance.LLMatcher):
        self._tokenizer = tokenizer
        self._start = start

    def new_matcher(self) -> GrammarMatcher:
        return GrammarMatcher(self._tokenizer, self._start.deep_copy())


def compile_grammar(tokenizer: GrammarTokenizer, kind: str, text: str) -> CompiledGrammar:
    """Raises InvalidRequestError with llguidance's reason. The interpreter lock is free meanwhile."""
    _refuse_special_tokens(tokenizer, kind, text)
    limits = llguidance.LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
    started = time.thread_time()
    try:
        start = _guarded(lambda: llguidance.LLMatcher(tokenizer.tokenizer, text, log_level=0, limits=limits))
        grammar = CompiledGrammar(tokenizer, start)
        first = grammar.new_matcher()
        row = np.empty(tokenizer.num_words, dtype=np.int32)
        first.fill_bitmask(row)  # some faults show only now
    except Exception as error:
        raise _bad_grammar(kind, str(error) or type(error).__name__) from error
    reason = start.get_error() if start.is_error() else first.error
    if reason and not reason.startswith("NoExtension"):
        raise _bad_grammar(kind, reason)
    if reason or not row.any():
        raise _bad_grammar(kind, "no output can satisfy it")
    if time.thread_time() - started > MAX_COMPILE_SECONDS:
        raise _bad_grammar(kind, f"it takes more than {MAX_COMPILE_SECONDS:g} s to compile")
    return grammar


def _refuse_special_tokens(tokenizer: GrammarTokenizer, kind: str, text: str) -> None:
    """A literal that the tokenizer writes as one special token: llguidance would offer that token and then refuse it.

    Grammars of their own ("grammar", "answer") have a syntax for such tokens.
    """
    found = [mark for mark in tokenizer.special_ids if mark in text] if kind in LITERAL_KINDS else []
    if found:
        raise _bad_grammar(kind, f"{found[0]!r} is one special token of this model and no text: leave it out")


def _bad_grammar(kind: str, error: str) -> InvalidRequestError:
    if kind == "answer":
        return InvalidRequestError(f"tools cannot be used: {_reason(error)}.", parameter="tools")
    return InvalidRequestError(
        f"structured_outputs.{kind} cannot be used: {_reason(error)}.", parameter="structured_outputs"
    )


def _reason(error: str) -> str:
    """The sentence in a message of llguidance, without its drawings and its state."""
    text = re.split(r"\n<|\n\s*\d+ \|", error)[0]
    inner = re.findall(r"^error: (.+)$", text, re.MULTILINE)
    words = inner[-1] if inner else re.sub(r"^(at )?\d+\(\d+\): ", "", " ".join(text.split()))
    return words[:300].rstrip(". ")


def _guarded(call: Callable[[], Result]) -> Result:
    """A panic in Rust code is no Exception; here it becomes one, so that it fails one request and not the engine."""
    try:
        return call()
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as panic:
        raise RuntimeError(f"the grammar engine failed ({type(panic).__name__})") from panic


# ---------------------------------------------------------------------- following
class GrammarMatcher:
    """Where one sequence is in its grammar.

    Attributes:
        error: why it cannot go on (it needs too many states), or None.
    """

    def __init__(self, tokenizer: GrammarTokenizer, matcher: llguidance.LLMatcher):
        self.error: str | None = None
        self._tokenizer = tokenizer
        self._matcher = matcher
        self._is_terminated = False

    def fill_bitmask(self, row: np.ndarray) -> None:
        """Write the tokens that may come next: bit t % 32 of word t // 32 is token t. None at all after an error.

        row: [ceil(vocab_size / 32)] int32
        """
        tokenizer = self._tokenizer
        if self._is_terminated:
            row[:] = tokenizer.eos_bits
            return
        words = np.zeros(tokenizer.num_all_words, dtype=np.int32)
        may_end = self._try(lambda: self._compute(words))
        if self.error is not None:
            row[:] = 0
            return
        np.bitwise_and(words[: tokenizer.num_words], tokenizer.no_eos_bits, out=row)
        if may_end:
            row |= tokenizer.eos_bits

    def _compute(self, words: np.ndarray) -> bool:  # words: [num_all_words]
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        return self._matcher.is_accepting()

    def accept_tokens(self, token_ids: Sequence[int]) -> int:
        """Take drawn tokens in order; returns how many the grammar accepts. The first refused one changes nothing."""
        for count, token_id in enumerate(token_ids):
            if not self._accept(token_id):
                return count
        return len(token_ids)

    def _accept(self, token_id: int) -> bool:
        if self._is_terminated:
            return False
        if token_id in self._tokenizer.eos_token_ids:
            self._is_terminated = bool(self._try(self._matcher.is_accepting))
            return self._is_terminated
        return self._try(lambda: self._matcher.try_consume_tokens([token_id])) == 1

    def validate_tokens(self, token_ids: Sequence[int]) -> int:
        """How many of these tokens would be accepted; nothing changes (drafts)."""
        count = self.accept_tokens(token_ids)
        self.rollback(count)
        return count

    def rollback(self, num_tokens: int) -> None:
        """Forget the newest accepted tokens."""
        if num_tokens > 0 and self._is_terminated:
            self._is_terminated = False
            num_tokens -= 1
        if num_tokens > 0:
            self._try(lambda: self._matcher.rollback(num_tokens))

    def is_terminated(self) -> bool:
        """eos was accepted."""
        return self._is_terminated

    def is_complete(self) -> bool:
        """Only eos may follow, or has."""
        return self._is_terminated or bool(self._try(self._matcher.is_stopped) and self.error is None)

    def forced_tokens(self) -> list[int]:
        """Tokens of the text that must come next because the grammar leaves no choice; empty most of the time.

        They are the tokenizer's own for that text, without the last ones if these might join with what follows.
        """
        if self.is_complete():
            return []
        tokenizer = self._tokenizer
        forced = self._try(self._matcher.compute_ff_tokens) or []
        return list(itertools.takewhile(lambda token_id: token_id in tokenizer, forced))

    def _try(self, call: Callable[[], Result]) -> Result | None:
        """None and self.error when llguidance cannot go on. It stays so: the lexer is broken for good."""
        if self.error is not None:
            return None
        try:
            result = _guarded(call)
            if not self._matcher.is_error():
                return result
            self.error = _reason(self._matcher.get_error())
        except Exception as error:
            self.error = _reason(str(error))
        return None
