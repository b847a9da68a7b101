"""A step as the other ranks need it: which tokens are computed and where their keys and values go.

Rank 0 alone draws, so nobody else needs to know how: of a request's sampling parameters only whether it draws at all
and whether it wants logprobs of its prompt, for these are products that all ranks compute. The tokens that were drawn
in the last step go with the next one: a few numbers, where the logits they were drawn from are a vocabulary per row.

Called by parallel_executor.py and rank_process.py. Twin in vLLM: none (SchedulerOutput is pickled there).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from minivllm.outputs import CachedRequestData, NewRequestData, SchedulerOutput
from minivllm.sampling_params import SamplingParams


def write_step(step: SchedulerOutput) -> dict[str, Any]:
    """Plain lists and numbers, for JSON."""
    return {
        "new": [_write_request(data) for data in step.scheduled_new_reqs],
        "cached": [
            [data.request_id, data.new_block_ids, data.num_computed_tokens, data.new_token_ids]
            for data in step.scheduled_cached_reqs
        ],
        "scheduled": step.num_scheduled_tokens,
        "forget": [*step.preempted_req_ids, *step.finished_req_ids],
        "drafts": step.draft_token_ids,
    }


def read_step(message: dict[str, Any]) -> SchedulerOutput:
    """What write_step has written, as far as a rank that draws nothing looks."""
    return SchedulerOutput(
        step=0,
        scheduled_new_reqs=[_read_request(fields) for fields in message["new"]],
        scheduled_cached_reqs=[CachedRequestData(*fields) for fields in message["cached"]],
        num_scheduled_tokens=message["scheduled"],
        total_num_scheduled_tokens=sum(message["scheduled"].values()),
        preempted_req_ids=[],
        finished_req_ids=message["forget"],
        decisions=[],
        draft_token_ids=message["drafts"],
    )


def _write_request(data: NewRequestData) -> dict[str, Any]:
    params = data.sampling_params
    return {
        "request_id": data.request_id,
        "token_ids": data.token_ids,
        "num_prompt_tokens": data.num_prompt_tokens,
        "block_ids": data.block_ids,
        "num_computed_tokens": data.num_computed_tokens,
        "sampling_params": None if params is None else {"prompt_logprobs": params.prompt_logprobs},
    }


def _read_request(fields: dict[str, Any]) -> NewRequestData:
    data = NewRequestData(**fields)
    params = fields["sampling_params"]
    return data if params is None else dataclasses.replace(data, sampling_params=SamplingParams(**params))
