"""DraftModel: a second, smaller network that writes the drafts of a step, greedily, just before they are verified.

    known tokens of the step ──forward──▶ draft 1 ──forward──▶ draft 2 ... draft k ──forward──▶ (keys and values only)

Its keys and values lie in a cache of its own under the target's block ids and slots. It computes every token that the
target computes, in the same step, drafts included: so whatever the target's cache holds this one holds too, and prefix
cache hits, chunks, preemptions and rejected drafts need no word here. That is one small forward for each step, also
while no drafts are asked for.

A wrong draft costs time and never an output, so there is no sampling here, no mask and no penalty.

Knows no queue and no sampler. Called by model_runner.py; it stands beside it and not in speculative/ because it builds
batches. Twin in vLLM: vllm/v1/spec_decode/draft_model.py.
"""

from __future__ import annotations

import torch

from minivllm.worker.cpu import CPUPath
from minivllm.worker.input_batch import InputBatch, RequestState


class DraftModel:
    """Args:
    path: a model of the target's vocabulary with a cache of the target's number of blocks, on the target's device.
    """

    def __init__(self, path: CPUPath, block_size: int, *, batch_invariant: bool = False):
        self.path = path
        self.block_size = block_size
        self.batch_invariant = batch_invariant

    def propose(self, states: list[RequestState], num_scheduled_tokens: list[int]) -> None:
        """Compute this step's tokens, and write the drafts for which the scheduler has made room.

        num_scheduled_tokens: of each request, drafts included.
        """
        counts = [n - len(state.draft_token_ids) for n, state in zip(num_scheduled_tokens, states, strict=True)]
        starts = [state.num_computed_tokens for state in states]
        for position in range(1 + max(len(state.draft_token_ids) for state in states)):
            hidden_states = self._forward(states, counts, starts)  # [num_tokens, hidden_size]
            last_rows = torch.tensor(counts).cumsum(0) - 1  # [num_reqs]
            guessing = [index for index, state in enumerate(states) if position < len(state.draft_token_ids)]
            states = [states[index] for index in guessing]
            if states:
                logits = self.path.model.compute_logits(hidden_states[last_rows[guessing]])  # [num_reqs, vocab_size]
                self._write(states, position, logits.argmax(dim=1).tolist())
            starts = [state.num_tokens + position for state in states]
            counts = [1] * len(states)

    def _forward(self, states: list[RequestState], counts: list[int], starts: list[int]) -> torch.Tensor:
        batch = InputBatch.build(
            states, counts, self.block_size, num_computed_tokens=starts, batch_invariant=self.batch_invariant
        )
        return self.path.forward(self.path.prepare(batch))  # [num_tokens, hidden_size]

    def _write(self, states: list[RequestState], position: int, token_ids: list[int]) -> None:
        """Put one draft of each request where its batch will look for it and where it will be verified."""
        for state, token_id in zip(states, token_ids, strict=True):
            state.draft_token_ids[position] = token_id
            state.token_ids[state.num_tokens + position] = token_id
