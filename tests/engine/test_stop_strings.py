"""StopStringChecker against a naive search of the whole text (C3).

MINIVLLM_CASES is the number of random cases of the large test (2,000 in the ordinary run).
"""

import itertools
import os
import random
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minivllm.engine.detokenizer import StopStringChecker

CASES = int(os.environ.get("MINIVLLM_CASES", "2000"))
ALPHABET = "ab\n é😀"


# ---------------------------------------------------------------------- oracles
def naive_stop(text: str, stops: list[str], first_end: int = 1) -> tuple[int, int, str] | None:
    """(start, end, stop string) of the match that a reader of one character at a time meets first.

    Ends before `first_end` do not count. Of several at one end the longest is taken.
    """
    for end in range(first_end, len(text) + 1):
        found = [stop for stop in stops if end >= len(stop) and text[end - len(stop) : end] == stop]
        if found:
            stop = max(found, key=len)
            return end - len(stop), end, stop
    return None


def expected_text(text: str, stops: list[str], include: bool, first_end: int = 1) -> tuple[str, str | None]:
    match = naive_stop(text, stops, first_end)
    if match is None:
        return text, None
    start, end, stop = match
    return text[: end if include else start], stop


def longest_beginning(text: str, stops: list[str]) -> int:
    """Characters at the end of the text that begin some stop string and are not all of it."""
    sizes = [n for stop in stops for n in range(len(stop)) if n <= len(text) and stop[:n] == text[len(text) - n :]]
    return max(sizes, default=0)


def run(checker: StopStringChecker, pieces: list[str]) -> str:
    return "".join([*(checker.append(piece) for piece in pieces), checker.flush()])


def check(text: str, stops: list[str], include: bool, cuts: list[int]) -> None:
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *sorted(cuts), len(text)])]
    checker = StopStringChecker(stops, include)
    shown, seen = "", ""
    for piece in pieces:
        shown += checker.append(piece)
        seen += piece
        if checker.stopped is None:
            held = 0 if include else longest_beginning(seen, stops)
            assert shown == seen[: len(seen) - held]
    shown += checker.flush()
    assert (shown, checker.stopped) == expected_text(text, stops, include)


# ---------------------------------------------------------------------- claims
stop_lists = st.lists(st.text(ALPHABET, min_size=1, max_size=5), min_size=1, max_size=4)


@settings(max_examples=max(CASES // 8, 10), deadline=None, derandomize=True, database=None)
@given(st.text(ALPHABET, max_size=40), stop_lists, st.booleans(), st.lists(st.integers(0, 40), max_size=12))
@example("aab", ["ab", "aab", "b"], False, [1, 2])
@example("abab", ["ababa", "bab"], False, [1, 2, 3])
def test_shown_text_and_hold_back_are_those_of_a_naive_search(text, stops, include, cuts):
    check(text, stops, include, [cut for cut in cuts if cut <= len(text)])


def test_shown_text_and_hold_back_are_those_of_a_naive_search_in_many_random_cases():
    rng = random.Random(0)
    for _ in range(CASES):
        letters = rng.choice(["ab", "ab\n", ALPHABET])
        text = "".join(rng.choices(letters, k=rng.randrange(60)))
        stops = ["".join(rng.choices(letters, k=rng.randrange(1, 7))) for _ in range(rng.randrange(1, 5))]
        if text and rng.random() < 0.5:  # one that does occur, or almost
            at = rng.randrange(len(text))
            stops[0] = text[at : at + rng.randrange(1, 9)] + rng.choice(["", "a"])
        check(text, stops, rng.random() < 0.3, [rng.randrange(len(text) + 1) for _ in range(rng.randrange(20))])


@pytest.mark.parametrize("stops", [["ab"], ["ba", "aab"], ["abab", "bb"], ["a\nb", "\n\n"]])
@pytest.mark.parametrize("text", ["aabab\nb", "babaabb", "\n\na\nbab"])
def test_every_cut_of_a_text_gives_the_same(text, stops):
    for include in (False, True):
        for num_cuts in range(len(text)):
            for cuts in itertools.combinations(range(1, len(text)), num_cuts):
                check(text, stops, include, list(cuts))


@settings(max_examples=max(CASES // 8, 10), deadline=None, derandomize=True, database=None)
@given(st.lists(st.text("ab", max_size=3), max_size=12), st.integers(0, 12), stop_lists, st.booleans())
def test_below_min_tokens_a_stop_string_may_begin_but_not_end(pieces, num_protected, stops, include):
    checker = StopStringChecker(stops, include)
    shown = "".join(checker.append(piece, may_stop=index >= num_protected) for index, piece in enumerate(pieces))
    shown += checker.flush()
    protected = len("".join(pieces[:num_protected]))
    assert (shown, checker.stopped) == expected_text("".join(pieces), stops, include, protected + 1)


def test_the_stop_string_that_is_complete_first_wins_and_of_those_the_longest():
    checker = StopStringChecker(["world", "o w", "lo w"])
    assert run(checker, list("hello world")) == "hel"
    assert checker.stopped == "lo w"
    checker = StopStringChecker(["hello world!", "lo"])
    assert run(checker, ["hello world!"]) == "hel"
    assert checker.stopped == "lo"


def test_nothing_comes_after_a_stop_string():
    checker = StopStringChecker(["STOP"], include_stop_str_in_output=True)
    assert checker.append("a STOP b") == "a STOP"
    assert checker.append("more") == ""
    assert checker.flush() == ""


def test_text_that_only_looked_like_a_stop_string_is_shown_at_the_end():
    checker = StopStringChecker(["\n\nUser:"])
    assert checker.append("done\n\nUs") == "done"
    assert checker.flush() == "\n\nUs"
    assert checker.flush() == ""


def test_without_stop_strings_everything_passes_at_once():
    checker = StopStringChecker([])
    assert checker.append("any text") == "any text"
    assert checker.stopped is None


def seconds_per_character(num_chars: int) -> float:
    """Stop strings that begin at every character and never end: the worst case of a naive search."""
    checker = StopStringChecker(["a" * 255 + "b", "a" * 200 + "c", "ab" * 100 + "c"])
    start = time.perf_counter()
    for _ in range(num_chars // 4):
        checker.append("aaaa")
    return (time.perf_counter() - start) / num_chars


def test_the_work_per_character_does_not_grow():
    short = min(seconds_per_character(2_000) for _ in range(3))
    long = min(seconds_per_character(32_000) for _ in range(3))
    assert long < 6 * short  # sixteen times as much text; quadratic work would be sixteen times as slow
