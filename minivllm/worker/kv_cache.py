"""Storage of keys and values: how large a block is, how many there are, and where they live.

Per attention layer two tensors, k_cache and v_cache:

    [num_kv_heads, num_blocks, block_size, head_size]   model dtype

Head-major, so that blocks with ascending ids are one plain slice per head, [num_kv_heads, run * block_size,
head_size]: a prompt's attention on a CPU multiplies with it without gathering. A decode reads block by block anyway.

Knows no request. Called by executor.py, llm_engine.py and the `plan` command.
Twin in vLLM: get_kv_cache_configs in vllm/v1/core/kv_cache_utils.py.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from minivllm.config import CacheConfig
from minivllm.errors import ConfigError
from minivllm.models.layers import KVCacheSpec

KVCache = list[tuple[torch.Tensor, torch.Tensor]]
# Where Linux says, inside a container, how much memory that may have: control groups of version 2 and 1.
CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True, slots=True)
class KVCachePlan:
    """The arithmetic of the pool, as `minivllm plan` prints it. num_blocks includes the null block."""

    num_blocks: int
    block_size: int
    bytes_per_token: int
    weight_bytes: int
    device_bytes: int
    pool_budget_bytes: int | None  # None: num_gpu_blocks_override decided
    rule: str  # which setting decided, in words

    @property
    def bytes_per_block(self) -> int:
        return self.bytes_per_token * self.block_size

    @property
    def pool_bytes(self) -> int:
        return self.num_blocks * self.bytes_per_block

    @property
    def num_tokens(self) -> int:
        return (self.num_blocks - 1) * self.block_size

    def concurrency(self, max_model_len: int) -> float:
        """How many requests of full length fit at once."""
        return (self.num_blocks - 1) / -(-max_model_len // self.block_size)


@dataclass(frozen=True, slots=True)
class GPUMemory:
    """What worker/gpu.py has measured of a GPU, in bytes."""

    total_bytes: int
    free_bytes: int  # before the weights were loaded
    activation_bytes: int  # a step of full budget has so much at once, beside weights and cache
    graph_bytes: int  # the same of the largest CUDA graph, which has memory of its own
    other_bytes: int  # of this process, but not torch's: context, loaded kernels, libraries


def device_memory_bytes(limits: Sequence[Path] = CONTAINER_LIMITS) -> int:
    """All RAM of this machine, or what a container may have of it. limits: files with a number or another word."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in limits:
        with contextlib.suppress(OSError, ValueError):  # not of this machine's kind; "max"
            found.append(int(file.read_text()))
    return min(found)


def kv_bytes_per_token(specs: Sequence[KVCacheSpec], dtype: torch.dtype) -> int:
    """2 (key and value) x heads x head_size x bytes per value, over all layers."""
    return sum(2 * spec.num_kv_heads * spec.head_size for spec in specs) * dtype.itemsize


def plan_kv_cache(
    config: CacheConfig,
    specs: Sequence[KVCacheSpec],
    dtype: torch.dtype,
    weight_bytes: int,
    max_tokens: int,
    gpu: GPUMemory | None = None,
) -> KVCachePlan:
    """Decide the number of blocks. `max_tokens` is the most that can be in flight (max_num_seqs x max_model_len).

    gpu: as measured; None: the cache lies in RAM.
    Raises ConfigError when the budget leaves no room for a single block.
    """
    bytes_per_token = kv_bytes_per_token(specs, dtype)
    bytes_per_block = bytes_per_token * config.block_size
    device_bytes = device_memory_bytes() if gpu is None else gpu.total_bytes
    budget: int | None
    if config.num_gpu_blocks_override is not None:
        num_blocks, budget, rule = config.num_gpu_blocks_override, None, "num_gpu_blocks_override"
    elif bytes_per_block == 0:
        num_blocks, budget, rule = -(-max_tokens // config.block_size) + 1, 0, "an encoder keeps nothing"
    else:
        if config.kv_cache_memory_bytes is not None:
            budget, rule = config.kv_cache_memory_bytes, "kv_cache_memory_bytes"
        else:
            share = int(config.gpu_memory_utilization * device_bytes)
            taken, what = (0, "the RAM minus the weights") if gpu is None else _taken_on_gpu(config, share, gpu)
            budget = share - weight_bytes - taken - config.reserved_memory_bytes
            others = f" and {config.reserved_memory_bytes:,} bytes of others" if config.reserved_memory_bytes else ""
            rule = f"{config.gpu_memory_utilization:.0%} of {what}{others} (gpu_memory_utilization)"
        num_blocks = budget // bytes_per_block
        if num_blocks < 2:
            raise ConfigError(
                f"no room for the key/value cache: {rule} leaves {budget:,} bytes, two blocks need "
                f"{2 * bytes_per_block:,}. Raise kv_cache_memory_bytes or gpu_memory_utilization.",
                parameter="kv_cache_memory_bytes" if config.kv_cache_memory_bytes else "gpu_memory_utilization",
            )
    return KVCachePlan(num_blocks, config.block_size, bytes_per_token, weight_bytes, device_bytes, budget, rule)


def _taken_on_gpu(config: CacheConfig, share: int, gpu: GPUMemory) -> tuple[int, str]:
    """Bytes of the share that are neither weights nor cache, and the rule in words.

    Raises ConfigError where others have so much of the GPU that the share is not there to be taken, as vLLM does.
    """
    if share - config.reserved_memory_bytes > gpu.free_bytes:
        raise ConfigError(
            f"gpu_memory_utilization {config.gpu_memory_utilization:g} is {share:,} of the GPU's {gpu.total_bytes:,} "
            f"bytes, but only {gpu.free_bytes:,} were free at the start. Lower it to at most "
            f"{int(100 * gpu.free_bytes / gpu.total_bytes) / 100:g}, or end what else runs there.",
            parameter="gpu_memory_utilization",
        )
    parts = {"of one step": gpu.activation_bytes, "of CUDA graphs": gpu.graph_bytes, "beside torch": gpu.other_bytes}
    words = ", ".join(f"{size:,} bytes {name}" for name, size in parts.items())
    return sum(parts.values()), f"the GPU minus the weights, {words}"


def allocate_kv_caches(
    specs: Sequence[KVCacheSpec],
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    *,
    device: torch.device | str = "cpu",
    poison: bool = False,
) -> KVCache:
    """One (k_cache, v_cache) per attention layer, uninitialised: nobody may read a slot that was not written.

    With `poison` every slot starts as NaN, so that a read too far shows in the output (tests do this).
    """
    caches = []
    for spec in specs:
        shape = (spec.num_kv_heads, num_blocks, block_size, spec.head_size)
        try:
            pair = (torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))
        except RuntimeError as error:  # torch's allocator: not enough memory
            raise ConfigError(
                f"could not reserve a key/value cache of {num_blocks} blocks. Lower gpu_memory_utilization or "
                f"num_gpu_blocks_override. ({type(error).__name__})",
                parameter="gpu_memory_utilization",
            ) from error
        if poison:
            pair[0].fill_(float("nan"))
            pair[1].fill_(float("nan"))
        caches.append(pair)
    return caches


def poison_blocks(caches: KVCache, block_ids: Sequence[int]) -> None:
    """Fill blocks with NaN: what a new owner must not see of the last one (tests)."""
    ids = torch.tensor(block_ids, dtype=torch.int64)
    for pair in caches:
        for cache in pair:
            cache[:, ids] = float("nan")
