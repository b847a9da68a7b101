"""InputBatch: one step's requests as flat tensors. THE shape dictionary.

| field             | shape                           | dtype | meaning                                            |
|-------------------|---------------------------------|-------|----------------------------------------------------|
| input_ids         | [num_tokens]                    | int64 | tokens computed this step, requests concatenated   |
| positions         | [num_tokens]                    | int64 | position in the request, 0-based                   |
| query_start_loc   | [num_reqs + 1]                  | int   | request r owns rows [q[r], q[r+1]) (host)          |
| seq_lens          | [num_reqs]                      | int   | context length after this step (host)              |
| slot_mapping      | [num_tokens]                    | int64 | block_id * block_size + offset; -1 = do not write  |
| block_table       | [num_reqs, max_blocks_per_req]  | int32 | block ids, padded with the null block 0            |
| logits_indices    | [num_logits]                    | int64 | rows whose logits are drawn from                   |

A request that draws owns 1 + its drafts rows of the logits: those of its newest token and of each draft behind it.

There is no padding between requests and no prefill or decode part: a request with 40 tokens and one with a single
token are neighbours. query_start_loc and seq_lens stay on the host, because the loops that use them run there; gpu.py
copies all of it into buffers of its own, query_start_loc and seq_lens as int32 (StepTensors).

Knows no model and no sampler. Built by model_runner.py. Twin in vLLM: vllm/v1/worker/gpu_input_batch.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from minivllm.kernels.paged_attention import AttentionMetadata
from minivllm.outputs import CachedRequestData, NewRequestData
from minivllm.sample.metadata import SamplingRow


class RequestState:
    """What the worker remembers of a request between steps. Dropped when it finishes or is preempted."""

    __slots__ = (
        "block_ids",
        "draft_token_ids",
        "num_blocks",
        "num_computed_tokens",
        "num_prompt_logprobs",
        "num_prompt_tokens",
        "num_tokens",
        "pooled",
        "request_id",
        "row",
        "token_ids",
    )

    def __init__(self, data: NewRequestData, max_model_len: int, block_size: int, vocab_size: int):
        self.request_id = data.request_id
        self.num_prompt_tokens = data.num_prompt_tokens
        self.num_tokens = len(data.token_ids)
        self.num_computed_tokens = data.num_computed_tokens
        self.num_blocks = 0
        capacity = max_model_len if data.sampling_params else self.num_tokens
        self.token_ids = np.empty(capacity, dtype=np.int64)  # [max_model_len], the first num_tokens are set
        self.token_ids[: self.num_tokens] = data.token_ids
        self.block_ids = np.zeros(-(-capacity // block_size), dtype=np.int32)  # [max_blocks], num_blocks are set
        self.add_blocks(data.block_ids)
        self.draft_token_ids: list[int] = []  # of this step, behind the first num_tokens; none of them is a token yet
        self.pooled: torch.Tensor | None = None  # [hidden_size], running sum of mean pooling
        self.num_prompt_logprobs = data.sampling_params.prompt_logprobs if data.sampling_params else None
        self.row: SamplingRow | None = None
        if data.sampling_params is not None:
            self.row = SamplingRow(
                data.sampling_params,
                seed=data.seed,
                vocab_size=vocab_size,
                prompt_token_ids=data.token_ids[: data.num_prompt_tokens],
                output_token_ids=data.token_ids[data.num_prompt_tokens :],
                stop_token_ids=data.stop_token_ids,
                bad_words_token_ids=data.bad_words_token_ids,
            )

    def add_blocks(self, block_ids: list[int]) -> None:
        end = self.num_blocks + len(block_ids)
        self.block_ids[self.num_blocks : end] = block_ids
        self.num_blocks = end

    def update(self, data: CachedRequestData, draft_token_ids: Iterable[int] = ()) -> None:
        self.num_computed_tokens = data.num_computed_tokens
        for token_id in data.new_token_ids:
            self.append_token(token_id)
        if data.new_block_ids:
            self.add_blocks(data.new_block_ids)
        self.draft_token_ids = list(draft_token_ids)
        self.token_ids[self.num_tokens : self.num_tokens + len(self.draft_token_ids)] = self.draft_token_ids

    def append_token(self, token_id: int) -> None:
        """Remember a drawn (or forced) token: it is the next step's input. It takes the place of a draft."""
        self.token_ids[self.num_tokens] = token_id
        self.num_tokens += 1
        if self.row is not None:
            self.row.append(token_id)


@dataclass(slots=True)
class InputBatch:
    states: list[RequestState]  # in the order of the rows
    input_ids: torch.Tensor  # [num_tokens]
    positions: torch.Tensor  # [num_tokens]
    logits_indices: torch.Tensor  # [num_logits]
    sampling_states: list[RequestState]  # whose logits they are, 1 + len(draft_token_ids) rows each
    attention: AttentionMetadata  # query_start_loc, seq_lens, slot_mapping, block_table

    @classmethod
    def build(
        cls,
        states: list[RequestState],
        num_scheduled_tokens: list[int],  # of each request, at least 1; drafts included
        block_size: int,
        *,
        num_computed_tokens: list[int] | None = None,  # where each begins; None: where its state says
        causal: bool = True,
        batch_invariant: bool = False,
    ) -> InputBatch:
        """Lay the requests' next tokens side by side."""
        counts = np.asarray(num_scheduled_tokens, dtype=np.int64)  # [num_reqs]
        if num_computed_tokens is None:
            num_computed_tokens = [state.num_computed_tokens for state in states]
        starts = np.asarray(num_computed_tokens, dtype=np.int64)  # [num_reqs]
        query_start_loc = np.zeros(len(states) + 1, dtype=np.int64)
        np.cumsum(counts, out=query_start_loc[1:])
        num_tokens = int(query_start_loc[-1])
        request_of_row = np.repeat(np.arange(len(states)), counts)  # [num_tokens]
        positions = np.arange(num_tokens) - np.repeat(query_start_loc[:-1] - starts, counts)

        input_ids = np.empty(num_tokens, dtype=np.int64)
        block_table = np.zeros((len(states), max(state.num_blocks for state in states)), dtype=np.int32)
        for index, state in enumerate(states):
            begin = num_computed_tokens[index]
            end = begin + num_scheduled_tokens[index]
            input_ids[query_start_loc[index] : query_start_loc[index + 1]] = state.token_ids[begin:end]
            block_table[index, : state.num_blocks] = state.block_ids[: state.num_blocks]
        slot_mapping = block_table[request_of_row, positions // block_size].astype(np.int64) * block_size
        slot_mapping += positions % block_size

        ends = starts + counts
        # Of those that reach their newest token, its row and the rows of the drafts behind it.
        num_logits = [
            0 if state.row is None else min(num, end - state.num_tokens + 1)
            for state, num, end in zip(states, num_scheduled_tokens, ends.tolist(), strict=True)
        ]
        drawing = [i for i, num in enumerate(num_logits) if num > 0]
        logits_indices = [query_start_loc[i + 1] - back for i in drawing for back in range(num_logits[i], 0, -1)]
        return cls(
            states=states,
            input_ids=torch.from_numpy(input_ids),
            positions=torch.from_numpy(positions),
            logits_indices=torch.tensor(logits_indices, dtype=torch.int64),
            sampling_states=[states[i] for i in drawing],
            attention=AttentionMetadata(
                query_start_loc=query_start_loc.tolist(),
                seq_lens=ends.tolist(),
                block_table=torch.from_numpy(block_table),
                slot_mapping=torch.from_numpy(slot_mapping),
                block_size=block_size,
                batch_invariant=batch_invariant,
                causal=causal,
            ),
        )
