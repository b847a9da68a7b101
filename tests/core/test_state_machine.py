"""The scheduler, the manager and the pool under random sequences of everything that can happen to them.

A hypothesis state machine drives the real Scheduler with a FakeRunner, which knows what lies in every slot of the
cache. Drafts, right and wrong ones, follow the newest tokens. Requests share prefixes, salts and children's prompts,
pools are so small that preemption is the rule, and steps break in every way. After each rule the ten invariants hold:

 1. free and held blocks are all blocks, and no block is twice in the free queue, where nameless ones stand in front
    of named ones and the tail of a prefix in front of its head; a step takes its new blocks from the front;
 2. a block's ref_cnt is the number of tables that hold it;
 3. no slot is writable by two requests: blocks held twice are full and named, or computed by one of the holders;
 4. a table covers exactly ceil(computed tokens / block_size) blocks, the step's own tokens and drafts included, or
    what earlier drafts needed;
 5. every request is in exactly one of waiting, running, ended, and moves along the lifecycle only; nobody overtakes:
    running and waiting together are in order of arrival (by priority: the waiting ones by priority and arrival);
 6. a step schedules at most its budget, running requests first, and at most max_num_seqs run; who is cut, is cut by
    the budget or the threshold, and who waits though there is room, waits for blocks (or for room for all of it);
    drafts follow only complete requests, and no token waits for one;
 7. a block's hash is the chain recomputed from scratch, and its slots hold just those tokens; a block is named by the
    step that fills it, and a lookup finds the longest prefix that has names;
 8. an ended request holds nothing: no block, no place in a queue, no state in the worker;
 9. progress: while requests exist every step computes a token, those who matter least give way and never the oldest,
    and everything admitted ends within a bound;
10. what a request got is what the sequential reference gives, however it was chunked, cached or preempted.

STATE_MACHINE_EXAMPLES and STATE_MACHINE_STEPS choose the depth; the CI run is 500 x 50, the nightly one 10000 x 100.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from minivllm.config import CacheConfig, SchedulerConfig
from minivllm.core.block_hash import ROOT_HASH
from minivllm.core.request import Request, RequestStatus
from minivllm.core.scheduler import Scheduler
from minivllm.outputs import EngineCoreOutput, SchedulerOutput
from minivllm.sampling_params import SamplingParams

from .fake_runner import (
    VOCAB_SIZE,
    FakeRunner,
    StepFailed,
    expected_output,
    extend_digest,
    next_token_id,
    prefix_digest,
)

EXAMPLES = int(os.environ.get("STATE_MACHINE_EXAMPLES", "500"))
STEPS = int(os.environ.get("STATE_MACHINE_STEPS", "50"))

# Two long texts whose beginnings the prompts are cut from, so that prefixes are shared all the time.
TEXTS = ([0, 1, 2, 3, 4, 5] * 4, [0, 1, 2, 3, 5, 5, 5, 4, 3, 3, 1, 0] * 2)
LIFECYCLE = {
    (RequestStatus.WAITING, RequestStatus.RUNNING),
    (RequestStatus.RUNNING, RequestStatus.PREEMPTED),
    (RequestStatus.PREEMPTED, RequestStatus.RUNNING),
    (RequestStatus.WAITING, RequestStatus.FINISHED),
    (RequestStatus.RUNNING, RequestStatus.FINISHED),
    (RequestStatus.PREEMPTED, RequestStatus.FINISHED),
}


def hash_chain(token_ids: list[int], cache_salt: str | None, block_size: int) -> list[bytes]:
    """The formula of block_hash.py, from scratch: parent, then "-" or "+<bytes>:<salt>", then the ids as int64."""
    hashes = [ROOT_HASH]
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        salt = cache_salt.encode() if cache_salt is not None and start == 0 else None
        prefix = b"-" if salt is None else b"+" + str(len(salt)).encode() + b":" + salt
        ids = array("q", token_ids[start : start + block_size]).tobytes()
        hashes.append(hashlib.sha256(hashes[-1] + prefix + ids).digest())
    return hashes[1:]


class EngineMachine(RuleBasedStateMachine):
    """`policy`, `chunked` and `caching` are set by the test, everything else is drawn."""

    policy = "fcfs"
    chunked = True
    caching = True

    @initialize(
        num_blocks=st.integers(5, 14),
        block_size=st.integers(1, 4),
        budget=st.sampled_from([1, 3, 5, 8, 12, 24]),
        max_num_seqs=st.sampled_from([1, 2, 3, 4, 6, 8]),
        threshold=st.sampled_from([0, 0, 0, 1, 3, 5]),
        max_model_len=st.integers(6, 28),
    )
    def start(self, num_blocks, block_size, budget, max_num_seqs, threshold, max_model_len):
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.config = SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget if self.chunked else max_model_len + budget,
            max_model_len=max_model_len,
            enable_chunked_prefill=self.chunked,
            long_prefill_token_threshold=threshold,
            policy=self.policy,
        )
        cache_config = CacheConfig(block_size=block_size, enable_prefix_caching=self.caching)
        self.scheduler = Scheduler(self.config, cache_config, num_blocks)
        self.pool = self.scheduler.kv_cache.pool
        self.tables = self.scheduler.kv_cache.tables
        self.added: dict[str, Request] = {}
        self.runner = FakeRunner(num_blocks, block_size, lambda request_id: self.added[request_id].cache_salt)
        self.got: dict[str, list[int]] = {}
        self.ended: dict[str, str] = {}  # how the engine was told that the request ended
        self.statuses: dict[str, RequestStatus] = {}
        self.digest_of_hash: dict[bytes, int] = {}
        self.parent_of: dict[bytes, bytes] = {}
        self.were_names_taken = False  # by a fault: then a block's copy may stand behind what follows it
        self.first_hit: dict[str, int] = {}  # tokens that the first admission found in the cache
        self.num_owned: dict[tuple[str, int], int] = {}  # (request, its preemptions) -> blocks of its table
        self.num_drafts = self.num_right = 0  # guesses behind each newest token, and how many of them are right
        self.num_forced = 0  # tokens that follow each drawn one without being drawn
        self.is_inside_step = False

    # ------------------------------------------------------------------ rules
    @rule(
        text=st.sampled_from(TEXTS),
        cut=st.integers(1, 14),
        tail=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=2),
        max_tokens=st.integers(1, 16),
        min_tokens=st.integers(0, 3),
        stops=st.sampled_from([(), (), (), (0,), (0, 1), (0, 0, 1)]),
        salt=st.sampled_from([None, None, None, "a", "b"]),
        priority=st.integers(0, 2),
        num_children=st.sampled_from([1, 2, 3]),
        skip=st.sampled_from([False, False, False, True]),
    )
    def add(self, text, cut, tail, max_tokens, min_tokens, stops, salt, priority, num_children, skip):
        """n children of one prompt are n requests with seeds of their own."""
        prompt = (text[:cut] + tail)[: self.largest - 1]
        max_tokens = min(max_tokens, self.scheduler.kv_cache.num_usable_tokens - len(prompt))  # may exceed the context
        for _ in range(num_children):
            self._add(
                prompt,
                SamplingParams(max_tokens=None, min_tokens=min_tokens),
                max_tokens=max_tokens,
                eos_token_ids=frozenset(stops[:1]),
                stop_token_ids=frozenset(stops[1:]),
                priority=priority,
                cache_salt=salt,
                skip_prefix_cache=skip,
            )

    @rule(
        text=st.sampled_from(TEXTS),
        cuts=st.lists(st.tuples(st.integers(1, 20), st.integers(-2, 2)), min_size=2, max_size=4),
        is_pooling=st.booleans(),
    )
    def add_several(self, text, cuts, is_pooling):
        """Prompts of one text, one the beginning of the other, and some priorities; one may ask for an embedding."""
        for cut, priority in cuts:
            prompt = text[:cut][: self.largest - 1]
            max_tokens = self.largest - len(prompt)
            self._add(prompt, SamplingParams(max_tokens=None), max_tokens=max_tokens, priority=priority)
        if is_pooling:
            self._add(text[: self.largest], None)

    @rule(count=st.integers(1, 4))
    def steps(self, count):
        for _ in range(count):
            self._step()

    @rule(count=st.integers(5, 12))
    def many_steps(self, count):
        for _ in range(count):
            self._step()

    @precondition(lambda self: self.scheduler.requests)
    @rule(fault=st.sampled_from(["abort", "abort in step", "fail", "fail after abort", "nan"]), data=st.data())
    def disturb(self, fault, data):
        """Somebody leaves or breaks, in whatever state he is; or a whole step breaks after some of its writes."""
        request_id = data.draw(st.sampled_from(sorted(self.scheduler.requests)))
        self.were_names_taken |= fault != "abort"
        if fault == "abort":
            self._abort(request_id)
        elif fault == "abort in step":
            self._step(meanwhile=lambda: self._abort(request_id))
        elif fault == "nan":
            self._step(broken={request_id})
        else:
            aborted = request_id if fault == "fail after abort" else None
            self._fail_step(data.draw(st.integers(0, 8)), aborted)

    @rule(budget=st.integers(1, 24))
    def change_budget(self, budget):
        if self.chunked:
            self.config = self.scheduler.config = replace(self.config, max_num_batched_tokens=budget)

    @rule(num_forced=st.sampled_from([0, 1, 2, 6]))
    def force(self, num_forced):
        """From now on grammars leave no choice so often."""
        self.num_forced = num_forced

    @rule(num_drafts=st.sampled_from([0, 1, 2, 3, 6]), num_right=st.integers(0, 6))
    def guess(self, num_drafts, num_right):
        """From now on somebody guesses so many tokens, and is right so often."""
        self.num_drafts, self.num_right = num_drafts, num_right

    @rule(reset=st.booleans())
    def look(self, reset):
        """Asking changes nothing; a reset of the prefix cache is refused exactly while somebody holds a block."""
        before = self._picture()
        self.scheduler.has_work, self.scheduler.has_unfinished_requests, self.pool.usage, repr(self.pool.blocks)
        for request in list(self.scheduler.waiting):
            self._check_lookup(request)
        self.scheduler.check_integrity()
        assert self._picture() == before
        if reset:
            is_idle = not self.tables
            assert self.pool.reset_prefix_cache() == is_idle
            assert self.pool.num_cached_blocks == 0 if is_idle else self._picture() == before

    def drain(self):
        """9: everything ends within the bound of its policy.

        The oldest running request advances in every step and is never preempted, so a request costs at most its own
        tokens in steps. By priority the budget may go to requests that were admitted earlier.
        """
        needed = [
            request.num_prompt_tokens + max(request.max_tokens, 1) for request in self.scheduler.requests.values()
        ]
        bound = sum(needed) * (len(needed) if self.policy == "priority" else 1)
        for _ in range(bound):
            if not self.scheduler.has_unfinished_requests:
                break
            self._step()
        assert not self.scheduler.requests, f"not done after {bound} steps: {self.scheduler.requests}"
        assert self.pool.num_free_blocks == self.num_blocks - 1

    def teardown(self):
        if not hasattr(self, "scheduler") or self.is_inside_step:
            return  # nothing was started, or a check inside a step has just failed: that is the finding
        self.drain()
        self._step()  # the worker hears of the last ones
        assert not self.scheduler.has_work and not self.runner.states
        assert set(self.ended) == set(self.added), "no request vanishes"
        assert self.pool.reset_prefix_cache()
        self.ten_invariants()

    # ------------------------------------------------------------------ parts of the rules
    @property
    def largest(self) -> int:
        """Tokens that a request may have in all: the engine refuses what can never fit."""
        return min(self.config.max_model_len, self.scheduler.kv_cache.num_usable_tokens)

    def _add(self, prompt: list[int], params: SamplingParams | None, **fields) -> None:
        number = len(self.added)
        request = Request(f"r{number}", prompt, params, seed=number, arrival=number, **fields)
        self.added[request.request_id] = request
        self.got[request.request_id] = []
        self.scheduler.add_request(request)

    def _abort(self, request_id: str) -> None:
        is_live = request_id in self.scheduler.requests
        assert self.scheduler.finish_request(request_id) == is_live
        assert not self.scheduler.finish_request(request_id), "twice is once"
        if is_live:
            self.ended[request_id] = "abort"

    def _schedule(self) -> SchedulerOutput:
        self.is_inside_step = True
        running = list(self.scheduler.running)
        waiting = [request.request_id for request in self.scheduler.waiting]
        free = self.pool.free_block_ids()
        step = self.scheduler.schedule()
        self._check_step(step, running, waiting)
        self._check_taken(step, free)
        return step

    def _step(self, broken: set[str] = frozenset(), meanwhile=None) -> None:
        step = self._schedule()
        result = self.runner.execute(step, broken)
        assert set(self.runner.states) == {r.request_id for r in self.scheduler.running}, "8: the worker forgets"
        if meanwhile:
            meanwhile()
        outputs = self.scheduler.update_from_output(step, result)
        self._take(outputs)
        for output in outputs:
            if output.new_token_ids and output.finish_reason is None:
                self._append_forced(self.added[output.request_id])
                self.added[output.request_id].draft_token_ids = self._guess(self.added[output.request_id])

    def _guess(self, request: Request) -> list[int]:
        """num_right tokens that will be drawn, then others."""
        digest = prefix_digest(request.cache_salt, request.all_token_ids)
        drafts: list[int] = []
        for position in range(self.num_drafts):
            token_id = next_token_id(digest, request.seed)
            drafts.append(token_id if position < self.num_right else (token_id + 1) % VOCAB_SIZE)
            digest = extend_digest(digest, drafts[-1])
        return drafts

    def _append_forced(self, request: Request) -> None:
        """What would be drawn anyway, so that the reference stays right."""
        digest = prefix_digest(request.cache_salt, request.all_token_ids)
        token_ids: list[int] = []
        for _ in range(self.num_forced):
            token_ids.append(next_token_id(digest, request.seed))
            digest = extend_digest(digest, token_ids[-1])
        added = self.scheduler.append_tokens(request.request_id, token_ids)
        assert added == token_ids[: len(added)] and (len(added) == len(token_ids) or request.is_finished)
        self.got[request.request_id] += added
        if request.is_finished:
            self.ended[request.request_id] = str(request.finish_reason)

    def _fail_step(self, fail_after: int, aborted: str | None) -> None:
        step = self._schedule()
        with pytest.raises(StepFailed):
            self.runner.execute(step, fail_after=fail_after)
        if aborted:
            self._abort(aborted)
        expected = {request_id for request_id in step.num_scheduled_tokens if request_id not in self.ended}
        outputs = self.scheduler.fail_step(step, "boom")
        assert {output.request_id for output in outputs} == expected
        self._take(outputs)

    def _take(self, outputs: list[EngineCoreOutput]) -> None:
        for output in outputs:
            assert output.request_id not in self.ended, "an ended request says nothing more"
            self.got[output.request_id] += output.new_token_ids
            if output.finish_reason != "error":
                assert output.num_cached_tokens == self.first_hit.get(output.request_id, 0), "what usage reports"
            if output.finish_reason is not None:
                self.ended[output.request_id] = output.finish_reason
                assert (output.error is not None) == (output.finish_reason == "error")
        self.is_inside_step = False

    def _picture(self) -> tuple:
        blocks = [(block.ref_cnt, block.block_hash) for block in self.pool.blocks]
        queues = [list(map(repr, self.scheduler.running)), list(map(repr, self.scheduler.waiting))]
        return blocks, self.pool.free_block_ids(), queues, {key: table.block_ids for key, table in self.tables.items()}

    # ------------------------------------------------------------------ invariants of a step just scheduled
    def _check_step(self, step: SchedulerOutput, running: list[Request], waiting: list[str]) -> None:
        self._check_amounts(step)
        self._check_shares(step, running)
        self._check_order(step, running, waiting)
        self._check_tables(step)
        self._check_decisions(step)

    def _check_amounts(self, step: SchedulerOutput) -> None:
        """6 and 9."""
        scheduled = step.num_scheduled_tokens
        assert step.total_num_scheduled_tokens == sum(scheduled.values()) <= self.config.max_num_batched_tokens
        assert len(self.scheduler.running) <= self.config.max_num_seqs
        assert all(count >= 1 for count in scheduled.values())
        assert scheduled or not self.scheduler.requests, "while requests exist every step computes a token"
        for new in step.scheduled_new_reqs:
            request = self.scheduler.requests[new.request_id]
            assert new.num_computed_tokens % self.block_size == 0
            assert new.num_computed_tokens < request.num_tokens, "one token is always computed"
            may_hit = self.caching and not request.skip_prefix_cache
            assert may_hit or new.num_computed_tokens == 0
            self.first_hit.setdefault(new.request_id, new.num_computed_tokens)
            if not self.chunked:
                assert new.num_computed_tokens + scheduled[new.request_id] == request.num_tokens, "only whole prompts"

    def _check_shares(self, step: SchedulerOutput, running: list[Request]) -> None:
        """6: running requests first, and every cut and every wait has its cause."""
        scheduled, threshold = step.num_scheduled_tokens, self.config.long_prefill_token_threshold
        room = self.config.max_num_batched_tokens - step.total_num_scheduled_tokens
        is_capped = self.chunked and threshold > 0 and len(self.scheduler.requests) > 1
        stayed = [r.request_id for r in running if r.request_id not in step.preempted_req_ids]
        reached = [request_id for request_id in stayed if request_id in scheduled]
        assert reached == stayed[: len(reached)], "in order"
        assert len(reached) == len(stayed) or room == 0, "passed over although there was budget"
        assert len(reached) == len(stayed) or not step.scheduled_new_reqs, "running ones first"
        assert not step.draft_token_ids or len(reached) == len(stayed), "no token waits for a draft"
        for request_id, num_tokens in scheduled.items():
            request = self.scheduler.requests[request_id]
            num_missing = request.num_tokens - request.num_computed_tokens
            if drafts := step.draft_token_ids.get(request_id):
                assert num_tokens == num_missing + len(drafts), "drafts are behind all tokens"
                assert request.num_tokens + len(drafts) < self.largest, "one more is drawn behind them"
                assert request.num_output_tokens + len(drafts) < request.max_tokens
                num_tokens = num_missing
            is_cut_by_cap = is_capped and num_tokens == threshold
            # A victim may have given its share back to the budget after the cut.
            assert num_tokens == num_missing or is_cut_by_cap or room == 0 or step.preempted_req_ids
            assert num_tokens <= threshold or not is_capped
        if step.scheduled_new_reqs:  # the last one: those before it may have seen their room go to the next ones
            newest = self.scheduler.requests[step.scheduled_new_reqs[-1].request_id]
            num_owned = len(self.tables[newest.request_id])
            assert -(-newest.num_tokens // self.block_size) - num_owned <= self.pool.num_free_blocks, "all of it fits"
        if self.scheduler.waiting and room and not step.preempted_req_ids:
            self._check_head(self.scheduler.waiting.peek(), room)

    def _check_head(self, head: Request, room: int) -> None:
        """The first in line stays there although there is budget: for want of a place, of blocks, or of budget for all
        of it when prompts are not cut."""
        hits = self._check_lookup(head)
        num_needed = -(-head.num_tokens // self.block_size) - sum(self.pool.blocks[i].ref_cnt > 0 for i in hits)
        is_short = num_needed > self.pool.num_free_blocks
        is_too_long = not self.chunked and head.num_tokens - len(hits) * self.block_size > room
        assert is_short or is_too_long or len(self.scheduler.running) == self.config.max_num_seqs

    def _check_lookup(self, request: Request) -> list[int]:
        """7: the longest named prefix, and one token to compute. Returns the ids of its blocks."""
        hits = [block.block_id for block in self.scheduler.kv_cache.get_computed_blocks(request)]
        if not self.caching or request.skip_prefix_cache:
            assert hits == []
            return hits
        names = {block.block_hash for block in self.pool.blocks}
        chain = hash_chain(request.all_token_ids[:-1], request.cache_salt, self.block_size)
        known = [block_hash in names for block_hash in chain]
        assert [self.pool.blocks[i].block_hash for i in hits] == chain[: [*known, False].index(False)]
        return hits

    def _check_taken(self, step: SchedulerOutput, free: list[int]) -> None:
        """1: hits are lifted out of the queue, and what else is taken stood in front of all that stays."""
        if step.preempted_req_ids:
            return
        still_free = self.pool.free_block_ids()
        assert [block_id for block_id in free if block_id in set(still_free)] == still_free, "the rest keeps its order"
        hits = set()
        for new in step.scheduled_new_reqs:
            hits.update(new.block_ids[: new.num_computed_tokens // self.block_size])
        taken = set(free) - set(still_free) - hits
        assert taken == set([block_id for block_id in free if block_id not in hits][: len(taken)])

    def _check_order(self, step: SchedulerOutput, running: list[Request], waiting: list[str]) -> None:
        """5 and 9: nobody overtakes in the line, and the oldest running request stays."""
        admitted = [new.request_id for new in step.scheduled_new_reqs]
        assert admitted == waiting[: len(admitted)], "nobody overtakes"
        assert not (admitted and step.preempted_req_ids), "nobody new in a step that preempts"
        preempted = set(step.preempted_req_ids)
        assert not preempted & set(step.num_scheduled_tokens)
        if running:
            most_important = min(running, key=lambda request: (request.priority, request.arrival))
            oldest = running[0] if self.policy == "fcfs" else most_important
            assert oldest.request_id not in preempted, "the oldest is never a victim"
        by_importance = running
        if self.policy == "priority":
            by_importance = sorted(running, key=lambda request: (request.priority, request.arrival))
        least = by_importance[len(running) - len(preempted) :]
        assert preempted == {request.request_id for request in least}, "those who matter least give way"

    def _check_tables(self, step: SchedulerOutput) -> None:
        """3 and 4, while the step is about to run."""
        writers: Counter[int] = Counter()
        for request in self.scheduler.running:
            end = request.num_computed_tokens + step.num_scheduled_tokens.get(request.request_id, 0)
            table = self.tables[request.request_id].block_ids
            key = request.request_id, request.num_preemptions
            self.num_owned[key] = max(self.num_owned.get(key, 0), -(-end // self.block_size))
            assert len(table) == self.num_owned[key], "a table covers just the tokens of this step, and earlier drafts"
            end -= len(step.draft_token_ids.get(request.request_id, ()))
            written = table[request.num_computed_tokens // self.block_size :]
            writers.update(written)
            num_filled = end // self.block_size - request.num_computed_tokens // self.block_size
            is_named = [self.pool.blocks[block_id].block_hash is not None for block_id in written]
            assert is_named == [self.caching and index < num_filled for index in range(len(written))], "7"
        for block_id, count in writers.items():
            assert count == 1, f"block {block_id} can be written by {count} requests"

    def _check_decisions(self, step: SchedulerOutput) -> None:
        told = {(d.request_id, d.num_scheduled_tokens) for d in step.decisions if d.num_scheduled_tokens}
        assert told == set(step.num_scheduled_tokens.items())
        gave_way = [d.request_id for d in step.decisions if d.action == "preempt"]
        assert gave_way == step.preempted_req_ids
        assert max(Counter(d.request_id for d in step.decisions).values(), default=1) == 1, "one decision each"
        told_of = {d.request_id for d in step.decisions}
        assert all(d.reason for d in step.decisions)
        if not self.config.long_prefill_token_threshold:
            assert not any("threshold" in d.reason for d in step.decisions), "there is none to blame"
        assert told_of >= {request.request_id for request in self.scheduler.running}
        waiting = [d.request_id for d in self.scheduler.waiting_reasons(step)]
        assert waiting == [request.request_id for request in self.scheduler.waiting]

    # ------------------------------------------------------------------ invariants between two steps
    @invariant()
    def ten_invariants(self):
        if not hasattr(self, "scheduler"):
            return
        self._check_pool()
        self._check_lifecycle()
        self._check_cache()
        self._check_results()
        self.scheduler.check_integrity()

    def _check_pool(self) -> None:
        """1, 2 and 8, counted here once more and not by check_integrity."""
        free = self.pool.free_block_ids()
        held = Counter(block_id for table in self.tables.values() for block_id in table.block_ids)
        assert len(free) == len(set(free)) and not set(free) & set(held) and 0 not in held
        assert len(free) + len(held) == self.num_blocks - 1
        assert all(block.ref_cnt == held[block.block_id] for block in self.pool.blocks[1:])
        names = [self.pool.blocks[block_id].block_hash for block_id in free]
        assert names == [None] * names.count(None) + [name for name in names if name is not None], "nameless in front"
        assert set(self.tables) == {request.request_id for request in self.scheduler.running}

    def _check_lifecycle(self) -> None:
        """5."""
        for request_id, request in self.added.items():
            before = self.statuses.get(request_id, RequestStatus.WAITING)
            after = self.statuses[request_id] = request.status
            # A rule of several steps may pass through several states.
            assert before is after or after is not RequestStatus.WAITING
            assert before is after or before is not RequestStatus.FINISHED
            assert (after is RequestStatus.FINISHED) == (request_id in self.ended)
            assert (request_id in self.scheduler.requests) == (request_id not in self.ended)
        in_queues = [request.request_id for request in [*self.scheduler.running, *self.scheduler.waiting]]
        assert sorted(in_queues) == sorted(self.scheduler.requests)
        line = [(request.priority, request.arrival) for request in self.scheduler.waiting]
        if self.policy == "fcfs":
            line = [request.arrival for request in [*self.scheduler.running, *self.scheduler.waiting]]
        assert line == sorted(line), "nobody overtakes"

    def _check_cache(self) -> None:
        """7: every name in the pool stands for exactly what lies in the slots."""
        for request in self.added.values():
            self._learn_hashes(request)
        for block in self.pool.blocks[1:]:
            if block.block_hash is None:
                continue
            slots = self.runner.holds(block.block_id)
            assert all(isinstance(slot, tuple) for slot in slots), f"{block} is named, but holds {slots}"
            assert slots[-1][2] == self.digest_of_hash[block.block_hash], f"{block} holds another prefix: {slots}"

        if not self.were_names_taken:
            self._check_tails()

    def _check_tails(self) -> None:
        """1: whatever comes before a free named block is held, or stands behind it in the queue, or has no name."""
        names = {block.block_hash for block in self.pool.blocks}
        kept_longer = {block.block_hash for block in self.pool.blocks if block.ref_cnt}
        for block_id in reversed(self.pool.free_block_ids()):
            name = self.pool.blocks[block_id].block_hash
            if name is not None:
                parent = self.parent_of[name]
                assert parent in kept_longer or parent not in names, f"block {block_id} outlives what comes before it"
                kept_longer.add(name)

    def _learn_hashes(self, request: Request) -> None:
        num_full_blocks = len(request.block_hashes)
        if not num_full_blocks or request.block_hashes[-1] in self.digest_of_hash:
            return
        chain = hash_chain(request.all_token_ids, request.cache_salt, self.block_size)[:num_full_blocks]
        assert request.block_hashes == chain
        self.parent_of.update(zip(chain, [ROOT_HASH, *chain], strict=False))
        for index, block_hash in enumerate(chain):
            token_ids = request.all_token_ids[: (index + 1) * self.block_size]
            self.digest_of_hash[block_hash] = prefix_digest(request.cache_salt, token_ids)

    def _check_results(self) -> None:
        """10."""
        for request_id, request in self.added.items():
            output, reason = expected_output(request, self.config.max_model_len)
            assert self.got[request_id] == request.output_token_ids
            ended = self.ended.get(request_id)
            if ended in ("stop", "length"):
                assert (self.got[request_id], ended) == (output, str(reason))
                assert request.finish_reason == reason
                is_eos = not output or output[-1] in request.eos_token_ids
                assert request.stop_reason == (None if is_eos or ended == "length" else output[-1])
            else:
                assert self.got[request_id] == output[: len(self.got[request_id])]


@pytest.mark.parametrize("caching", [True, False], ids=["caching", "no-caching"])
@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "whole"])
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_ten_invariants_hold_whatever_happens(policy, chunked, caching):
    machine = type("Machine", (EngineMachine,), {"policy": policy, "chunked": chunked, "caching": caching})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=max(EXAMPLES // 8, 1),
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
            derandomize="STATE_MACHINE_EXAMPLES" not in os.environ,
            print_blob=True,
        ),
    )
