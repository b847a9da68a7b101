"""A rank that is not the first: it makes the calls that rank 0 makes, on its own part of the model.

    load ─▶ (measure) ─▶ initialize ─▶ step, step, ... ─▶ stop

It has an Executor, a ModelRunner and a cache as rank 0 has, with fewer heads; it computes the same batches, and draws
nothing. When rank 0 ends, its connection does, and so does this process. An error of this one ends it: the others
cannot go on without its part.

Started by ranks.py (`python -m minivllm.worker.rank_process`) or by torchrun. Twin in vLLM: WorkerProc in
vllm/v1/executor/multiproc_executor.py.
"""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Mapping
from typing import Any

import torch

from minivllm.errors import EngineDeadError, MiniVLLMError
from minivllm.hub import resolve_model
from minivllm.models import loader
from minivllm.models.linear import ModelOptions
from minivllm.models.parallel import TensorParallel
from minivllm.outputs import ModelRunnerOutput
from minivllm.worker.executor import Executor
from minivllm.worker.gpu import MemorySnapshot
from minivllm.worker.input_batch import InputBatch, RequestState
from minivllm.worker.kv_cache import KVCachePlan
from minivllm.worker.model_runner import PROMPT_LOGPROBS_ROWS, GrammarBitmask, ModelRunner
from minivllm.worker.ranks import Ranks, join, local_rank
from minivllm.worker.step_message import read_step


class FollowingRunner(ModelRunner):
    """Computes this rank's part of the logits that rank 0 draws from, and hears with the next step what was drawn."""

    def append(self, drawn: Mapping[str, list[int]]) -> None:
        """What rank 0 has drawn in the last step: request id -> tokens."""
        for request_id, token_ids in drawn.items():
            for token_id in token_ids:
                self.states[request_id].append_token(token_id)

    def _sample(
        self,
        batch: InputBatch,
        hidden_states: torch.Tensor,  # [num_tokens, hidden_size]
        result: ModelRunnerOutput,
        grammar_bitmask: GrammarBitmask | None,
    ) -> None:
        self.model.compute_logits(hidden_states[batch.logits_indices])

    def _prompt_logprobs(
        self,
        state: RequestState,
        rows: torch.Tensor,  # [its tokens, hidden_size]
        result: ModelRunnerOutput,
    ) -> None:
        num_rows = max(0, min(len(rows), state.num_prompt_tokens - 1 - state.num_computed_tokens))
        if num_rows:
            for some in rows[:num_rows].split(PROMPT_LOGPROBS_ROWS):
                self.model.compute_logits(some)


class FollowingExecutor(Executor):
    """An Executor that follows rank 0's."""

    runner_class = FollowingRunner

    def follow(self, message: dict[str, Any]) -> None:
        """One step, as step_message.py has written it."""
        assert isinstance(self._runner, FollowingRunner)
        self._runner.append(message["drawn"])
        self._runner.execute_model(read_step(message))


def run(ranks: Ranks, device_type: str) -> None:
    """Make calls until rank 0 says stop. Raises EngineDeadError when it ends without a word."""
    device = torch.device("cuda", local_rank()) if device_type == "cuda" else torch.device("cpu")
    if device_type == "cuda":
        torch.cuda.set_device(device)
    before = MemorySnapshot.of(device) if device_type == "cuda" else None
    executor: FollowingExecutor | None = None
    while True:
        message = ranks.hear()
        call = message.pop("call")
        if call == "stop":
            return
        if call == "load":
            executor = _load(ranks, device, message)
            ranks.report([executor.weight_bytes])
            continue
        assert executor is not None
        if call == "measure":
            assert before is not None
            ranks.report(list(dataclasses.astuple(executor.measure_memory(before, message["block_size"]))))
        elif call == "initialize":
            executor.initialize_kv_cache(KVCachePlan(**message["plan"]))
        else:
            executor.follow(message)


def _load(ranks: Ranks, device: torch.device, message: dict[str, Any]) -> FollowingExecutor:
    source = resolve_model(message["model"])
    hf_config = loader.load_hf_config(source)
    dtype = loader.DTYPES[message["dtype"]]
    options = ModelOptions(
        dtype,
        message["settings"]["batch_invariant"],
        message["settings"]["impl"],
        device,
    )
    options = dataclasses.replace(options, parallel=part_of(ranks, hf_config, options))
    model = loader.load_model(source, hf_config, options)
    return FollowingExecutor(model, dtype, message["max_model_len"], device=device, **message["settings"])


def part_of(ranks: Ranks, hf_config: Any, options: ModelOptions) -> TensorParallel:
    """What of the model this rank has. Who computes a shared head for a request depends on the others in the step, so
    batch-invariant ranks share none."""
    share_heads = options.device.type == "cpu" and not options.batch_invariant
    return TensorParallel.of(hf_config, ranks.rank, ranks.size, ranks.collectives, share_heads=share_heads)


def main(arguments: list[str]) -> int:
    """arguments: as ranks.join takes them. Returns the exit code."""
    return follow_rank_0(join(arguments), arguments[0])


def follow_rank_0(ranks: Ranks, device_type: str) -> int:
    """`run` until the end; returns the exit code. A signal for the whole group is rank 0's business."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    try:
        run(ranks, device_type)
    except EngineDeadError:
        return 1  # rank 0 tells why
    except MiniVLLMError as error:
        sys.stderr.write(f"rank {ranks.rank}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
