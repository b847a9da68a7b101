"""Replay: bit for bit the same over a long run under pressure; a planted difference is found; a change is told."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from minivllm import LLM, ClientError, SamplingParams, StructuredOutputsParams
from minivllm.trace import Trace, compare, record, replay
from minivllm.trace.records import Step
from minivllm.trace.replay import outcomes

NUM_REQUESTS = 200
WORDS = (
    "the",
    "value",
    "is",
    "what",
    "on",
    "road",
    "red",
    "blue",
    "one",
    "of",
    "a",
    "for",
    "that",
    "with",
    "old",
    "new",
)


def run_under_pressure(llm: LLM, num_requests: int, seed: int) -> None:
    """Requests of all kinds come while others run; some are given up, and all of them together do not fit."""
    engine, chance = llm.llm_engine, random.Random(seed)
    shared = " ".join(chance.choices(WORDS, k=6))
    given_up: list[str] = []
    for number in range(num_requests):
        prompt = " ".join([shared if chance.random() < 0.5 else "", *chance.choices(WORDS, k=chance.randint(1, 6))])
        params = SamplingParams(
            temperature=chance.choice([0.0, 0.7, 1.2]),
            top_p=chance.choice([1.0, 0.9]),
            max_tokens=chance.randint(1, 24),
            repetition_penalty=chance.choice([1.0, 1.3]),
            logprobs=chance.choice([None, 2]),
            stop=chance.choice([[], ["e"]]),
        )
        if number % 20 == 7:
            params.structured_outputs = StructuredOutputsParams(choice=["red blue", "old road"])
        request_id = engine.add_request(prompt, params, priority=chance.randint(0, 2))
        if chance.random() < 0.05:
            given_up.append(request_id)
        for _ in range(chance.choice([0, 0, 1, 3])):
            engine.step()
        if given_up and chance.random() < 0.3:
            engine.abort_request(given_up.pop())
        if number == num_requests // 2:  # everybody leaves for a moment
            while engine.has_unfinished_requests():
                engine.step()
            assert llm.reset_prefix_cache()
    while engine.has_unfinished_requests():
        engine.step()


def test_two_hundred_requests_with_preemptions_are_replayed_bit_for_bit(crowded: Callable[[], LLM], tmp_path: Path):
    llm = crowded(num_gpu_blocks_override=16, max_num_seqs=6, scheduling_policy="priority")
    with record(llm.llm_engine, num_top=0, file=tmp_path / "run.jsonl"):
        run_under_pressure(llm, NUM_REQUESTS, seed=1)
    recorded = Trace.load(tmp_path / "run.jsonl")
    again = replay(recorded)
    assert [str(difference) for difference in compare(recorded, again)] == []
    assert len(recorded.requests) == NUM_REQUESTS and len(again.steps) == len(recorded.steps)
    actions = {row.action for step in recorded.steps for row in step.rows}
    assert {"preempt", "chunk", "prefill", "decode", "forced", "wait_blocks", "wait_seqs", "wait_line"} <= actions
    assert sum(row.action == "preempt" for step in recorded.steps for row in step.rows) >= 20
    assert sum(bool(row.prefix_hits) for step in recorded.steps for row in step.rows) >= 20
    assert sum(len(row.draws) for step in recorded.steps for row in step.rows) > 1000
    kinds = [type(event).__name__ for event in recorded.events]
    assert kinds.count("Aborted") >= 3 and kinds.count("CacheReset") == 1


@pytest.fixture(scope="module")
def recorded(crowded: Callable[[], LLM]) -> Trace:
    llm = crowded()
    with record(llm.llm_engine, num_top=0) as trace:
        run_under_pressure(llm, 12, seed=2)
    return trace


def test_drafts_are_replayed_too(crowded: Callable[[], LLM]):
    llm = crowded(speculative_config={"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1})
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    trace = llm.trace(["the value the value the value", "red red red"], params)
    rows = [row for step in trace.steps for row in step.rows]
    assert any(row.draft_token_ids for row in rows) and any(len(row.draws) > 1 for row in rows)
    assert list(compare(trace, replay(trace))) == []


def test_embeddings_are_replayed_too(tiny_model: Callable[[str], Path]):
    llm = LLM(tiny_model("bert-mean"), dtype="float32")
    with record(llm.llm_engine) as trace:
        llm.embed(["the value", "red"], use_tqdm=False)
    digests = [row.embedding_digest for step in trace.steps for row in step.rows]
    assert len(set(digests)) == 2 and all(digests)
    again = replay(trace)
    assert list(compare(trace, again)) == []
    again.steps[0].rows[1].embedding_digest = "0"
    assert next(compare(trace, again)).field == "embedding_digest"


# ------------------------------------------------------------------ a difference is found
def change_row(trace: Trace, change: Callable[[Step], None]) -> tuple[Trace, Step]:
    """A copy of the trace in which the first step with a draw from the middle on is not what happened."""
    wrong = copy.deepcopy(trace)
    step = next(s for s in wrong.steps[len(wrong.steps) // 2 :] if any(row.draws for row in s.rows))
    change(step)
    return wrong, step


def drawing(step: Step):
    return next(row for row in step.rows if row.draws)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("draws.digest", lambda step: setattr(drawing(step).draws[0], "digest", "0" * 16)),
        ("draws.token_id", lambda step: setattr(drawing(step).draws[0], "token_id", 319)),
        ("slot_mapping", lambda step: drawing(step).slot_mapping.append(3)),
        ("action", lambda step: setattr(drawing(step), "action", "chunk")),
        ("num_free_blocks", lambda step: setattr(step, "num_free_blocks", 99)),
        ("decision", lambda step: step.rows.remove(drawing(step))),
    ],
)
def test_one_planted_difference_is_the_first_that_is_told(recorded: Trace, field: str, change: Callable[[Step], None]):
    wrong, step = change_row(recorded, change)
    first = next(compare(wrong, replay(recorded)))
    assert (first.step, first.field) == (step.number, field) and first.recorded != first.replayed
    assert f"step {step.number}" in str(first) and f"{field} was" in str(first)


def test_times_are_not_compared_and_a_missing_step_is(recorded: Trace):
    later = copy.deepcopy(recorded)
    for step in later.steps:
        step.scheduled_seconds += 1.0
    assert list(compare(recorded, later)) == []
    later.events.remove(later.steps[-1])
    (difference,) = compare(recorded, later)
    assert difference[1:] == (None, "the step", "a step", "nothing")
    (difference,) = compare(later, recorded)
    assert difference[1:] == (None, "the step", "nothing", "a step")


def test_an_engine_that_computes_otherwise_is_found_at_its_first_step(recorded: Trace, monkeypatch: pytest.MonkeyPatch):
    """Not the trace but the engine is wrong: one bit of one logit, which changes no token."""
    from minivllm.models.llama import LlamaForCausalLM

    compute = LlamaForCausalLM.compute_logits
    monkeypatch.setattr(LlamaForCausalLM, "compute_logits", lambda self, hidden: compute(self, hidden) * (1 + 2**-23))
    first = next(compare(recorded, replay(recorded, until=3), until=3))
    drawn = next(step.number for step in recorded.steps if any(row.draws for row in step.rows))
    assert (first.step, first.field) == (drawn, "draws.digest")


# ------------------------------------------------------------------ another setting
def test_another_block_size_changes_blocks_and_no_token(recorded: Trace):
    again = replay(recorded, {"block_size": 4})
    assert again.header["engine"]["num_blocks"] == 11 * 8 // 4 + 1  # as many tokens
    assert any(difference.field == "slot_mapping" for difference in compare(recorded, again))
    then, now = outcomes(recorded), outcomes(again)
    ended = [key for key, outcome in then.items() if outcome.finish_reason is not None]
    assert [then[key].token_ids for key in ended] == [now[key].token_ids for key in ended]
    assert [then[key].finish_reason for key in ended] == [now[key].finish_reason for key in ended]


def test_a_smaller_budget_changes_decisions(recorded: Trace):
    again = replay(recorded, {"max_num_batched_tokens": 4})
    assert len(again.steps) > len(recorded.steps)
    assert any(difference.is_decision for difference in compare(recorded, again))
    assert all(step.num_tokens <= 4 for step in again.steps)


def test_a_replay_can_stop_early(recorded: Trace):
    again = replay(recorded, until=4)
    assert len(again.steps) == 4 and list(compare(recorded, again, until=4)) == []


def test_what_cannot_be_replayed_is_refused(recorded: Trace, llm: LLM):
    with pytest.raises(ClientError, match="there is no setting 'colour'; there are batch_invariant"):
        replay(recorded, {"colour": 1})
    params = SamplingParams(max_tokens=1)
    llm.trace("the", params)
    with pytest.raises(ClientError, match="begins in the middle"):
        replay(llm.trace("the", params))
