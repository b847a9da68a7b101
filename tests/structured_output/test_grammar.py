"""One matcher beside no engine: bitmasks, accepting, going back, the end, and the reasons of refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from golden.tiny import write_tiny_model
from minivllm import InvalidRequestError, StructuredOutputsParams
from minivllm.engine.tokenizer import Tokenizer
from minivllm.structured_output import grammar
from minivllm.structured_output.grammar import GrammarMatcher
from tests.engine.tiny_tokenizers import tiny_tokenizer
from tests.structured_output.helpers import manager_of

BYTES = tiny_tokenizer("byte_level")
EOS = BYTES.eos_token_id


def matcher_of(tokenizer: Tokenizer = BYTES, *, changes: Any = None, **spec: Any) -> GrammarMatcher:
    return manager_of(tokenizer, **(changes or {})).compile(StructuredOutputsParams(**spec)).new_matcher()


def row_of(matcher: GrammarMatcher, vocab_size: int = BYTES.vocab_size) -> np.ndarray:
    row = np.full(-(-vocab_size // 32), 0x5A5A5A5A, dtype=np.int32)  # what it held before must not matter
    matcher.fill_bitmask(row)
    return row


def allowed(matcher: GrammarMatcher, vocab_size: int = BYTES.vocab_size) -> list[int]:
    row = row_of(matcher, vocab_size)
    return [token for token in range(32 * len(row)) if row[token // 32] >> (token % 32) & 1]


def ids(text: str, tokenizer: Tokenizer = BYTES) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def refusal(tokenizer: Tokenizer = BYTES, **spec: Any) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        matcher_of(tokenizer, **spec)
    assert caught.value.parameter == "structured_outputs"
    return caught.value.message


# ------------------------------------------------------------------ following
@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_a_bit_is_set_exactly_where_the_token_would_be_accepted(kind: str):
    tokenizer = tiny_tokenizer(kind)
    matcher = matcher_of(tokenizer, json={"properties": {"a": {"type": "integer"}}, "additionalProperties": False})
    for token in [None, *ids('{"a": 12}', tokenizer)[-4:]]:
        if token is not None and matcher.validate_tokens([token]) == 1:
            matcher.accept_tokens([token])
        everybody = [token for token in range(tokenizer.vocab_size) if matcher.validate_tokens([token]) == 1]
        assert allowed(matcher, tokenizer.vocab_size) == everybody


def test_eos_may_come_where_the_grammar_may_end_and_nothing_behind_it():
    matcher = matcher_of(regex="ab?")
    assert EOS not in allowed(matcher) and matcher.accept_tokens([EOS]) == 0
    assert matcher.accept_tokens(ids("a")) == 1
    assert EOS in allowed(matcher) and len(allowed(matcher)) > 1
    assert not matcher.is_complete() and not matcher.is_terminated()
    assert matcher.accept_tokens([EOS, *ids("b")]) == 1
    assert matcher.is_terminated() and allowed(matcher) == [EOS]


def test_a_complete_grammar_allows_eos_alone():
    matcher = matcher_of(choice=["b"])
    matcher.accept_tokens(ids("b"))
    assert matcher.is_complete() and not matcher.is_terminated() and allowed(matcher) == [EOS]


def test_every_eos_ends_also_one_that_has_text():
    """A model may stop at a word (generation_config's list); inside of a string that word cannot be drawn."""
    (word,) = ids("a")
    matcher = matcher_of(json={"type": "string"}, changes={"eos_token_ids": frozenset({EOS, word})})
    matcher.accept_tokens(ids('"x'))
    assert word not in allowed(matcher) and matcher.accept_tokens([word]) == 0
    matcher.accept_tokens(ids('"'))
    assert allowed(matcher) == sorted([EOS, word])
    assert matcher.accept_tokens([word]) == 1 and matcher.is_terminated()


def test_a_refused_token_changes_nothing():
    matcher = matcher_of(regex="abc")
    before = allowed(matcher)
    assert matcher.accept_tokens(ids("z")) == 0
    assert matcher.error is None and allowed(matcher) == before
    assert matcher.accept_tokens([*ids("a"), *ids("z")]) == 1
    assert matcher.accept_tokens(ids("b")) == 1


def test_going_back_forgets_the_newest_tokens_and_the_end():
    matcher = matcher_of(regex="a{1,3}")
    start, rows = row_of(matcher), []
    for _ in range(3):
        matcher.accept_tokens(ids("a"))
        rows.append(row_of(matcher))
    assert matcher.accept_tokens([EOS]) == 1
    matcher.rollback(2)  # eos and the third a
    assert not matcher.is_terminated() and (row_of(matcher) == rows[1]).all()
    matcher.rollback(0)
    matcher.rollback(2)
    assert (row_of(matcher) == start).all()
    assert matcher.validate_tokens([*ids("a"), *ids("a"), EOS, EOS]) == 3
    assert (row_of(matcher) == start).all() and not matcher.is_terminated()


def test_sequences_of_one_grammar_do_not_move_each_other():
    compiled = manager_of(BYTES).compile(StructuredOutputsParams(regex="ab"))
    first, second = compiled.new_matcher(), compiled.new_matcher()
    first.accept_tokens(ids("a"))
    assert allowed(first) == ids("b") and ids("a")[0] in allowed(second)


def test_forced_tokens_spell_what_the_grammar_leaves_no_choice_about():
    matcher = matcher_of(regex="hello world[!?]")
    forced = matcher.forced_tokens()
    assert forced and "hello world".startswith(BYTES.decode(forced))
    assert matcher.accept_tokens(forced) == len(forced)
    assert matcher_of(regex="[ab]").forced_tokens() == []
    ended = matcher_of(regex="a")
    ended.accept_tokens(ids("a"))
    assert ended.forced_tokens() == []


@pytest.mark.parametrize("vocab_size", [BYTES.vocab_size + 100, BYTES.vocab_size - 40])
def test_logits_may_be_wider_or_narrower_than_the_vocabulary(vocab_size: int):
    matcher = matcher_of(json={}, changes={"vocab_size": vocab_size})
    found = allowed(matcher, vocab_size)
    assert ids("{")[0] in found and all(BYTES.has_token(token) for token in found)


def test_special_tokens_are_no_text():
    matcher = matcher_of(regex=".*")
    assert not set(allowed(matcher)) & (BYTES.all_special_ids - {EOS})


def test_digits_and_words_of_a_regex_are_ascii():
    r"""llguidance's own \d takes every digit of Unicode, newer ones than Python knows among them."""
    matcher = matcher_of(regex=r"\d+")
    assert matcher.validate_tokens(ids("7")) == 1
    assert matcher.validate_tokens(ids("٣")) < len(ids("٣"))


# ------------------------------------------------------------------ faults
def test_a_lexer_with_too_many_states_breaks_its_own_request_only():
    """llguidance shares the states among copies: with a shared compiled grammar, the next request was broken too."""
    manager = manager_of(BYTES)
    params = StructuredOutputsParams(regex="(.*a.{40})")
    matcher = manager.compile(params).new_matcher()
    chance = np.random.Generator(np.random.PCG64(0))
    letters = [*ids("a"), *ids("b")]
    while matcher.error is None:
        row_of(matcher)
        matcher.accept_tokens([letters[chance.integers(2)]])
    assert "too many states" in matcher.error and "<" not in matcher.error
    assert not row_of(matcher).any() and matcher.accept_tokens(ids("a")) == 0
    assert matcher.forced_tokens() == [] and not matcher.is_complete()
    other = manager.compile(params).new_matcher()
    assert other.accept_tokens(ids("a")) == 1 and row_of(other).any()


class Panic(BaseException):
    """As a panic of Rust code arrives in Python."""


def test_a_panic_is_the_requests_own_error(monkeypatch: pytest.MonkeyPatch):
    def panic(*_: Any, **__: Any) -> Any:
        raise Panic("a secret of this machine")

    matcher = matcher_of(regex="a")
    matcher._matcher = type("Broken", (), {"is_error": lambda _: False, "unsafe_compute_mask_ptr": panic})()  # type: ignore[assignment]
    assert not row_of(matcher).any() and matcher.error == "the grammar engine failed (Panic)"
    with monkeypatch.context() as patch:
        patch.setattr(grammar.llguidance, "LLMatcher", panic)
        patch.setattr(grammar, "grammar_text", lambda _: "")
        with pytest.raises(InvalidRequestError, match=r"failed \(Panic\)"):
            manager = manager_of(BYTES)
            grammar.compile_grammar(manager._grammar_tokenizer(), "regex", "")


def test_a_grammar_that_takes_too_long_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(grammar, "MAX_COMPILE_SECONDS", -1.0)
    assert "takes more than -1 s" in refusal(regex="a")


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"json": False}, "no document can satisfy it"),
        ({"json": {"type": "integer", "minimum": 5, "maximum": 3}}, "Unsatisfiable schema: minimum (5) is greater"),
        ({"json": {"type": "thing"}}, "Invalid type: thing"),
        ({"json": {"type": "string", "pattern": "(?=a)b"}}, "look-around"),
        ({"json": {"$ref": "#/$defs/none"}}, "Pointer '/$defs/none' does not exist"),
        ({"json": {"$ref": "#"}}, "no output can satisfy it"),
        ({"json": {"title": "\ud800", "enum": ["\ud800"]}}, "hex escape"),
        ({"json": {"not": {"type": "null"}}}, "cannot be honoured: #/not"),
        ({"regex": "("}, "unclosed group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": r"a\b"}, "lookarounds not supported"),
        ({"grammar": 'start: %json {"multipleOf": 1000003}'}, "%json is not taken here"),
        ({"grammar": "start: X\nX: " + " & ".join(["/.*a{3}b/"] * 30)}, "more than 8 times &"),
        ({"grammar": "start: a"}, 'unknown name: "a"'),
        ({"grammar": "%%%"}, "Expected name"),
        ({"grammar": "root ::= " + "(" * 5000 + '"a"' + ")" * 5000}, "recursion"),
        ({"grammar": "start: " + "(" * 5000 + '"a"' + ")" * 5000}, "too deeply nested"),
        ({"grammar": "start: start"}, "no output can satisfy it"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_compiled_is_refused_with_the_reason(spec: dict[str, Any], reason: str):
    message = refusal(**spec)
    assert reason in message and message.startswith(f"structured_outputs.{next(iter(spec))}")
    assert len(message) < 500 and "\n" not in message and "<state>" not in message


@pytest.mark.parametrize("kind", ["metaspace", "word_piece", "plain"])
def test_a_tokenizer_without_bytes_is_refused(kind: str):
    assert "tokenizer" in refusal(tiny_tokenizer(kind), regex="a")


def test_a_tokenizer_that_is_misread_is_refused():
    """ByteFallback beside ByteLevel, as transformers re-saves a GGUF's, makes llguidance read blanks as letters."""
    state = json.loads(BYTES.backend.to_str())
    state["decoder"] = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, state["decoder"]]}
    misread = type(BYTES.backend).from_str(json.dumps(state))
    with pytest.raises(InvalidRequestError, match="read back as"):
        grammar.GrammarTokenizer(misread, BYTES.vocab_size, frozenset({EOS}))


@pytest.mark.parametrize(
    "fields",
    [{"choice": ["yes", "<tool_call>x"]}, {"regex": "<tool_call>[a-c]+"}, {"json": {"const": "<tool_call>"}}],
    ids=str,
)
def test_a_literal_that_is_one_special_token_is_refused_before_it_could_fail(fields: dict[str, Any], tmp_path: Path):
    """llguidance offers the added token for it, and refuses it when it was drawn."""
    backend = Backend.from_file(str(write_tiny_model("llama", tmp_path / "llama") / "tokenizer.json"))
    backend.add_tokens([AddedToken("<tool_call>", special=False)])
    tokenizer = grammar.GrammarTokenizer(backend, backend.get_vocab_size(), frozenset({0}))
    params = StructuredOutputsParams(**fields)
    with pytest.raises(InvalidRequestError, match="'<tool_call>' is one special token of this model"):
        grammar.compile_grammar(tokenizer, params.kind, grammar.grammar_text(params))
    free = StructuredOutputsParams(json={"type": "string"})
    grammar.compile_grammar(tokenizer, free.kind, grammar.grammar_text(free))
