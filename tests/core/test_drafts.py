"""Drafts in the scheduler: where they fit, what is kept of them, and that nobody waits or gives way for one."""

from __future__ import annotations

import pytest

from minivllm.core.scheduler import Scheduler
from minivllm.outputs import EngineCoreOutput, ModelRunnerOutput, SchedulerOutput
from tests.core.helpers import DRAWN, EOS, add, block_ids, make_request, make_scheduler, run_step


def guess(scheduler: Scheduler, **drafts: list[int]) -> SchedulerOutput:
    """Schedule one step with these drafts."""
    for request_id, token_ids in drafts.items():
        scheduler.requests[request_id].draft_token_ids = token_ids
    return scheduler.schedule()


def verify(scheduler: Scheduler, step: SchedulerOutput, **sampled: list[int]) -> list[EngineCoreOutput]:
    return scheduler.update_from_output(step, ModelRunnerOutput(sampled, {}, {}, {}))


def running(*prompt_sizes: int, max_tokens: int = 16, **limits: int) -> Scheduler:
    """Requests a, b, ... that have drawn their first token, DRAWN; blocks of four tokens."""
    scheduler = make_scheduler(**limits)
    for index, size in enumerate(prompt_sizes):
        add(scheduler, make_request("abc"[index], range(100 * index, 100 * index + size), max_tokens=max_tokens))
    run_step(scheduler)
    return scheduler


def test_accepted_drafts_are_tokens_and_computed_ones():
    scheduler = running(4)
    step = guess(scheduler, a=[8, 9, 10])
    assert step.num_scheduled_tokens == {"a": 4} and step.draft_token_ids == {"a": [8, 9, 10]}
    [output] = verify(scheduler, step, a=[8, 9, 10, 5])
    request = scheduler.requests["a"]
    assert output.new_token_ids == [8, 9, 10, 5] and request.output_token_ids == [DRAWN, 8, 9, 10, 5]
    assert request.num_computed_tokens == 8 and request.draft_token_ids == []
    assert scheduler.schedule().num_scheduled_tokens == {"a": 1}


def test_rejected_drafts_were_never_there_and_their_slots_are_written_again():
    scheduler = running(4)
    verify(scheduler, guess(scheduler, a=[8, 9, 10, 11]), a=[8, 5])
    request, blocks = scheduler.requests["a"], block_ids(scheduler, "a")
    assert request.output_token_ids == [DRAWN, 8, 5] and request.num_computed_tokens == 6 and len(blocks) == 3
    step, _ = run_step(scheduler)
    assert step.num_scheduled_tokens == {"a": 1} and step.scheduled_cached_reqs[0].new_block_ids == []
    assert step.scheduled_cached_reqs[0].num_computed_tokens == 6 and block_ids(scheduler, "a") == blocks


def test_drafts_are_for_one_step():
    scheduler = running(4)
    verify(scheduler, guess(scheduler, a=[8, 9]), a=[5])
    assert scheduler.schedule().draft_token_ids == {}


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(64, {"a": [1, 2, 3], "b": [4, 5, 6]}), (6, {"a": [1, 2, 3], "b": [4]}), (4, {"a": [1, 2]}), (2, {})],
)
def test_drafts_take_what_is_left_of_the_budget(budget: int, expected: dict[str, list[int]]):
    scheduler = running(4, 4)
    object.__setattr__(scheduler.config, "max_num_batched_tokens", budget)
    step = guess(scheduler, a=[1, 2, 3], b=[4, 5, 6])
    assert step.draft_token_ids == expected and set(step.num_scheduled_tokens) == {"a", "b"}
    assert step.total_num_scheduled_tokens == 2 + sum(map(len, expected.values())) <= budget


def test_no_prompt_waits_for_a_draft():
    """b's chunk takes all that the budget leaves: a computes its token and no more."""
    scheduler = make_scheduler(max_num_batched_tokens=8)
    add(scheduler, make_request("a", range(4)))
    run_step(scheduler)
    add(scheduler, make_request("b", range(100, 120)))
    run_step(scheduler)
    step = guess(scheduler, a=[1, 2, 3])
    assert step.num_scheduled_tokens == {"a": 1, "b": 7} and step.draft_token_ids == {}


@pytest.mark.parametrize("limits", [{"max_tokens": 4}, {"max_model_len": 8}])
def test_drafts_end_before_their_request_must(limits: dict[str, int]):
    """4 + 1 tokens of 8: two drafts, and one more token behind them."""
    scheduler = running(4, **limits)
    step = guess(scheduler, a=[1, 2, 3, 4])
    assert step.draft_token_ids == {"a": [1, 2]}
    [output] = verify(scheduler, step, a=[1, 2, 3])
    assert output.finish_reason == "length"


def test_a_short_pool_drops_drafts_and_preempts_nobody():
    """Three blocks of four: a and b take one more for their fifth tokens, and then none is left."""
    scheduler = running(4, 3, num_blocks=4)
    step = guess(scheduler, b=[1], a=[2, 3, 4, 5])  # a would need a third one
    assert step.draft_token_ids == {} and step.num_scheduled_tokens == {"a": 1, "b": 1}
    assert not step.preempted_req_ids and scheduler.kv_cache.pool.num_free_blocks == 0
    verify(scheduler, step, a=[9], b=[9])
    assert guess(scheduler, a=[2, 3]).draft_token_ids == {"a": [2, 3]}  # in slots that it has


def test_a_victim_gives_its_drafts_back():
    """By priority, a request may be preempted that was scheduled earlier in the step."""
    scheduler = make_scheduler(num_blocks=4, policy="priority")
    add(scheduler, make_request("low", range(4), priority=5))
    run_step(scheduler)
    add(scheduler, make_request("high", range(100, 104)))
    run_step(scheduler)  # low has two blocks, high one
    step = guess(scheduler, low=[1, 2])
    assert step.preempted_req_ids == ["low"] and step.num_scheduled_tokens == {"high": 1}
    assert step.draft_token_ids == {} and step.total_num_scheduled_tokens == 1


def test_a_block_has_a_name_once_its_drafts_are_tokens():
    scheduler = running(4)
    step = guess(scheduler, a=[8, 9, 10])
    first, second = (scheduler.kv_cache.pool.blocks[block_id] for block_id in block_ids(scheduler, "a"))
    assert first.block_hash is not None and second.block_hash is None
    verify(scheduler, step, a=[8, 9, 10, EOS])
    assert second.block_hash is not None
    scheduler.finish_request("a")
    add(scheduler, make_request("b", [0, 1, 2, 3, DRAWN, 8, 9, 10, 11]))
    assert scheduler.schedule().scheduled_new_reqs[0].num_computed_tokens == 8


def test_a_block_with_a_rejected_draft_has_none():
    scheduler = running(4)
    step = guess(scheduler, a=[8, 9, 10])
    verify(scheduler, step, a=[8, 9, 11])
    assert scheduler.kv_cache.pool.blocks[block_ids(scheduler, "a")[1]].block_hash is None
    run_step(scheduler)  # 11 is computed in the place of 10, and now the block is full
    scheduler.finish_request("a")
    add(
        scheduler,
        make_request("right", [0, 1, 2, 3, DRAWN, 8, 9, 11, 5]),
        make_request("wrong", [0, 1, 2, 3, DRAWN, 8, 9, 10, 5]),
    )
    right, wrong = scheduler.schedule().scheduled_new_reqs
    assert (right.num_computed_tokens, wrong.num_computed_tokens) == (8, 4)


def test_what_was_drawn_behind_an_end_is_dropped():
    scheduler = make_scheduler()
    add(scheduler, make_request("a", range(4), eos_token_ids=frozenset({EOS})))
    run_step(scheduler)
    [output] = verify(scheduler, guess(scheduler, a=[8, EOS, 9, 10]), a=[8, EOS, 9, 10, 11])
    assert output.new_token_ids == [8, EOS] and output.finish_reason == "stop"
    assert not scheduler.requests
    scheduler.check_integrity()


def test_drafts_follow_tokens_that_nobody_drew():
    scheduler = running(4)
    scheduler.append_tokens("a", [20, 21])
    step = guess(scheduler, a=[8])
    assert step.num_scheduled_tokens == {"a": 4} and step.scheduled_cached_reqs[0].new_token_ids == [20, 21]
    verify(scheduler, step, a=[9])
    assert scheduler.requests["a"].num_computed_tokens == 7
