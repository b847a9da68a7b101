"""ParallelExecutor: rank 0 of a model that several ranks compute. The engine sees an Executor.

Every call is told to the others first and then made here as on one rank; where the ranks need each other is inside the
model (models/parallel.py). Rank 0 alone draws: it gathers the logits, rows x vocabulary x bytes of the other ranks'
tokens, where drawing everywhere would take as much to every rank, and the masks of grammars besides.

There is no step that fails alone: the ranks would wait for each other's next sum. So an error ends the engine.

Called by engine/llm_engine.py. Twin in vLLM: vllm/v1/executor/multiproc_executor.py.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import torch

from minivllm.config import ParallelConfig
from minivllm.errors import ConfigError, EngineDeadError
from minivllm.hub import ModelSource
from minivllm.models import loader, registry
from minivllm.models.layers import KVCacheSpec
from minivllm.models.linear import ModelOptions, weight_bytes
from minivllm.models.parallel import TensorParallel, bytes_per_token, check_size
from minivllm.outputs import ModelRunnerOutput, SchedulerOutput
from minivllm.worker import gpu, rank_process, ray_actors
from minivllm.worker.executor import Executor
from minivllm.worker.kv_cache import GPUMemory, KVCachePlan
from minivllm.worker.model_runner import GrammarBitmask
from minivllm.worker.ranks import Ranks, connect
from minivllm.worker.step_message import write_step


class ParallelExecutor(Executor):
    """Made by `load`."""

    def __init__(
        self,
        ranks: Ranks,
        parallel: TensorParallel,
        model: torch.nn.Module,
        dtype: torch.dtype,
        max_model_len: int,
        **settings: Any,
    ):
        super().__init__(model, dtype, max_model_len, **settings)
        self.ranks = ranks
        self.parallel = parallel
        self._weight_bytes_of_ranks: list[int] = []
        self._drawn: dict[str, list[int]] = {}  # in the last step; the others have yet to hear it

    @classmethod
    def load(
        cls,
        size: int,
        source: ModelSource,
        hf_config: Any,
        options: ModelOptions,
        max_model_len: int,
        settings: dict[str, Any],
        *,
        backend: str = "mp",
        show_progress: bool = False,
    ) -> ParallelExecutor:
        """Start or join the ranks, and have each read its part. settings: Executor's, plain values.

        backend: who starts them, as ParallelConfig's distributed_executor_backend.

        On a rank that torchrun has started this returns only by SystemExit, when rank 0 has ended.
        Raises ConfigError.
        """
        start = ray_actors.start if backend == "ray" else connect
        ranks = start(size, options.device.type)
        if ranks.rank > 0:
            raise SystemExit(rank_process.follow_rank_0(ranks, options.device.type))
        try:
            dtype = str(options.dtype).removeprefix("torch.")
            place = str(source.path.absolute())
            ranks.tell("load", model=place, dtype=dtype, max_model_len=max_model_len, settings=settings)
            parallel = rank_process.part_of(ranks, hf_config, options)
            options = dataclasses.replace(options, parallel=parallel)
            model = loader.load_model(source, hf_config, options, show_progress=show_progress)
            executor = cls(ranks, parallel, model, options.dtype, max_model_len, device=options.device, **settings)
            executor._weight_bytes_of_ranks = [found for (found,) in ranks.report([weight_bytes(model)])]
        except EngineDeadError as error:
            ranks.close()
            raise ConfigError(f"{source.name} cannot be loaded: {error}; its own message is above.") from error
        except BaseException:
            ranks.close()
            raise
        sums, logits = bytes_per_token(hf_config, size, options.dtype.itemsize)
        logging.getLogger(__name__).info(
            "%d ranks: each token takes %d bytes from every rank to the sums, a drawn one %d bytes of logits to rank 0",
            *(size, sums, logits),
        )
        return executor

    # ------------------------------------------------------------------ for the plan
    @property
    def _is_shared(self) -> bool:
        """Whether all ranks take their memory from one: the RAM. A GPU is one rank's own."""
        return self.device.type != "cuda"

    @property
    def kv_cache_specs(self) -> Sequence[KVCacheSpec]:
        """In RAM all ranks' heads; on GPUs those of the rank that has the most: the plan is for each of them."""
        counts = [len(heads) for heads in self.parallel.kv_heads]
        num_kv_heads = sum(counts) if self._is_shared else max(counts)
        return [dataclasses.replace(spec, num_kv_heads=num_kv_heads) for spec in self.model.kv_cache_specs]

    @property
    def weight_bytes(self) -> int:
        """In RAM of all ranks, on GPUs of the largest."""
        return (sum if self._is_shared else max)(self._weight_bytes_of_ranks)

    def measure_memory(self, before: gpu.MemorySnapshot, block_size: int) -> GPUMemory:
        """Of the fullest GPU."""
        self.ranks.tell("measure", block_size=block_size)
        own = super().measure_memory(before, block_size)
        total, free, *taken = zip(*self.ranks.report(list(dataclasses.astuple(own))), strict=True)
        return GPUMemory(min(total), min(free), *map(max, taken))

    # ------------------------------------------------------------------ calls
    def initialize_kv_cache(self, plan: KVCachePlan, *, show_progress: bool = False) -> None:
        """As Executor's, on every rank."""
        self.ranks.tell("initialize", plan=dataclasses.asdict(plan))
        super().initialize_kv_cache(plan, show_progress=show_progress)

    def execute_model(self, step: SchedulerOutput, grammar_bitmask: GrammarBitmask | None = None) -> ModelRunnerOutput:
        """As Executor's, on every rank. Raises EngineDeadError, whatever went wrong."""
        try:
            self.ranks.tell("step", **write_step(step), drawn=self._drawn)
            result = super().execute_model(step, grammar_bitmask)
        except BaseException as error:
            self.ranks.give_up()
            if isinstance(error, EngineDeadError) or not isinstance(error, Exception):
                raise
            raise EngineDeadError(f"a step failed on rank 0 ({type(error).__name__}), the other ranks wait") from error
        self._drawn = result.sampled_token_ids
        return result

    @property
    def is_alive(self) -> bool:
        """False as soon as a rank has ended, at rest as well."""
        return self.ranks.is_alive

    def close(self) -> None:
        """End the other ranks."""
        self.ranks.close()


def check_parallel(
    config: ParallelConfig, hf_config: Any, device: torch.device, quantization: str | None, draft_model: Any
) -> None:
    """Raise ConfigError naming the setting that several ranks cannot have, or the number they cannot be."""
    size = config.tensor_parallel_size
    if size == 1:
        return
    problems = {
        "quantization": quantization is not None and "a part of a weight would be rounded otherwise than the whole",
        "speculative_config.model": draft_model is not None and 'only method "ngram" works over several ranks',
        "device": (device.index or 0) > 0 and "rank r computes on cuda:r",
    }
    for name, why in problems.items():
        if why:
            raise ConfigError(
                f"{name} must be left out when tensor_parallel_size is {size}: {why}.", parameter=name.partition(".")[0]
            )
    if not getattr(registry.model_class(hf_config), "can_be_parallel", False):
        raise ConfigError(
            f"tensor_parallel_size must be 1 for {', '.join(hf_config.architectures or ['this model'])}, got {size}: "
            "only the decoders of models/registry.py can be cut, no encoders and no networks of transformers' own.",
            parameter="tensor_parallel_size",
        )
    check_size(hf_config, size)
