"""Prompt lookup: the newest earlier place of the longest run, and a cost that does not grow with the text."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minivllm.speculative import ngram
from minivllm.speculative.ngram import NgramTable


@pytest.mark.parametrize(
    ("token_ids", "drafts"),
    [
        ([1, 2, 3, 4, 5, 1, 2], [3, 4, 5]),
        ([1, 2, 3, 1, 2, 4, 1, 2], [4, 1, 2]),  # the newest place of 1 2
        ([7, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2], [3, 8, 1]),  # an older place of 7 1 2: longer wins
        ([1, 2, 3], []),
        ([1, 1], []),  # two 1s stood nowhere before
        ([1, 1, 1], [1, 1, 1]),  # the text goes round
        ([5, 6, 5, 6], [5, 6, 5]),
        ([1], []),
        ([], []),
        ([1, 2, 9, 2], []),  # one token is too short a run
    ],
)
def test_drafts_are_what_followed_the_last_time(token_ids: list[int], drafts: list[int]):
    assert NgramTable(2, 3).propose(token_ids, 3) == drafts


def search(token_ids: list[int], shortest: int, longest: int, num_drafts: int) -> list[int]:
    """The definition: walk back for every length."""
    for length in range(longest, shortest - 1, -1):
        for end in range(len(token_ids) - 1, length - 1, -1):
            if token_ids[end - length : end] == token_ids[-length:]:
                followers = token_ids[end : end + num_drafts]
                return [followers[i % len(followers)] for i in range(num_drafts)]
    return []


@given(
    st.lists(st.integers(0, 2), max_size=40),
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(1, 5),
    st.sets(st.integers(0, 40)),
)
def test_a_growing_table_finds_what_a_search_finds(
    token_ids: list[int], shortest: int, more: int, num_drafts: int, asked_at: set[int]
):
    table = NgramTable(shortest, shortest + more)
    for length in sorted({*asked_at, len(token_ids)}):
        seen = token_ids[:length]
        assert table.propose(seen, num_drafts) == search(seen, shortest, shortest + more, num_drafts)


def lines_of(call: Callable[[], object]) -> int:
    """Lines of ngram.py that a call runs: the same on every machine, however busy."""
    count = 0

    def trace(frame: FrameType, event: str, _argument: object) -> Callable[..., Any]:
        nonlocal count
        count += event == "line" and frame.f_code.co_filename == ngram.__file__
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


class Counted(list):
    """A text that counts the tokens that are read from it."""

    num_read = 0

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        self.num_read += len(found) if isinstance(key, slice) else 1
        return found


def test_a_lookup_costs_the_same_in_a_long_text():
    costs = []
    for length in (100, 10_000):
        text = Counted(list(range(length)))
        table = NgramTable(2, 4)
        table.propose(text, 8)
        text.append(5)
        text.num_read = 0
        costs.append((lines_of(lambda t=table, x=text: t.propose(x, 8)), text.num_read))
    assert costs[0] == costs[1] and costs[0][1] < 40
