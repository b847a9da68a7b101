"""The rule of truth itself: what counts as equal, as a tie, as wrong."""

import pytest

from minivllm.outputs import Logprob
from tests.golden.compare import compare_logprobs, find_tie

STEPS = {
    "token_ids": [7, 8, 9],
    "logprobs": [-0.5, -1.0, -1.5],
    "ranks": [1, [1, 2], 1],
    "gaps": [2.0, 0.00005, 0.5],
    "top_ids": [[7, 1], [8, 2], [9, 3]],
    "top_logprobs": [[-0.5, -2.0], [-1.0, -1.00005], [-1.5, -3.0]],
}


def entries(**changed: float) -> list[dict[int, Logprob]]:
    values = {"a": -0.5, "b": -1.0, "c": -1.5} | changed
    return [
        {7: Logprob(values["a"], 1), 1: Logprob(-2.0, 2)},
        {8: Logprob(values["b"], 2), 2: Logprob(-1.00005, 1)},
        {9: Logprob(values["c"], 1), 3: Logprob(-3.0, 2)},
    ]


def test_equal_ids_are_no_tie() -> None:
    assert find_tie("x", STEPS, [7, 8, 9]) is None


def test_a_difference_at_a_small_gap_is_a_tie_that_has_a_name() -> None:
    tie = find_tie("x", STEPS, [7, 2, 5])
    assert tie is not None and tie.position == 1
    assert str(tie) == "tie in x at output token 1: transformers chose 8, we 2, its gap is 5e-05"


@pytest.mark.parametrize("ours", [[6, 8, 9], [7, 8, 3], [7, 8], [7, 8, 9, 9]])
def test_a_difference_at_a_clear_gap_and_a_wrong_length_are_errors(ours: list[int]) -> None:
    with pytest.raises(AssertionError):
        find_tie("x", STEPS, ours)


def test_the_largest_logprob_difference_is_returned() -> None:
    assert compare_logprobs("x", STEPS, entries(c=-1.50005)) == pytest.approx(5e-5)


@pytest.mark.parametrize("changed", [{"a": -0.5002}, {"b": -0.9998}, {"c": float("nan")}])
def test_a_logprob_beyond_the_tolerance_is_an_error(changed: dict[str, float]) -> None:
    with pytest.raises(AssertionError, match="logprob of"):
        compare_logprobs("x", STEPS, entries(**changed))


def test_a_wrong_rank_and_a_missing_candidate_are_errors() -> None:
    wrong_rank = entries()
    wrong_rank[0][7] = Logprob(-0.5, 2)
    with pytest.raises(AssertionError, match="rank"):
        compare_logprobs("x", STEPS, wrong_rank)
    missing = entries()
    missing[2] = {9: Logprob(-1.5, 1), 4: Logprob(-3.1, 2)}
    with pytest.raises(AssertionError, match="expected|missing"):
        compare_logprobs(
            "x", {**STEPS, "top_ids": [[7, 1], [8, 2], [3, 9]], "top_logprobs": STEPS["top_logprobs"]}, missing
        )
