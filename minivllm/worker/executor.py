"""Executor: the model and its cache on the devices of this machine, behind two methods.

    initialize_kv_cache(plan)    once
    execute_model(step)          every step

This one runs in the caller's process, on one device. Knows no scheduler. Owned by engine/llm_engine.py.
Twin in vLLM: vllm/v1/executor/uniproc_executor.py.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Sequence
from typing import Any

import torch

from minivllm.errors import ConfigError
from minivllm.models.layers import KVCacheSpec
from minivllm.models.linear import weight_bytes
from minivllm.outputs import ModelRunnerOutput, SchedulerOutput
from minivllm.worker.draft_model import DraftModel
from minivllm.worker.kv_cache import KVCache, KVCachePlan, allocate_kv_caches
from minivllm.worker.model_runner import GrammarBitmask, ModelRunner

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory for the next step instead of handing it back to the kernel.

    By default every temporary above 128 KB is mapped and unmapped anew, and the page faults cost up to half of a
    step from about 32 rows on. Does nothing on other C libraries.
    """
    libc = ctypes.CDLL(ctypes.util.find_library("c"))
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


class Executor:
    """Args:
    model: loaded, in eval mode.
    dtype: of keys and values.
    draft_model: loaded, in eval mode; guesses tokens for `model`. None: nobody does, or somebody without weights.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        dtype: torch.dtype,
        max_model_len: int,
        *,
        pooling_type: str = "LAST",
        causal: bool = True,
        batch_invariant: bool = False,
        poison: bool = False,
        draft_model: torch.nn.Module | None = None,
    ):
        self.model: Any = model  # a class of models/registry.py
        self.draft_model: Any = draft_model
        self.dtype = dtype
        self.max_model_len = max_model_len
        self.pooling_type = pooling_type
        self.causal = causal
        self.batch_invariant = batch_invariant
        self.poison = poison
        self._runner: ModelRunner | None = None
        keep_freed_memory()

    @property
    def kv_cache_specs(self) -> Sequence[KVCacheSpec]:
        """Of all layers that keep something for a block id, the draft model's included."""
        specs: list[KVCacheSpec] = list(self.model.kv_cache_specs)
        return specs if self.draft_model is None else [*specs, *self.draft_model.kv_cache_specs]

    @property
    def weight_bytes(self) -> int:
        """Resident, packed ones included."""
        return weight_bytes(self.model) + (0 if self.draft_model is None else weight_bytes(self.draft_model))

    def initialize_kv_cache(self, plan: KVCachePlan) -> None:
        """Reserve the blocks of the plan."""

        def allocate(model: Any) -> KVCache:
            return allocate_kv_caches(
                model.kv_cache_specs, plan.num_blocks, plan.block_size, self.dtype, poison=self.poison
            )

        draft_model = None
        if self.draft_model is not None:
            draft_model = DraftModel(
                self.draft_model, allocate(self.draft_model), plan.block_size, batch_invariant=self.batch_invariant
            )
        self._runner = ModelRunner(
            self.model,
            allocate(self.model),
            plan.block_size,
            self.max_model_len,
            pooling_type=self.pooling_type,
            batch_invariant=self.batch_invariant,
            causal=self.causal,
            poison=self.poison,
            draft_model=draft_model,
        )

    def execute_model(self, step: SchedulerOutput, grammar_bitmask: GrammarBitmask | None = None) -> ModelRunnerOutput:
        """One step; grammar_bitmask is called when the forward is on its way."""
        if self._runner is None:
            raise ConfigError("initialize_kv_cache comes before the first step")
        return self._runner.execute_model(step, grammar_bitmask)
