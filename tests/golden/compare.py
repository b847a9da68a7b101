"""The rule of truth, and what it needs: walk two sequences of tokens, judge the first difference.

    ids equal                       -> every log-probability within HF_LOGPROB_ATOL
    first difference, gap < 1e-4    -> a tie: transformers itself could have said either; stop comparing there
    first difference, gap larger    -> wrong

A tie is returned by name, never passed over in silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minivllm import RequestOutput, SamplingParams
from minivllm.outputs import Logprob
from tests.tolerances import HF_LOGPROB_ATOL, HF_TIE_GAP

Entry = Mapping[int, Logprob]


@dataclass(frozen=True)
class Tie:
    """Where transformers' best two were too close to decide."""

    case: str
    position: int
    gap: float
    expected: int
    actual: int

    def __str__(self) -> str:
        return (
            f"tie in {self.case} at output token {self.position}: transformers chose {self.expected}, "
            f"we {self.actual}, its gap is {self.gap:.2g}"
        )


def sampling_params(case: Mapping[str, Any], **changed: Any) -> SamplingParams:
    """The case's parameters with the logprobs it holds: 5 where it has the best five, else the token's own."""
    logprobs = 5 if "top_ids" in case["steps"] else 0
    prompt_logprobs = 5 if case.get("prompt_steps") else None
    return SamplingParams(**{"logprobs": logprobs, "prompt_logprobs": prompt_logprobs, **case["params"], **changed})


def compare_case(case: Mapping[str, Any], output: RequestOutput) -> Tie | None:
    """Assert that `output` is what transformers says. Returns the tie that ended the comparison, or None."""
    name, steps, ours = case["id"], case["steps"], output.outputs[0]
    assert output.prompt_token_ids == case["prompt"], name
    if case.get("prompt_steps"):
        assert output.prompt_logprobs is not None, name
        assert output.prompt_logprobs[0] is None, f"{name}: nothing predicts the first token"
        assert len(output.prompt_logprobs) == len(case["prompt"]), name
        compare_logprobs(f"{name}, prompt", case["prompt_steps"], output.prompt_logprobs[1:])
    tie = find_tie(name, steps, ours.token_ids)
    num_equal = len(steps["token_ids"]) if tie is None else tie.position
    if ours.logprobs is not None:
        compare_logprobs(name, first_steps(steps, num_equal), ours.logprobs[:num_equal])
    if tie is None:
        assert (ours.finish_reason, ours.stop_reason) == (case["finish_reason"], case["stop_reason"]), name
        if "text" in case:
            assert ours.text == case["text"], name
    return tie


def find_tie(name: str, steps: Mapping[str, Any], token_ids: Sequence[int]) -> Tie | None:
    """None if the ids are equal, the tie where they first differ; AssertionError for a difference that is none."""
    expected = steps["token_ids"]
    for position, (theirs, ours) in enumerate(zip(expected, token_ids, strict=False)):
        if theirs != ours:
            gap = steps["gaps"][position]
            assert gap < HF_TIE_GAP, (
                f"{name}: output token {position} must be {theirs}, got {ours}; transformers' gap is {gap}: no tie"
            )
            return Tie(name, position, gap, theirs, ours)
    assert len(token_ids) == len(expected), f"{name}: expected {len(expected)} tokens, got {len(token_ids)}"
    return None


def first_steps(steps: Mapping[str, Any], count: int) -> dict[str, Any]:
    return {key: values[:count] for key, values in steps.items()}


def compare_logprobs(name: str, steps: Mapping[str, Any], entries: Sequence[Entry | None]) -> float:
    """Every stored log-probability against ours, ranks too. Returns the largest difference."""
    assert len(entries) == len(steps["token_ids"]), (
        f"{name}: {len(entries)} entries for {len(steps['token_ids'])} tokens"
    )
    worst = 0.0
    for position, entry in enumerate(entries):
        place = f"{name}, position {position}"
        assert entry is not None, place
        token_id = steps["token_ids"][position]
        assert token_id in entry, f"{place}: token {token_id} has no logprob"
        worst = max(worst, _difference(place, token_id, steps["logprobs"][position], entry[token_id].logprob))
        rank = steps["ranks"][position]
        lowest, highest = (rank, rank) if isinstance(rank, int) else rank
        assert lowest <= entry[token_id].rank <= highest, f"{place}: rank {entry[token_id].rank}, expected {rank}"
        if "top_ids" in steps:
            worst = max(worst, _compare_top(place, steps["top_ids"][position], steps["top_logprobs"][position], entry))
    return worst


def _compare_top(place: str, top_ids: Sequence[int], top_logprobs: Sequence[float], entry: Entry) -> float:
    """The best five. The last may be another token where it and the sixth are equally likely."""
    worst = 0.0
    for token_id, logprob in zip(top_ids, top_logprobs, strict=True):
        if token_id in entry:
            worst = max(worst, _difference(place, token_id, logprob, entry[token_id].logprob))
        else:
            assert logprob - top_logprobs[-1] <= 2 * HF_LOGPROB_ATOL, f"{place}: {token_id} is missing among the best"
    assert len(entry) >= len(top_ids), f"{place}: {len(entry)} logprobs, expected {len(top_ids)}"
    return worst


def _difference(place: str, token_id: int, expected: float, actual: float) -> float:
    difference = abs(expected - actual)
    assert difference <= HF_LOGPROB_ATOL, f"{place}: logprob of {token_id} must be {expected}, got {actual}"
    return difference
