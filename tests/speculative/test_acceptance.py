"""When a request stops guessing, and how it begins again."""

from __future__ import annotations

from minivllm.speculative.acceptance import PAUSE_TOKENS, Acceptance


def test_misses_in_a_row_pause_and_a_hit_in_the_probe_opens_again():
    acceptance = Acceptance(0.25)
    num_misses = 0
    while acceptance.allows(100):
        acceptance.observe(4, 0, 100)
        num_misses += 1
    assert num_misses == 7
    assert not acceptance.allows(100 + PAUSE_TOKENS - 1) and acceptance.allows(100 + PAUSE_TOKENS)
    acceptance.observe(4, 4, 140)
    acceptance.observe(4, 0, 141)
    assert acceptance.allows(142)


def test_one_miss_in_the_probe_pauses_again():
    acceptance = Acceptance(0.25)
    for _ in range(7):
        acceptance.observe(4, 0, 10)
    acceptance.observe(4, 0, 50)
    assert not acceptance.allows(51) and acceptance.allows(50 + PAUSE_TOKENS)


def test_a_quarter_is_enough_and_less_is_not():
    enough, less, always = Acceptance(0.25), Acceptance(0.25), Acceptance(0.0)
    for _ in range(200):
        enough.observe(8, 2, 0)
        less.observe(8, 1, 0)
        always.observe(8, 0, 0)
    assert enough.allows(0) and not less.allows(0) and always.allows(0)
