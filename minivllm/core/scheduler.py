"""Scheduler: who computes how many tokens in the next step.

There is no prefill phase and no decode phase. A request is behind by num_tokens - num_computed_tokens; a step
hands out max_num_batched_tokens and lets requests catch up: the running ones first, in order, then waiting ones.

Drafts (Request.draft_token_ids) are computed behind the newest token where room is left over; update_from_output is
told which of them were drawn, and the others were never there: num_computed_tokens counts none of them.

    schedule()            decides, takes blocks           -> SchedulerOutput
    update_from_output()  appends what was drawn, ends    -> list[EngineCoreOutput]
    append_tokens()       adds what need not be drawn
    fail_step()           ends the requests of a step that raised

Knows no tensor, no text, no clock. Owned by engine/llm_engine.py.
Twin in vLLM: vllm/v1/core/sched/scheduler.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from minivllm.config import CacheConfig, SchedulerConfig
from minivllm.core.block_pool import KVCacheBlock
from minivllm.core.kv_cache_manager import KVCacheManager
from minivllm.core.request import FinishReason, Request, RequestStatus
from minivllm.core.request_queue import make_request_queue
from minivllm.outputs import (
    CachedRequestData,
    Decision,
    EngineCoreOutput,
    ModelRunnerOutput,
    NewRequestData,
    SchedulerOutput,
    TokenLogprobs,
)


class Scheduler:
    def __init__(self, config: SchedulerConfig, cache_config: CacheConfig, num_blocks: int):
        self.config = config
        self.kv_cache = KVCacheManager(num_blocks, cache_config.block_size, cache_config.enable_prefix_caching)
        self.requests: dict[str, Request] = {}
        self.waiting = make_request_queue(config.policy)
        self.running: list[Request] = []
        self.num_preemptions = 0
        self.num_prefix_cache_queries = 0  # tokens looked for at first admissions
        self.num_prefix_cache_hits = 0  # and found
        self._step = 0
        self._known_to_worker: set[str] = set()
        self._finished_req_ids: list[str] = []

    # ------------------------------------------------------------------ requests in and out
    def add_request(self, request: Request) -> None:
        """Put a request in line. Its id must not be in use: the older one would vanish."""
        if request.request_id in self.requests:
            raise ValueError(f"request id {request.request_id!r} is in use")
        self.requests[request.request_id] = request
        self.waiting.add(request)

    def finish_request(
        self, request_id: str, reason: FinishReason = FinishReason.ABORT, stop_reason: int | None = None
    ) -> bool:
        """End a request from outside (abort, stop string). False when it is not there any more."""
        request = self.requests.get(request_id)
        if request is None:
            return False
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        request.finish(reason, stop_reason)
        self._release(request)
        return True

    @property
    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    @property
    def has_work(self) -> bool:
        """Also true when only the worker has yet to hear of finished requests."""
        return bool(self.requests or self._finished_req_ids)

    def _release(self, request: Request) -> None:
        """The one way out, however a request ended."""
        self.kv_cache.free(request)
        del self.requests[request.request_id]
        if request.request_id in self._known_to_worker:
            self._known_to_worker.remove(request.request_id)
            self._finished_req_ids.append(request.request_id)

    # ------------------------------------------------------------------ one step
    def schedule(self) -> SchedulerOutput:
        """Spend the token budget: running requests first, then waiting ones if nobody had to be preempted."""
        self._step += 1
        step = SchedulerOutput(
            step=self._step,
            scheduled_new_reqs=[],
            scheduled_cached_reqs=[],
            num_scheduled_tokens={},
            total_num_scheduled_tokens=0,
            preempted_req_ids=[],
            finished_req_ids=self._finished_req_ids,
            decisions=[],
        )
        self._finished_req_ids = []
        self._schedule_running(step)
        self._schedule_waiting(step)
        return step

    def _schedule_running(self, step: SchedulerOutput) -> None:
        spare = self._budget_for_drafts()
        for request in list(self.running):
            if request.status is RequestStatus.PREEMPTED:  # a victim of this step
                continue
            num_missing = len(request.all_token_ids) - request.num_computed_tokens
            if step.total_num_scheduled_tokens >= self.config.max_num_batched_tokens:
                facts = (0, num_missing, self._chunking)
                step.decisions.append(Decision(request.request_id, "wait_budget", 0, facts))
                continue
            num_tokens = self._clip(num_missing, step)
            drafts, new_blocks = self._place_drafts(request, num_tokens, spare)
            if drafts:
                step.draft_token_ids[request.request_id] = drafts
                spare -= len(drafts)
            else:
                new_blocks = self._grow(request, num_tokens, step)
            if new_blocks is None:  # it mattered least and gave way itself; its blocks may help the next ones
                continue
            cached = CachedRequestData(
                request.request_id,
                [block.block_id for block in new_blocks],
                request.num_computed_tokens,
                request.untold_token_ids,
            )
            step.scheduled_cached_reqs.append(cached)
            self._record(step, request, num_tokens, num_missing, len(drafts))
            request.untold_token_ids = []

    def _budget_for_drafts(self) -> int:
        """What is left of the budget when every running request has all that it misses: no token waits for a draft."""
        if not any(request.draft_token_ids for request in self.running):
            return 0
        num_missing = sum(request.num_tokens - request.num_computed_tokens for request in self.running)
        return self.config.max_num_batched_tokens - num_missing

    def _place_drafts(
        self, request: Request, num_tokens: int, spare: int
    ) -> tuple[list[int], list[KVCacheBlock] | None]:
        """The drafts that this step verifies and the blocks that were added; ([], None), and no block, where none fits.

        They are for this step or never. One more token is drawn behind the last of them, so they end before the
        request must. Nobody is preempted for a guess.
        """
        if not request.draft_token_ids:
            return [], None
        num_room = min(request.max_tokens - request.num_output_tokens, self.config.max_model_len - request.num_tokens)
        drafts = request.draft_token_ids[: max(0, min(spare, num_room - 1))]
        request.draft_token_ids = []
        if not drafts or request.num_computed_tokens + num_tokens < request.num_tokens:
            return [], None
        new_blocks = self.kv_cache.allocate_slots(request, num_tokens, num_draft_tokens=len(drafts))
        return (drafts, new_blocks) if new_blocks is not None else ([], None)

    def _schedule_waiting(self, step: SchedulerOutput) -> None:
        """Admit from the head of the line. The first that cannot come in stops the line: nobody overtakes."""
        while self.waiting:
            request = self.waiting.peek()
            refusal = self._try_admit(request, step)
            if refusal is not None:
                if request.request_id not in step.preempted_req_ids:  # its "preempt" of this step has said it
                    step.decisions.append(refusal)
                return

    def _try_admit(self, request: Request, step: SchedulerOutput) -> Decision | None:
        """Move one waiting request to running, or say why not."""
        if step.preempted_req_ids:
            return Decision(request.request_id, "wait_preemption", 0, (step.preempted_req_ids[0],))
        if len(self.running) >= self.config.max_num_seqs:
            return Decision(request.request_id, "wait_seqs", 0, (self.config.max_num_seqs,))
        budget = self.config.max_num_batched_tokens - step.total_num_scheduled_tokens
        if budget <= 0:
            return Decision(request.request_id, "wait_budget", 0, (0, request.num_tokens, self._chunking))
        computed_blocks = self.kv_cache.get_computed_blocks(request)
        num_cached_tokens = len(computed_blocks) * self.kv_cache.block_size
        num_missing = request.num_tokens - num_cached_tokens
        if num_missing > budget and not self.config.enable_chunked_prefill:
            return Decision(request.request_id, "wait_budget", 0, (budget, num_missing, self._chunking))
        num_needed = self.kv_cache.num_blocks_for_whole(request, computed_blocks)
        num_free = self.kv_cache.pool.num_free_blocks
        if num_needed > num_free:
            return Decision(request.request_id, "wait_blocks", 0, (num_needed, num_free))
        num_tokens = self._clip(num_missing, step)
        self.kv_cache.allocate_slots(request, num_tokens, computed_blocks)
        self._admit(request, num_cached_tokens, step)
        self._record(step, request, num_tokens, num_missing)
        return None

    def _admit(self, request: Request, num_cached_tokens: int, step: SchedulerOutput) -> None:
        self.waiting.pop()
        self.running.append(request)
        if request.status is RequestStatus.WAITING:
            request.num_cached_tokens = num_cached_tokens  # what usage reports: the first admission's hit
            if self.kv_cache.enable_prefix_caching and not request.skip_prefix_cache:
                self.num_prefix_cache_queries += request.num_tokens
                self.num_prefix_cache_hits += num_cached_tokens
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = num_cached_tokens
        request.untold_token_ids = []  # it is told everything
        self._known_to_worker.add(request.request_id)
        step.scheduled_new_reqs.append(
            NewRequestData(
                request_id=request.request_id,
                token_ids=list(request.all_token_ids),
                num_prompt_tokens=request.num_prompt_tokens,
                block_ids=self.kv_cache.tables[request.request_id].block_ids,
                num_computed_tokens=num_cached_tokens,
                sampling_params=request.sampling_params,
                seed=request.seed,
                stop_token_ids=request.eos_token_ids | request.stop_token_ids,
                bad_words_token_ids=request.bad_words_token_ids,
            )
        )

    def _clip(self, num_missing: int, step: SchedulerOutput) -> int:
        """How many of the missing tokens this step computes. Without chunked prefill a prompt is never cut."""
        num_tokens = min(num_missing, self.config.max_num_batched_tokens - step.total_num_scheduled_tokens)
        threshold = self.config.long_prefill_token_threshold
        if 0 < threshold < num_tokens and self.config.enable_chunked_prefill and len(self.requests) > 1:
            return threshold
        return num_tokens

    def _record(
        self, step: SchedulerOutput, request: Request, num_tokens: int, num_missing: int, num_drafts: int = 0
    ) -> None:
        step.num_scheduled_tokens[request.request_id] = num_tokens + num_drafts
        step.total_num_scheduled_tokens += num_tokens + num_drafts
        if num_tokens < num_missing:
            cause = "the step's budget is spent"
            if num_tokens == self.config.long_prefill_token_threshold and len(self.requests) > 1:
                cause = "long_prefill_token_threshold leaves room for shorter prompts"
            decision = Decision(request.request_id, "chunk", num_tokens, (num_tokens, num_missing, cause))
        elif num_drafts:
            decision = Decision(request.request_id, "verify", num_tokens + num_drafts, (num_tokens, num_drafts))
        elif num_tokens == 1 and request.num_computed_tokens >= request.num_prompt_tokens:
            decision = Decision(request.request_id, "decode", 1)
        elif request.untold_token_ids:
            decision = Decision(request.request_id, "forced", num_tokens, (len(request.untold_token_ids),))
        else:
            decision = Decision(request.request_id, "prefill", num_tokens, (num_tokens, request.num_computed_tokens))
        step.decisions.append(decision)

    @property
    def _chunking(self) -> str:
        return "on" if self.config.enable_chunked_prefill else "off"

    # ------------------------------------------------------------------ preemption
    def _grow(self, request: Request, num_tokens: int, step: SchedulerOutput) -> list[KVCacheBlock] | None:
        """Blocks for a running request, preempting others for them if need be.

        None when the request itself was the one to give way. The victim is the one that matters least: the last
        that was admitted (fcfs), or the largest (priority, arrival). So the oldest always advances, and every
        admitted request ends.
        """
        while True:
            new_blocks = self.kv_cache.allocate_slots(request, num_tokens)
            if new_blocks is not None:
                return new_blocks
            victim = self.running[-1]
            if self.config.policy == "priority":
                victim = max(self.running, key=lambda other: (other.priority, other.arrival))
            num_needed = self.kv_cache.num_blocks_for(request.num_computed_tokens + num_tokens)
            num_needed -= len(self.kv_cache.tables[request.request_id])
            self._preempt(victim, request, num_needed, step)
            if victim is request:
                return None

    def _preempt(self, victim: Request, cause: Request, num_needed: int, step: SchedulerOutput) -> None:
        facts = (cause.request_id, self.kv_cache.pool.num_free_blocks, num_needed)
        self.running.remove(victim)
        self.kv_cache.free(victim)
        victim.status = RequestStatus.PREEMPTED
        victim.num_computed_tokens = 0
        victim.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.put_back(victim)
        self._known_to_worker.discard(victim.request_id)
        step.preempted_req_ids.append(victim.request_id)
        num_tokens = step.num_scheduled_tokens.pop(victim.request_id, 0)
        if num_tokens:  # it was scheduled earlier in this step (priority policy): take its share back
            step.total_num_scheduled_tokens -= num_tokens
            step.scheduled_cached_reqs = [r for r in step.scheduled_cached_reqs if r.request_id != victim.request_id]
            step.decisions = [d for d in step.decisions if d.request_id != victim.request_id]
            step.draft_token_ids.pop(victim.request_id, None)
        step.decisions.append(Decision(victim.request_id, "preempt", 0, facts))

    # ------------------------------------------------------------------ after the step
    def update_from_output(self, step: SchedulerOutput, result: ModelRunnerOutput) -> list[EngineCoreOutput]:
        """Advance the counters, append what was drawn, end what is complete."""
        outputs: list[EngineCoreOutput] = []
        output: EngineCoreOutput | None
        any_finished = False
        for request_id, num_tokens in step.num_scheduled_tokens.items():
            request = self.requests.get(request_id)
            if request is None:  # aborted while the step ran
                continue
            error = result.errors.get(request_id) if result.errors else None
            if error is not None:
                # NaN shows when a token is drawn; an earlier chunk may have written it. Nothing that the request
                # holds may be found in the prefix cache again, or everybody with this prefix fails as well.
                request.num_computed_tokens = 0
                request.finish(FinishReason.ERROR)
                output = EngineCoreOutput(request_id, [], finish_reason="error", error=error)
            else:
                prompt_logprobs = self._new_prompt_logprobs(request, result)
                request.num_computed_tokens += num_tokens - len(step.draft_token_ids.get(request_id, ()))
                output = self._apply_result(request, result, prompt_logprobs)
            if output is not None:
                outputs.append(output)
            if request.is_finished:
                any_finished = True
                self._release(request)
        if any_finished:
            self.running = [request for request in self.running if not request.is_finished]
        return outputs

    def _new_prompt_logprobs(self, request: Request, result: ModelRunnerOutput) -> list[TokenLogprobs] | None:
        """This step's prompt logprobs without those that were reported before a preemption."""
        entries = result.prompt_logprobs.get(request.request_id)
        if entries is None:
            return None
        end = request.num_computed_tokens + len(entries)
        entries = entries[max(0, request.num_prompt_logprobs_done - request.num_computed_tokens) :]
        request.num_prompt_logprobs_done = max(request.num_prompt_logprobs_done, end)
        return entries or None

    def _apply_result(
        self, request: Request, result: ModelRunnerOutput, prompt_logprobs: list[TokenLogprobs] | None
    ) -> EngineCoreOutput | None:
        """What one request got from the step; None when it was a chunk with nothing to report."""
        request_id = request.request_id
        if request.is_pooling:
            if request.num_computed_tokens < request.num_tokens:
                return None
            request.finish(FinishReason.STOP)
            pooled = result.pooler_output[request_id]
            return EngineCoreOutput(
                request_id,
                [],
                finish_reason="stop",
                num_cached_tokens=request.num_cached_tokens,
                pooler_output=pooled,
            )
        sampled_token_ids = result.sampled_token_ids.get(request_id, ())
        if not sampled_token_ids and prompt_logprobs is None:
            return None
        new_token_ids = []
        for token_id in sampled_token_ids:
            new_token_ids.append(token_id)
            if request.append_output_token(token_id, self.config.max_model_len):
                break
        if len(new_token_ids) > 1:  # all but the newest were accepted drafts
            request.num_computed_tokens += len(new_token_ids) - 1
            self.kv_cache.cache_blocks(request)
        logprobs = result.logprobs.get(request_id)
        return EngineCoreOutput(
            request_id,
            new_token_ids,
            logprobs[: len(new_token_ids)] if logprobs else None,
            prompt_logprobs,
            str(request.finish_reason) if request.finish_reason else None,
            request.stop_reason,
            request.num_cached_tokens,
        )

    def append_tokens(self, request_id: str, token_ids: Sequence[int]) -> list[int]:
        """Add tokens that nobody has to draw to a running request; its next step computes all of them at once.

        Returns those that were added: one of them may end the request.
        """
        request = self.requests[request_id]
        added: list[int] = []
        for token_id in token_ids:
            added.append(token_id)
            if request.append_output_token(token_id, self.config.max_model_len):
                self.running.remove(request)
                self._release(request)
                break
        request.untold_token_ids = [*request.untold_token_ids, *added]
        return added

    def fail_step(self, step: SchedulerOutput, error: str) -> list[EngineCoreOutput]:
        """The step raised: its requests end in error, everybody else goes on."""
        outputs = []
        for request_id in step.num_scheduled_tokens:
            if self.finish_request(request_id, FinishReason.ERROR):
                outputs.append(EngineCoreOutput(request_id, [], finish_reason="error", error=error))
        return outputs

    # ------------------------------------------------------------------ looking in
    def waiting_reasons(self, step: SchedulerOutput) -> Iterable[Decision]:
        """One decision per waiting request: the head's own, and for the others whom they wait behind."""
        head: str | None = None
        for request in self.waiting:
            if head is None:
                head = request.request_id
                yield from (d for d in step.decisions if d.request_id == head)
            else:
                yield Decision(request.request_id, "wait_line", 0, (head,))

    def check_integrity(self) -> None:
        """Raises RuntimeError naming the first broken invariant; for tests and idle moments."""
        self.kv_cache.check_integrity()
        waiting = {request.request_id for request in self.waiting}
        running = {request.request_id for request in self.running}
        if waiting & running or waiting | running != set(self.requests):
            raise RuntimeError(f"every request is in one queue: waiting {waiting}, running {running}")
        if set(self.kv_cache.tables) != running:
            raise RuntimeError(f"blocks are held by {set(self.kv_cache.tables)}, running are {running}")
        for request in self.running:
            table = self.kv_cache.tables[request.request_id]
            if table.num_slots < request.num_computed_tokens:
                raise RuntimeError(f"{request} has only {table.num_slots} slots")
