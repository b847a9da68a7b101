"""Every start-up setting, in frozen records, with all their validation.

    EngineConfig
    ├── ModelConfig       what the checkpoint says: widths, context, dtype
    ├── CacheConfig       the pool of key/value blocks
    ├── SchedulerConfig   how much work goes into one step
    ├── SpeculativeConfig who guesses tokens ahead, or None
    └── DeviceConfig      on which device
    ParallelConfig        over how many devices

Nothing is changed after construction. The records know no torch and read no file: engine/llm_engine.py
fills them from the model, cli/ and llm.py from the user. Twin in vLLM: vllm/config/.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from minivllm.errors import ConfigError, show

DTYPES = ("float32", "bfloat16")
SCHEDULING_POLICIES = ("fcfs", "priority")
# What weights become on loading; gguf: what they are in the file; +bf16: and bfloat16, for steps of many tokens.
QUANTIZATIONS = ("int8", "int4", "gguf", "int4+bf16", "gguf+bf16")
GENERATION_CONFIGS = ("auto", "vllm")  # the model's own sampling defaults, or none
EXECUTOR_BACKENDS = ("mp", "ray")  # mp: processes of this machine, or of torchrun
SPECULATIVE_METHODS = ("ngram", "draft_model")
DEFAULT_CPU_SHARE, DEFAULT_GPU_SHARE = 0.25, 0.92  # gpu_memory_utilization: a GPU is nobody else's
DEFAULT_MAX_MODEL_LEN = 8192  # upper bound for the default: a long context is asked for, not stumbled into


def _check_int(name: str, value: Any, low: int, high: int = 2**31 - 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        message = f"{name} must be an integer in [{low}, {high}], got {show(value)}."
        raise ConfigError(message, parameter=name.partition(".")[0])


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        message = f"{name} must be one of {', '.join(choices)}, got {show(value)}."
        raise ConfigError(message, parameter=name.partition(".")[0])


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What the rest of the engine must know about the checkpoint."""

    name: str
    dtype: str
    max_model_len: int  # tokens of prompt and output together
    vocab_size: int  # width of the logits: token ids are in [0, vocab_size)
    is_pooling: bool = False  # an embedding model: no sampling
    is_encoder: bool = False  # bidirectional attention: no cache, no chunks
    embedding_size: int = 1  # numbers in a vector
    # Which shorter vectors the model was trained for (Matryoshka). None: none; (): every length.
    matryoshka_dimensions: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _check_choice("dtype", self.dtype, DTYPES)
        _check_int("max_model_len", self.max_model_len, 1)
        _check_int("vocab_size", self.vocab_size, 1)
        _check_int("embedding_size", self.embedding_size, 1)
        for dimensions in self.matryoshka_dimensions or ():
            _check_int("matryoshka_dimensions", dimensions, 1, self.embedding_size)


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """The block pool. Exactly one of three ways decides its size, in this order of precedence:
    num_gpu_blocks_override, kv_cache_memory_bytes, gpu_memory_utilization (a share of the device's memory;
    on a CPU, of the RAM). reserved_memory_bytes of that share belong to others: a second model in this process."""

    block_size: int = 16  # tokens per block
    gpu_memory_utilization: float = DEFAULT_CPU_SHARE
    kv_cache_memory_bytes: int | None = None
    num_gpu_blocks_override: int | None = None
    enable_prefix_caching: bool = True
    reserved_memory_bytes: int = 0

    def __post_init__(self) -> None:
        _check_int("reserved_memory_bytes", self.reserved_memory_bytes, 0, 2**60)
        _check_int("block_size", self.block_size, 1, 1024)
        share = self.gpu_memory_utilization
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0.0 < share <= 1.0:
            raise ConfigError(
                f"gpu_memory_utilization must be a share in (0, 1], got {show(share)}.",
                parameter="gpu_memory_utilization",
            )
        if self.kv_cache_memory_bytes is not None:
            _check_int("kv_cache_memory_bytes", self.kv_cache_memory_bytes, 1, 2**60)
        if self.num_gpu_blocks_override is not None:
            _check_int("num_gpu_blocks_override", self.num_gpu_blocks_override, 2)


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """How much work goes into one step."""

    max_num_seqs: int = 64  # requests running at the same time
    max_num_batched_tokens: int = 1024  # the token budget of a step
    max_model_len: int = DEFAULT_MAX_MODEL_LEN
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0  # cap on one prompt's share of a step; 0 = none
    policy: str = "fcfs"

    def __post_init__(self) -> None:
        _check_int("max_num_seqs", self.max_num_seqs, 1, 65536)
        _check_int("max_num_batched_tokens", self.max_num_batched_tokens, 1)
        _check_int("max_model_len", self.max_model_len, 1)
        _check_int("long_prefill_token_threshold", self.long_prefill_token_threshold, 0)
        _check_choice("scheduling_policy", self.policy, SCHEDULING_POLICIES)
        if not self.enable_chunked_prefill and self.max_num_batched_tokens < self.max_model_len:
            raise ConfigError(
                f"max_num_batched_tokens must be at least max_model_len ({self.max_model_len}) when chunked prefill "
                f"is off, got {self.max_num_batched_tokens}: a longer prompt could never be computed. Raise it, lower "
                "max_model_len, or leave chunked prefill on.",
                parameter="max_num_batched_tokens",
            )


@dataclass(frozen=True, slots=True)
class SpeculativeConfig:
    """Who guesses the next tokens, how many at once, and when it is not worth it. vLLM's names.

    The two limits are for a CPU, where weights are read once for all rows of a step: eight rows cost 477-700 us in a
    matrix that costs 585 us for one, so drafts of one request are nearly free, while five requests fill those rows
    themselves. And a draft that is right less than one time in four pays for less than its own drawing.
    """

    method: str
    num_speculative_tokens: int  # drafts of one request in one step
    prompt_lookup_max: int | None = None  # ngram: longest run of tokens that is looked for; None = 4
    prompt_lookup_min: int | None = None  # ngram: shortest; None = 2, or prompt_lookup_max where that is 1
    model: str | Path | None = None  # draft_model: a folder, a .gguf file or an id; same vocabulary
    disable_by_batch_size: int = 4  # more running requests than this: no drafts
    min_acceptance_rate: float = 0.25  # of a request's recent drafts; below it they pause

    def __post_init__(self) -> None:
        _check_choice("speculative_config.method", self.method, SPECULATIVE_METHODS)
        _check_int("speculative_config.num_speculative_tokens", self.num_speculative_tokens, 1, 128)
        _check_int("speculative_config.disable_by_batch_size", self.disable_by_batch_size, 1)
        rate = self.min_acceptance_rate
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0.0 <= rate <= 1.0:
            raise ConfigError(
                f"speculative_config.min_acceptance_rate must be a share in [0, 1], got {show(rate)}.",
                parameter="speculative_config",
            )
        lookup = {"prompt_lookup_max": self.prompt_lookup_max, "prompt_lookup_min": self.prompt_lookup_min}
        for name, value in lookup.items():
            if value is not None:
                self._check_belongs(name, "ngram")
                _check_int(f"speculative_config.{name}", value, 1, 64)
        if self.shortest_lookup > self.longest_lookup:
            raise ConfigError(
                f"speculative_config.prompt_lookup_min must be at most prompt_lookup_max ({self.longest_lookup}), got "
                f"{self.shortest_lookup}.",
                parameter="speculative_config",
            )
        if self.model is not None:
            self._check_belongs("model", "draft_model")
        if self.method == "draft_model" and not isinstance(self.model, str | Path):
            raise ConfigError(
                'speculative_config.model must name a model for method "draft_model", a smaller one of the same '
                f"vocabulary, got {show(self.model)}.",
                parameter="speculative_config",
            )

    def _check_belongs(self, name: str, method: str) -> None:
        if self.method != method:
            raise ConfigError(
                f'speculative_config.{name} belongs to method "{method}" and must be left out with "{self.method}".',
                parameter="speculative_config",
            )

    @property
    def longest_lookup(self) -> int:
        return self.prompt_lookup_max or max(4, self.prompt_lookup_min or 0)

    @property
    def shortest_lookup(self) -> int:
        return self.prompt_lookup_min or min(2, self.longest_lookup)

    @classmethod
    def from_dict(cls, given: Any) -> SpeculativeConfig | None:
        """From what LLM(speculative_config=...) and --speculative-config take; None stays None.

        Raises ConfigError for what is no dict, for a field that is unknown or missing, and for a wrong value.
        """
        if given is None:
            return None
        known = [field.name for field in fields(cls)]
        problem = ""
        if not isinstance(given, dict):
            problem = f"speculative_config must be a dict, got {show(given)}."
        elif unknown := [name for name in given if name not in known]:
            problem = f"speculative_config has no field {show(unknown[0])}; it has {', '.join(known)}."
        elif missing := [name for name in known[:2] if name not in given]:
            problem = f"speculative_config.{missing[0]} is missing."
        if problem:
            raise ConfigError(problem, parameter="speculative_config")
        return cls(**given)


@dataclass(frozen=True, slots=True)
class ParallelConfig:
    """Over how many devices a model is spread: tensor_parallel_size ranks, each with a part of every layer.

    The other two are not built: better said than ignored.
    """

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    distributed_executor_backend: str = "mp"  # who starts the ranks

    def __post_init__(self) -> None:
        _check_int("tensor_parallel_size", self.tensor_parallel_size, 1, 1024)
        for name in ("pipeline_parallel_size", "data_parallel_size"):
            value = getattr(self, name)
            _check_int(name, value, 1)
            if value > 1:
                raise ConfigError(
                    f"{name} must be 1, got {value}: more is not built. Set it to 1; tensor_parallel_size spreads a "
                    "model over several devices, and for more requests at once start several servers behind a load "
                    "balancer.",
                    parameter=name,
                )
        _check_choice("distributed_executor_backend", self.distributed_executor_backend, EXECUTOR_BACKENDS)


@dataclass(frozen=True, slots=True)
class DeviceConfig:
    """Where a model is computed; worker/gpu.py finds out whether it is there."""

    device: str = "auto"  # "auto", "cpu", "cuda" (the first GPU), "cuda:1"
    enforce_eager: bool = False  # no CUDA graphs: slower steps, a faster start; a CPU has none

    def __post_init__(self) -> None:
        if not isinstance(self.device, str) or not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", self.device):
            raise ConfigError(
                f"device must be auto, cpu, cuda or cuda:NUMBER, got {show(self.device)}.", parameter="device"
            )
        if not isinstance(self.enforce_eager, bool):
            raise ConfigError(
                f"enforce_eager must be true or false, got {show(self.enforce_eager)}.", parameter="enforce_eager"
            )


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """All of it. `batch_invariant` makes a request's logits independent of whatever else runs, bit for bit."""

    model: ModelConfig
    cache: CacheConfig
    scheduler: SchedulerConfig
    batch_invariant: bool = False
    seed: int = 0
    device: DeviceConfig = DeviceConfig()
    speculative: SpeculativeConfig | None = None

    def __post_init__(self) -> None:
        _check_int("seed", self.seed, -(2**63), 2**63 - 1)


def choose_max_model_len(requested: int | None, limit: int | None, advised: int | None = None) -> int:
    """The context length: what the user asked for, within what the checkpoint can do (`limit`).

    advised: what the checkpoint says is good for it, taken where the user asked for nothing.
    """
    if requested is None:
        return min(limit or DEFAULT_MAX_MODEL_LEN, advised or DEFAULT_MAX_MODEL_LEN, DEFAULT_MAX_MODEL_LEN)
    _check_int("max_model_len", requested, 1)
    if limit is not None and requested > limit:
        raise ConfigError(
            f"max_model_len must be at most {limit}, the context this model was made for, got {requested}.",
            parameter="max_model_len",
        )
    return requested


def check_generation_config(value: Any) -> None:
    """Raise ConfigError unless it is "auto" or "vllm"."""
    _check_choice("generation_config", value, GENERATION_CONFIGS)


def check_quantization(requested: str | None, is_gguf: bool, *, on_gpu: bool = False) -> str | None:
    """One of QUANTIZATIONS or None, for a model from a GGUF file or another one. Raises ConfigError."""
    name = None if requested == "none" else requested
    if name is not None:
        _check_choice("quantization", name, QUANTIZATIONS)
    if name is not None and on_gpu:
        raise ConfigError(f"quantization {name} is built for CPUs; on a GPU use none.", parameter="quantization")
    if name is not None and name.startswith("gguf") and not is_gguf:
        raise ConfigError(
            f"quantization {name} is for .gguf files, and this model is none: int8 and int4 quantise any model.",
            parameter="quantization",
        )
    return name
