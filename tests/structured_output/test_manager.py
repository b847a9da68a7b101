"""The manager beside no engine: what it caches, how much, and what it forgets."""

from __future__ import annotations

import pytest

from minivllm import InvalidRequestError, StructuredOutputsParams
from minivllm.structured_output import manager as manager_module
from minivllm.structured_output.manager import GrammarCache, StructuredOutputManager
from tests.engine.tiny_tokenizers import tiny_tokenizer
from tests.structured_output.helpers import manager_of

BYTES = tiny_tokenizer("byte_level")


def test_the_cache_forgets_the_least_recently_used_beyond_its_bytes():
    cache = GrammarCache(max_bytes=12)
    for key in ("a", "b", "c"):
        cache.put(key, "123")
    assert (len(cache), cache.num_bytes) == (3, 12)
    assert cache.get("a") == "123"
    cache.put("d", "123")
    assert [cache.get(key) for key in ("a", "b", "c", "d")] == ["123", None, "123", "123"]
    assert cache.num_bytes == 12


def test_what_is_larger_than_the_cache_is_not_kept():
    cache = GrammarCache(max_bytes=12)
    cache.put("a", "1" * 12)
    assert (len(cache), cache.num_bytes) == (0, 0)
    cache.put("é", "12")  # a letter that is not ASCII may take four bytes
    assert cache.num_bytes == 6


def test_the_cache_is_bounded_in_entries_too():
    cache = GrammarCache(max_entries=2)
    for key in ("a", "b", "c"):
        cache.put(key, "")
    assert [cache.get(key) for key in ("a", "b", "c")] == [None, "", ""]


def test_many_different_schemas_stay_within_the_bound():
    manager = manager_of(BYTES)
    manager.cache.max_bytes = 2000
    for number in range(100):
        manager.compile(StructuredOutputsParams(json={"const": number}))
        assert manager.cache.num_bytes <= 2000
    assert 1 <= len(manager.cache) < 100
    assert manager_module.MAX_CACHE_BYTES == 64 << 20


def test_the_same_schema_is_prepared_once_in_whatever_form_it_comes(monkeypatch: pytest.MonkeyPatch):
    manager, calls = manager_of(BYTES), []
    prepare = manager_module.grammar_text
    monkeypatch.setattr(manager_module, "grammar_text", lambda params: calls.append(params) or prepare(params))
    for schema in ({"const": 1}, '{"const": 1}', '{ "const":1 }'):
        manager.compile(StructuredOutputsParams(json=schema))
    assert len(calls) == 1
    manager.compile(StructuredOutputsParams(json={"const": 2}))
    manager.compile(StructuredOutputsParams(regex="a"))
    manager.compile(StructuredOutputsParams(grammar='start: "a"'))
    assert len(calls) == 4


def test_what_cannot_be_compiled_is_not_cached():
    manager = manager_of(BYTES)
    for _ in range(2):
        with pytest.raises(InvalidRequestError):
            manager.compile(StructuredOutputsParams(regex="("))
    assert len(manager.cache) == 0


def test_without_a_tokenizer_every_grammar_is_refused():
    manager = StructuredOutputManager(None, 100, frozenset())
    with pytest.raises(InvalidRequestError, match="needs a tokenizer"):
        manager.compile(StructuredOutputsParams(regex="a"))


def test_a_request_is_known_from_its_first_to_its_last_step():
    manager = manager_of(BYTES)
    manager.add_request("r", manager.compile(StructuredOutputsParams(regex="ab")))
    (a,), (b,) = BYTES.encode("a"), BYTES.encode("b")
    assert "r" in manager and len(manager) == 1
    assert manager.accept_tokens("r", [a]) == 1
    row = manager.bitmasks({"r": ()})["r"]
    assert row[b // 32] >> (b % 32) & 1 and not row[a // 32] >> (a % 32) & 1
    assert manager.forced_tokens("r") == [b]
    assert not manager.is_complete("r")
    manager.accept_tokens("r", [b])
    assert manager.is_complete("r") and not manager.is_terminated("r") and manager.error("r") is None
    manager.accept_tokens("r", [BYTES.eos_token_id])
    assert manager.is_terminated("r")
    manager.remove_request("r")
    manager.remove_request("r")
    assert "r" not in manager and len(manager) == 0
