"""Executor: the model and its cache on the devices of this machine, behind three methods.

    measure_memory()             once, for the plan: what a step needs beside weights and cache
    initialize_kv_cache(plan)    once
    execute_model(step)          every step

This one runs in the caller's process, on one device: the only one to know whether that is a CPU (cpu.py) or a GPU
(gpu.py). parallel_executor.py does the same on several. Knows no scheduler. Owned by engine/llm_engine.py.
Twin in vLLM: vllm/v1/executor/uniproc_executor.py.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Sequence
from typing import Any

import torch

from minivllm.errors import ConfigError
from minivllm.kernels.dispatch import choose
from minivllm.models.layers import KVCacheSpec
from minivllm.models.linear import weight_bytes
from minivllm.outputs import ModelRunnerOutput, SchedulerOutput
from minivllm.worker import gpu
from minivllm.worker.cpu import CPUPath
from minivllm.worker.draft_model import DraftModel
from minivllm.worker.hooks import Hooks
from minivllm.worker.kv_cache import GPUMemory, KVCache, KVCachePlan, allocate_kv_caches
from minivllm.worker.model_runner import BatchWatcher, GrammarBitmask, ModelRunner

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
    device: where the model's weights are; None: a CPU.
    max_num_seqs, max_num_batched_tokens: what no step exceeds; a GPU's buffers are so large.
    enforce_eager: no CUDA graphs. impl: as the model's, for the sampler's kernels on a GPU.
    """

    runner_class = ModelRunner

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
        device: torch.device | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 1024,
        enforce_eager: bool = False,
        impl: str = "auto",
        draft_model: torch.nn.Module | None = None,
    ):
        self.model: Any = model  # a class of models/registry.py
        self.draft_model: Any = draft_model
        self.device = device or torch.device("cpu")
        self.enforce_eager, self.impl = enforce_eager, impl
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.dtype = dtype
        self.max_model_len = max_model_len
        self.pooling_type = pooling_type
        self.causal = causal
        self.batch_invariant = batch_invariant
        self.poison = poison
        self.hooks = Hooks(model)
        self._runner: ModelRunner | None = None
        keep_freed_memory()

    @property
    def is_alive(self) -> bool:
        """Whether there may be another step."""
        return True

    def close(self) -> None:
        """Give up what does not end by itself."""

    @property
    def kv_cache_specs(self) -> Sequence[KVCacheSpec]:
        """Of all layers that keep something for a block id, the draft model's included."""
        specs: list[KVCacheSpec] = list(self.model.kv_cache_specs)
        return specs if self.draft_model is None else [*specs, *self.draft_model.kv_cache_specs]

    @property
    def kernel_impl(self) -> str:
        """Which implementation of the kernels computes: "cpu", "triton" or "reference"."""
        return choose(self.impl, torch.empty(0, device=self.device))

    @property
    def weight_bytes(self) -> int:
        """Resident, packed ones included."""
        return weight_bytes(self.model) + (0 if self.draft_model is None else weight_bytes(self.draft_model))

    def measure_memory(self, before: gpu.MemorySnapshot, block_size: int) -> GPUMemory:
        """Of a GPU. before: nothing of this engine was there."""
        caches = allocate_kv_caches(self.model.kv_cache_specs, 1, block_size, self.dtype, device=self.device)
        path = gpu.GPUPath(self.model, caches, self.device, self._limits(block_size), None, impl=self.impl)
        has_graphs = not self.enforce_eager and gpu.can_be_captured(self.model, self.impl)
        return gpu.measure_memory(path, before, max(gpu.row_buckets(self.max_num_seqs)) if has_graphs else 0)

    def initialize_kv_cache(self, plan: KVCachePlan, *, show_progress: bool = False) -> None:
        """Reserve the blocks of the plan; on a GPU capture the graphs, with a bar on request."""
        draft_model = None
        if self.draft_model is not None:  # no graphs: the target's are what the memory was measured for
            draft_model = DraftModel(
                self._path(self.draft_model, self._allocate(self.draft_model, plan), plan, None),
                plan.block_size,
                batch_invariant=self.batch_invariant,
            )
        caches = self._allocate(self.model, plan)
        capture = gpu.cuda_capture() if self.device.type == "cuda" and not self.enforce_eager else None
        self._runner = self.runner_class(
            self.model,
            caches,
            plan.block_size,
            self.max_model_len,
            pooling_type=self.pooling_type,
            batch_invariant=self.batch_invariant,
            causal=self.causal,
            poison=self.poison,
            path=self._path(self.model, caches, plan, capture, show_progress=show_progress),
            draft_model=draft_model,
            hooks=self.hooks,
        )

    def _allocate(self, model: Any, plan: KVCachePlan) -> KVCache:
        return allocate_kv_caches(
            model.kv_cache_specs, plan.num_blocks, plan.block_size, self.dtype, device=self.device, poison=self.poison
        )

    def _path(
        self,
        model: Any,
        caches: KVCache,
        plan: KVCachePlan,
        capture: gpu.Capture | None,
        *,
        show_progress: bool = False,
    ) -> CPUPath:
        if self.device.type != "cuda":
            path = CPUPath(model, caches)
            if caches and self.impl in ("auto", "cpu"):
                path.compile_kernels(plan.block_size, show_progress=show_progress)
            return path
        return gpu.GPUPath(
            model,
            caches,
            self.device,
            self._limits(plan.block_size),
            capture,
            impl=self.impl,
            show_progress=show_progress,
        )

    def _limits(self, block_size: int) -> gpu.Limits:
        return gpu.Limits(
            self.max_num_seqs, self.max_num_batched_tokens, self.max_model_len, block_size, self.batch_invariant
        )

    @property
    def runner(self) -> ModelRunner:
        """Who computes the steps."""
        if self._runner is None:
            raise ConfigError("initialize_kv_cache comes before the first step")
        return self._runner

    def execute_model(self, step: SchedulerOutput, grammar_bitmask: GrammarBitmask | None = None) -> ModelRunnerOutput:
        """One step; grammar_bitmask is called when the forward is on its way."""
        return self.runner.execute_model(step, grammar_bitmask)

    def watch(self, watcher: BatchWatcher | None) -> None:
        """Let somebody look on from the next step on; None: nobody."""
        if self._runner is not None:
            self._runner.watcher = watcher
