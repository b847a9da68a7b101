"""The name of a full block: SHA-256 over (name of the block before, extra key, token ids)."""

from __future__ import annotations

import hashlib
import struct

import pytest

from minivllm.core import block_hash
from minivllm.core.block_hash import ROOT_HASH, extend_block_hashes, hash_block
from tests.core.helpers import make_request

PROMPT = range(100, 112)  # three blocks of four


def chain(token_ids: list[int], cache_salt: str | None = None, block_size: int = 4) -> list[bytes]:
    """The names of the full blocks of a request with this prompt."""
    request = make_request("r", token_ids, cache_salt=cache_salt)
    extend_block_hashes(request, block_size)
    return request.block_hashes


def test_a_name_is_sha256_of_parent_extra_key_and_token_ids():
    parent = b"p" * 32
    ids = struct.pack("<4q", 1, 2, 3, 2**40)  # eight bytes each: two lists of ids never look alike
    assert hash_block(parent, [1, 2, 3, 2**40]) == hashlib.sha256(parent + b"-" + ids).digest()
    salted = hashlib.sha256(parent + b"+4:\xc3\xa9ab" + ids).digest()  # the length counts bytes
    assert hash_block(parent, [1, 2, 3, 2**40], "éab") == salted


def test_a_name_is_the_same_in_every_process():
    """Python's own hash() of a str changes with PYTHONHASHSEED; a digest written down here does not."""
    expected = "c7a7ff581dc99f94a119a749d804ff01a1dbfd1f0bc2a7fe26247f1f29fd435e"
    assert chain(list(range(100, 104)), "tenant")[0].hex() == expected


def test_equal_prefixes_have_equal_names_and_only_equal_ones():
    names = chain(list(PROMPT))
    assert len(names) == len(set(names)) == 3
    assert chain(list(PROMPT)) == names
    assert chain([*range(100, 108), 0, 0, 0, 0])[:2] == names[:2]  # what follows does not matter
    other = chain([999, *range(101, 112)])
    assert all(a != b for a, b in zip(names, other, strict=True))  # one token at the front changes every name behind it


def test_equal_blocks_at_different_places_have_different_names():
    first, second, third = chain([5, 6, 7, 8] * 3)
    assert len({first, second, third}) == 3  # their keys carry other positions


def test_only_full_blocks_have_a_name():
    assert [len(chain(list(range(length)))) for length in (1, 3, 4, 5, 7, 8, 9)] == [0, 0, 1, 1, 1, 2, 2]
    assert len(chain(list(range(5)), block_size=1)) == 5


def test_the_salt_is_in_the_first_block_and_the_chain_spreads_it():
    plain, salted, other = chain(list(PROMPT)), chain(list(PROMPT), "a"), chain(list(PROMPT), "b")
    assert salted[0] == hash_block(ROOT_HASH, [100, 101, 102, 103], "a")
    assert salted[1] == hash_block(salted[0], [104, 105, 106, 107])  # no salt here
    assert salted[2] == hash_block(salted[1], [108, 109, 110, 111])
    assert not set(plain) & set(salted) and not set(salted) & set(other)  # and still no name is shared


def test_a_salt_cannot_run_into_the_token_ids():
    one = struct.pack("<q", 1).decode()
    assert hash_block(ROOT_HASH, [2], one) != hash_block(ROOT_HASH, [1, 2], "")
    assert hash_block(ROOT_HASH, [2], "") != hash_block(ROOT_HASH, [2])  # an empty salt is a salt
    assert hash_block(ROOT_HASH, [2], "1:x") != hash_block(ROOT_HASH, [2], "x")


def test_a_salt_may_be_any_text_that_json_can_carry():
    assert hash_block(ROOT_HASH, [1], "\ud800") != hash_block(ROOT_HASH, [1], "\ud801")  # lone surrogates


def test_every_block_is_hashed_once_however_the_tokens_arrive(monkeypatch: pytest.MonkeyPatch):
    calls = []

    def counting(*arguments: object) -> bytes:
        calls.append(arguments)
        return hash_block(*arguments)

    monkeypatch.setattr(block_hash, "hash_block", counting)
    request = make_request("r", range(100, 106))
    for token_id in range(106, 112):
        extend_block_hashes(request, 4)
        request.all_token_ids.append(token_id)
    extend_block_hashes(request, 4)
    extend_block_hashes(request, 4)
    assert len(calls) == 3  # not once per token, and nothing again
    assert request.block_hashes == chain(list(PROMPT))  # output tokens count like prompt tokens
