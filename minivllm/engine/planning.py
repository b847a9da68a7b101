"""What will fit: the arithmetic of weights, cache and concurrency, before any weight is read.

Uses the same functions as the engine, so that what is predicted is what is reserved.
Knows no scheduler. Called by cli/models.py (`minivllm plan`). Twin in vLLM: the start-up log lines of gpu_worker.py.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch

from minivllm.config import DEFAULT_CPU_SHARE, CacheConfig, SchedulerConfig, check_quantization
from minivllm.engine.llm_engine import read_model_facts
from minivllm.models import loader
from minivllm.models.layers import KVCacheSpec
from minivllm.models.linear import Linear, ModelOptions, TiedEmbedding
from minivllm.models.registry import model_class
from minivllm.models.weights import weight_slots
from minivllm.worker.kv_cache import KVCachePlan, plan_kv_cache

GIB = 2**30
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class EnginePlan:
    """The numbers and where they come from."""

    name: str
    dtype: str
    max_model_len: int
    max_num_seqs: int
    num_parameters: int
    specs: list[KVCacheSpec]
    cache: KVCachePlan
    quantization: str | None = None

    def as_dict(self) -> dict[str, Any]:
        cache = self.cache
        return {
            "model": self.name,
            "dtype": self.dtype,
            "quantization": self.quantization,
            "max_model_len": self.max_model_len,
            "num_parameters": self.num_parameters,
            "weight_bytes": cache.weight_bytes,
            "kv_bytes_per_token": cache.bytes_per_token,
            "block_size": cache.block_size,
            "num_blocks": cache.num_blocks,
            "pool_bytes": cache.pool_bytes,
            "pool_tokens": cache.num_tokens,
            "concurrency": round(cache.concurrency(self.max_model_len), 2),
            "device_bytes": cache.device_bytes,
            "rule": cache.rule,
        }

    def rows(self) -> list[tuple[str, str, str]]:
        """(what, value, arithmetic), for a table."""
        cache, size = self.cache, torch.tensor([], dtype=getattr(torch, self.dtype)).element_size()
        per_weight = f"{size} bytes"
        if self.quantization is not None:
            per_weight = f"{cache.weight_bytes / self.num_parameters:.2f} bytes ({self.quantization})"
        heads = self.specs[0] if self.specs else KVCacheSpec(0, 0)
        concurrency = cache.concurrency(self.max_model_len)
        together = min(self.max_num_seqs, math.floor(concurrency))
        return [
            ("weights", f"{cache.weight_bytes / GIB:.3f} GiB", f"{self.num_parameters:,} parameters x {per_weight}"),
            (
                "per token",
                f"{cache.bytes_per_token:,} bytes",
                f"2 (key, value) x {len(self.specs)} layers x {heads.num_kv_heads} heads x {heads.head_size} "
                f"x {size} bytes",
            ),
            ("per block", f"{cache.bytes_per_block:,} bytes", f"{cache.block_size} tokens"),
            ("RAM", f"{cache.device_bytes / GIB:.2f} GiB", cache.rule),
            (
                "blocks",
                f"{cache.num_blocks:,}",
                f"{cache.pool_bytes / GIB:.2f} GiB / {cache.bytes_per_block:,} bytes, block 0 is the null block",
            ),
            ("tokens", f"{cache.num_tokens:,}", f"({cache.num_blocks:,} - 1) x {cache.block_size}"),
            (
                "concurrency",
                f"{concurrency:.2f}",
                f"requests of max_model_len {self.max_model_len:,} that fit at once; at most {self.max_num_seqs} run, "
                f"so {together} of full length",
            ),
        ]


def plan_engine(
    model: str | Path | None = None,
    *,
    dtype: str = "auto",
    max_model_len: int | None = None,
    block_size: int = 16,
    max_num_seqs: int = 64,
    gpu_memory_utilization: float | None = None,
    kv_cache_memory_bytes: int | None = None,
    num_gpu_blocks_override: int | None = None,
    quantization: str | None = None,
) -> EnginePlan:
    """The plan for LLM(...) with the same arguments on a CPU; a GPU's follows from a step that is measured.

    Raises ModelNotFoundError, ConfigError.

    Packed weights fill whole tiles (models/linear.py): widths that are no multiple of 64, which only toy models have,
    take more bytes than planned.
    """
    share = DEFAULT_CPU_SHARE if gpu_memory_utilization is None else gpu_memory_utilization
    config = CacheConfig(block_size, share, kv_cache_memory_bytes, num_gpu_blocks_override)
    facts = read_model_facts(model, dtype=dtype, max_model_len=max_model_len)
    max_len = facts.model_config.max_model_len
    SchedulerConfig(max_num_seqs=max_num_seqs, max_model_len=max_len)  # refuses what LLM refuses
    quantization = check_quantization(quantization, facts.source.kind == "gguf")
    stored = loader.weight_shapes(facts.source)
    loader.check_shapes(facts.source, facts.hf_config, stored)
    # Our networks take no memory for their matrices before they are loaded, transformers' are built on the meta device.
    network = model_class(facts.hf_config)(facts.hf_config, ModelOptions(facts.dtype, quantization=quantization))
    num_parameters = sum(map(math.prod, _wanted_shapes(network, facts.hf_config, stored)))
    specs = list(network.kv_cache_specs)
    saved_bytes = _saved_bytes(network, loader.stored_bits(facts.source), facts.dtype) if quantization else 0
    weight_bytes = num_parameters * facts.dtype.itemsize - saved_bytes
    cache = plan_kv_cache(config, specs, facts.dtype, weight_bytes, max_num_seqs * max_len)
    dtype_name = facts.model_config.dtype
    return EnginePlan(facts.source.name, dtype_name, max_len, max_num_seqs, num_parameters, specs, cache, quantization)


def _saved_bytes(network: torch.nn.Module, stored_bits: dict[str, int], dtype: torch.dtype) -> int:
    """How many bytes quantised weights take less than the same weights in dtype."""
    saved = 0
    for path, module in network.named_modules():
        if isinstance(module, Linear | TiedEmbedding):
            shapes = [slot.shape for name, slot in module.weight_slots(path).items() if name.endswith("weight")]
            saved += sum(map(math.prod, shapes)) * dtype.itemsize - module.planned_bytes(stored_bits, path)
    return saved


def _wanted_shapes(network: torch.nn.Module, hf_config: Any, stored: dict[str, Shape]) -> list[Shape]:
    """Shapes of the tensors that will be resident: what our network asks for (a checkpoint may hold heads and poolers
    beside that); for transformers' networks what is stored, a tied head once."""
    wanted = [slot.shape for slot in weight_slots(network).values()]
    if wanted:
        return wanted
    tied = {loader.LM_HEAD} if hf_config.get_text_config().tie_word_embeddings else set()
    return [shape for name, shape in stored.items() if name not in tied]
