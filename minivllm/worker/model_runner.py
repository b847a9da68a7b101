"""ModelRunner: one step on one device. SchedulerOutput in, ModelRunnerOutput out.

    1 update states       forget, learn and extend requests
    2 InputBatch          flat tensors, brought to the device
    3 forward             hidden states of every scheduled token
    4 prompt logprobs     for those who asked
    5 grammar bitmask     asked for by a call, only now: nobody needs it before
    6 logits, sampler     only for requests whose last token was computed
    7 pooling             for embedding requests

How a device prepares, computes and samples is the business of its path: cpu.py, gpu.py.

Knows no queue, no text and no client. Called by executor.py. Twin in vLLM: vllm/v1/worker/gpu_model_runner.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from minivllm.outputs import ModelRunnerOutput, SchedulerOutput, TokenLogprobs
from minivllm.sample.logprobs import prompt_logprobs
from minivllm.sample.metadata import SamplingMetadata
from minivllm.worker import pooling
from minivllm.worker.cpu import CPUPath
from minivllm.worker.input_batch import InputBatch, RequestState
from minivllm.worker.kv_cache import KVCache, poison_blocks

# {request id: [ceil(vocab_size / 32)] int32} of the requests that have a grammar. Called once the logits are on their
# way: a GPU computes them meanwhile. A CPU has computed them by then, and a thread that makes the rows earlier would
# only take a core from the forward; they cost a few microseconds each, about 50 where the forward emptied the caches.
GrammarBitmask = Callable[[], Mapping[str, np.ndarray]]

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
    ):
        self.model: Any = model  # a class of models/registry.py
        self.path = path or CPUPath(model, kv_caches)
        self.kv_caches = kv_caches
        self.block_size = block_size
        self.max_model_len = max_model_len
        self.pooling_type = pooling_type
        self.batch_invariant = batch_invariant
        self.causal = causal
        self.poison = poison
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
        batch = InputBatch.build(
            [self.states[request_id] for request_id in step.num_scheduled_tokens],
            list(step.num_scheduled_tokens.values()),
            self.block_size,
            causal=self.causal,
            batch_invariant=self.batch_invariant,
        )
        batch = self.path.prepare(batch)
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
            if self.poison and self.kv_caches:
                poison_blocks(self.kv_caches, new.block_ids[new.num_computed_tokens // self.block_size :])
        for cached in step.scheduled_cached_reqs:
            self.states[cached.request_id].update(cached)
            if self.poison and self.kv_caches and cached.new_block_ids:
                poison_blocks(self.kv_caches, cached.new_block_ids)

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
        """Draw one token for each request whose tokens are now all computed."""
        logits = self.model.compute_logits(hidden_states[batch.logits_indices])  # [num_logits, vocab_size] fp32
        metadata = SamplingMetadata.from_requests(
            [state.row for state in batch.sampling_states if state.row is not None],
            None if grammar_bitmask is None else self._bitmask_rows(batch, grammar_bitmask()),
        )
        drawn = self.path.sample(logits, metadata)
        for index, state in enumerate(batch.sampling_states):
            if index in drawn.errors:
                result.errors[state.request_id] = drawn.errors[index]
                continue
            token_id = drawn.sampled_token_ids[index]
            state.append_token(token_id)
            result.sampled_token_ids[state.request_id] = [token_id]
            logprobs = drawn.logprobs[index]
            if logprobs is not None:
                result.logprobs[state.request_id] = [logprobs]

    def _bitmask_rows(
        self, batch: InputBatch, rows: Mapping[str, np.ndarray]
    ) -> torch.Tensor:  # [num_logits, ceil(vocab_size / 32)] int32
        """The rows in the order of the logits; all ones for a request without a grammar."""
        bitmask = np.full((len(batch.sampling_states), -(-self.model.vocab_size // 32)), -1, dtype=np.int32)
        for index, state in enumerate(batch.sampling_states):
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
