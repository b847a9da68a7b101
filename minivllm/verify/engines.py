"""Engines on one model, as many as a verification needs: weights are read once for each arithmetic.

    engines = Engines("models/my-llama", max_model_len=256)
    engines.start(block_size=4)          # another cache and scheduler around the same network
    engines.start(dtype="bfloat16")      # another network

Called by verify.py and interpreter.py. Twin in vLLM: VllmRunner of tests/conftest.py.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from minivllm.config import CacheConfig, SchedulerConfig
from minivllm.engine.llm_engine import LLMEngine
from minivllm.outputs import RequestOutput
from minivllm.sampling_params import SamplingParams
from minivllm.worker.executor import Executor
from minivllm.worker.kv_cache import plan_kv_cache

CACHE_BYTES = 128 << 20
NETWORK_OPTIONS = frozenset({"dtype", "impl", "quantization", "batch_invariant"})


class Engines:
    """Args:
    model, max_model_len: as LLM's.
    """

    def __init__(self, model: str | Path | None, max_model_len: int | None = None):
        self.model, self.max_model_len = model, max_model_len
        self._plain: LLMEngine | None = None  # float32: what nearly everything runs on

    def start(self, *, poison: bool = False, **options: Any) -> LLMEngine:
        """options: as LLM's; float32 unless they say otherwise. Raises ConfigError for what the model refuses."""
        if NETWORK_OPTIONS & options.keys():
            return self._load(poison=poison, **options)
        if self._plain is None:
            self._plain = self._load()
        return _around(self._plain, poison, options)

    def _load(self, **options: Any) -> LLMEngine:
        defaults: dict[str, Any] = {"dtype": "float32", "device": "cpu", "kv_cache_memory_bytes": CACHE_BYTES}
        return LLMEngine.from_model(self.model, max_model_len=self.max_model_len, **(defaults | options))


def _around(engine: LLMEngine, poison: bool, options: dict[str, Any]) -> LLMEngine:
    """A new engine with the network and the tokenizer of another one."""
    cache: CacheConfig = _changed(engine.config.cache, options)
    scheduler: SchedulerConfig = _changed(engine.config.scheduler, options)
    config = dataclasses.replace(engine.config, cache=cache, scheduler=scheduler)
    old = engine._executor
    executor = Executor(old.model, old.dtype, old.max_model_len, poison=poison, impl=old.impl)
    max_tokens = scheduler.max_num_seqs * scheduler.max_model_len
    plan = plan_kv_cache(cache, executor.kv_cache_specs, old.dtype, executor.weight_bytes, max_tokens)
    executor.initialize_kv_cache(plan)
    return LLMEngine(config, executor, engine.tokenizer, plan)


def _changed(record: Any, options: dict[str, Any]) -> Any:
    """A frozen record with those of the options that are its fields."""
    known = record.__dataclass_fields__
    return dataclasses.replace(record, **{name: value for name, value in options.items() if name in known})


def generate(engine: LLMEngine, prompts: list[list[int]], **params: Any) -> list[RequestOutput]:
    """Greedy answers to all prompts at once, in their order; eos does not end them. Raises RuntimeError."""
    fields = {"temperature": 0.0, "ignore_eos": True} | params
    ids = [engine.add_request({"prompt_token_ids": prompt}, SamplingParams(**fields)) for prompt in prompts]
    finished: dict[str, Any] = {}
    while engine.has_unfinished_requests():
        finished |= {output.request_id: output for output in engine.step() if output.finished}
    for output in finished.values():
        if getattr(output, "error", None):
            raise RuntimeError(f"the engine failed a request: {output.error}")
    return [finished[request_id] for request_id in ids]
