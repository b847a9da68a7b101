"""ModelRunner: one step on one device. SchedulerOutput in, ModelRunnerOutput out.

    1 update states       forget, learn and extend requests
      drafts              where a draft model guesses them
    2 InputBatch          flat tensors, brought to the device
    3 forward             hidden states of every scheduled token
    4 prompt logprobs     for those who asked
    5 grammar bitmask     asked for by a call, only now: nobody needs it before
    6 logits, sampler     only for requests whose last token was computed; behind a draft that was drawn, the next row
    7 pooling             for embedding requests

How a device prepares, computes and samples is the business of its path: cpu.py, gpu.py.

Knows no queue, no text and no client. Called by executor.py. Twin in vLLM: vllm/v1/worker/gpu_model_runner.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import torch

from minivllm.outputs import ModelRunnerOutput, SchedulerOutput, TokenLogprobs
from minivllm.sample.logprobs import prompt_logprobs
from minivllm.sample.metadata import SamplingMetadata
from minivllm.sample.sampler import SamplerOutput
from minivllm.worker import pooling
from minivllm.worker.cpu import CPUPath
from minivllm.worker.draft_model import DraftModel
from minivllm.worker.hooks import Hooks
from minivllm.worker.input_batch import InputBatch, RequestState
from minivllm.worker.kv_cache import KVCache, poison_blocks

# {request id: what it has drawn in this step} -> {request id: [ceil(vocab_size / 32)] int32} of the requests that have
# a grammar; called again behind every draft that was drawn. First called once the logits are on their
# way: a GPU computes them meanwhile. A CPU has computed them by then, and a thread that makes the rows earlier would
# only take a core from the forward; they cost a few microseconds each, about 50 where the forward emptied the caches.
GrammarBitmask = Callable[[Mapping[str, Sequence[int]]], Mapping[str, np.ndarray]]


class BatchWatcher(Protocol):
    """Looks on while a step is computed, and changes nothing (trace/recorder.py)."""

    def batch_built(self, batch: InputBatch) -> None:
        """Before the forward; tensors are in main memory."""

    def logits_ready(
        self,
        states: Sequence[RequestState],
        logits: torch.Tensor,  # [num_reqs, vocab_size] fp32, spent by the draw that comes next
        metadata: SamplingMetadata,
    ) -> None:
        """Before each draw; row i belongs to states[i]."""


PROMPT_LOGPROBS_ROWS = 64  # logits of this many prompt rows at a time: 64 x 152k vocabulary is 39 MB


class ModelRunner:
    """Args:
    path: how this device computes a step; None: as a CPU does.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        kv_caches: KVCache,
        block_size: int,
        max_model_len: int,
        *,
        pooling_type: str = "LAST",
        batch_invariant: bool = False,
        causal: bool = True,
        poison: bool = False,
        path: CPUPath | None = None,
        draft_model: DraftModel | None = None,
        hooks: Hooks | None = None,
    ):
        self.model: Any = model  # a class of models/registry.py
        self.hooks = Hooks(model) if hooks is None else hooks
        self.path = path or CPUPath(model, kv_caches)
        self.kv_caches = kv_caches
        self.block_size = block_size
        self.max_model_len = max_model_len
        self.pooling_type = pooling_type
        self.batch_invariant = batch_invariant
        self.causal = causal
        self.poison = poison
        self.draft_model = draft_model
        self.watcher: BatchWatcher | None = None
        self.states: dict[str, RequestState] = {}

    @torch.inference_mode()
    def execute_model(self, step: SchedulerOutput, grammar_bitmask: GrammarBitmask | None = None) -> ModelRunnerOutput:
        """Compute one step. Raises what the model raises; the states are then those of before the forward.

        grammar_bitmask: which tokens may be drawn, for the requests of this step that have a grammar.
        """
        self._update_states(step)
        result = ModelRunnerOutput({}, {}, {}, {})
        if not step.num_scheduled_tokens:
            return result
        states = [self.states[request_id] for request_id in step.num_scheduled_tokens]
        num_scheduled_tokens = list(step.num_scheduled_tokens.values())
        if self.draft_model is not None:
            self.draft_model.propose(states, num_scheduled_tokens)
        batch = InputBatch.build(
            states,
            num_scheduled_tokens,
            self.block_size,
            causal=self.causal,
            batch_invariant=self.batch_invariant,
        )
        if self.watcher is not None:
            self.watcher.batch_built(batch)
        batch = self.path.prepare(batch)
        if self.hooks:
            hidden_states = self.hooks.forward(self.path, batch, step.step, result.errors)
        else:
            hidden_states = self.path.forward(batch)
        for state, rows in self._rows_of(batch, hidden_states):
            if state.num_prompt_logprobs is not None:
                self._prompt_logprobs(state, rows, result)
            if state.row is None:
                self._pool(state, rows, result)
        if batch.sampling_states:
            self._sample(batch, hidden_states, result, grammar_bitmask)
        return result

    def _update_states(self, step: SchedulerOutput) -> None:
        for request_id in (*step.finished_req_ids, *step.preempted_req_ids):
            self.states.pop(request_id, None)
        for new in step.scheduled_new_reqs:
            self.states[new.request_id] = RequestState(new, self.max_model_len, self.block_size, self.model.vocab_size)
            self._poison(new.block_ids[new.num_computed_tokens // self.block_size :])
        for cached in step.scheduled_cached_reqs:
            self.states[cached.request_id].update(cached, step.draft_token_ids.get(cached.request_id, ()))
            self._poison(cached.new_block_ids)

    def _poison(self, block_ids: list[int]) -> None:
        """Fill blocks that nothing was written to, under test."""
        if self.poison and self.kv_caches and block_ids:
            poison_blocks(self.kv_caches, block_ids)
            if self.draft_model is not None:
                poison_blocks(self.draft_model.path.kv_caches, block_ids)

    def _rows_of(
        self,
        batch: InputBatch,
        hidden_states: torch.Tensor,  # [num_tokens, hidden_size]
    ) -> Iterator[tuple[RequestState, torch.Tensor]]:
        """The hidden states of each request that wants more than its next token. # [its tokens, hidden_size]"""
        starts = batch.attention.query_start_loc
        for index, state in enumerate(batch.states):
            if state.row is None or state.num_prompt_logprobs is not None:
                yield state, hidden_states[starts[index] : starts[index + 1]]

    def _sample(
        self,
        batch: InputBatch,
        hidden_states: torch.Tensor,  # [num_tokens, hidden_size]
        result: ModelRunnerOutput,
        grammar_bitmask: GrammarBitmask | None,
    ) -> None:
        """Draw a token for each request whose tokens are now all computed, and go on where it is the request's draft.

        Each row is drawn from just as it would be in a step of its own: after the same tokens, with the same masks and
        penalties, and with the number that the request's seed has for that position. A draft is never part of the draw:
        while the drawn token happens to equal it, the next row has the right past and is drawn from as well; the first
        other token is itself right and ends the round. So drafts change when a token comes, never which one, greedy or
        sampled. (A coupling of draft and target in the words of rejection sampling: a draft d is accepted with
        probability p(d), and what replaces it follows p without d, as it must where the draft is a point mass.)
        """
        logits = self.model.compute_logits(hidden_states[batch.logits_indices])  # [num_logits, vocab_size] fp32
        first_rows = [0, *accumulate(1 + len(state.draft_token_ids) for state in batch.sampling_states)]
        drawing = list(range(len(batch.sampling_states)))  # who draws in this round
        num_drawn = 0
        while drawing:
            states = [batch.sampling_states[index] for index in drawing]
            rows = [first_rows[index] + num_drawn for index in drawing]
            bitmask = None
            if grammar_bitmask is not None:
                drawn_so_far = {s.request_id: result.sampled_token_ids.get(s.request_id, []) for s in states}
                bitmask = self._bitmask_rows(states, grammar_bitmask(drawn_so_far))
            metadata = SamplingMetadata.from_requests([s.row for s in states if s.row is not None], bitmask)
            row_logits = logits if len(rows) == len(logits) else logits[rows]
            if self.watcher is not None:
                self.watcher.logits_ready(states, row_logits, metadata)
            drawn = self.path.sample(row_logits, metadata)
            drawing = [i for position, i in enumerate(drawing) if self._take(states[position], drawn, position, result)]
            num_drawn += 1

    def _take(self, state: RequestState, drawn: SamplerOutput, row: int, result: ModelRunnerOutput) -> bool:
        """Keep what was drawn for a request. True: it is the draft, and the row behind it can be drawn from."""
        if row in drawn.errors:
            if state.request_id not in result.sampled_token_ids:  # else what came before stands: the next step tells
                result.errors[state.request_id] = drawn.errors[row]
            return False
        token_id = drawn.sampled_token_ids[row]
        state.append_token(token_id)
        sampled = result.sampled_token_ids.setdefault(state.request_id, [])
        sampled.append(token_id)
        logprobs = drawn.logprobs[row]
        if logprobs is not None:
            result.logprobs.setdefault(state.request_id, []).append(logprobs)
        return state.draft_token_ids[len(sampled) - 1 : len(sampled)] == [token_id]

    def _bitmask_rows(
        self, states: Sequence[RequestState], rows: Mapping[str, np.ndarray]
    ) -> torch.Tensor:  # [num_reqs, ceil(vocab_size / 32)] int32
        """The rows in the order of the requests; all ones for a request without a grammar."""
        bitmask = np.full((len(states), -(-self.model.vocab_size // 32)), -1, dtype=np.int32)
        for index, state in enumerate(states):
            if state.request_id in rows:
                bitmask[index] = rows[state.request_id]
        return torch.from_numpy(bitmask)

    def _prompt_logprobs(
        self,
        state: RequestState,
        rows: torch.Tensor,  # [its tokens, hidden_size]
        result: ModelRunnerOutput,
    ) -> None:
        """Row p predicts prompt token p + 1. A few rows at a time, or the logits of a long prompt fill the memory."""
        first = state.num_computed_tokens
        num_rows = min(rows.shape[0], state.num_prompt_tokens - 1 - first)
        entries: list[TokenLogprobs] = []
        for start in range(0, num_rows, PROMPT_LOGPROBS_ROWS):
            stop = min(start + PROMPT_LOGPROBS_ROWS, num_rows)
            logits = self.model.compute_logits(rows[start:stop])
            next_token_ids = state.token_ids[first + start + 1 : first + stop + 1].tolist()
            entries += prompt_logprobs(logits, next_token_ids, state.num_prompt_logprobs or 0)
        if entries:
            result.prompt_logprobs[state.request_id] = entries

    def _pool(
        self,
        state: RequestState,
        rows: torch.Tensor,  # [its tokens, hidden_size]
        result: ModelRunnerOutput,
    ) -> None:
        state.pooled = pooling.accumulate(self.pooling_type, state.pooled, rows)
        if state.num_computed_tokens + rows.shape[0] == state.num_tokens:
            embedding = pooling.finish(self.pooling_type, state.pooled, state.num_tokens)
            if math.isfinite(sum(embedding)):
                result.pooler_output[state.request_id] = embedding
            else:
                result.errors[state.request_id] = "The model produced an embedding that is not made of numbers (NaN)."
