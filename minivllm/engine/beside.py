"""An engine for embeddings beside a generating one, in the same process and the same share of the memory.

    share of the memory (gpu_memory_utilization)
    ├── weights and cache of the embedding model: loaded first, and no more cache than it can use at once
    └── weights and cache of the generating model: the rest

An encoder keeps nothing; a decoder gives its blocks back as soon as a prompt is computed, so that one prompt of full
length and the prompts of one step are all that is ever in its cache.

Called by cli/serving.py. Twin in vLLM: none (an embedding model is a server of its own there).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minivllm.engine.llm_engine import LLMEngine, read_model_facts


def load_embedding_engine(
    model: str | Path,
    *,
    dtype: str = "auto",
    block_size: int = 16,
    max_num_seqs: int = 64,
    max_num_batched_tokens: int = 1024,
    **settings: Any,
) -> LLMEngine:
    """The arguments are LLMEngine.from_model's. Raises ModelNotFoundError, ConfigError."""
    facts = read_model_facts(model, dtype=dtype)
    num_blocks = None
    if not facts.model_config.is_encoder:
        num_blocks = blocks_of_a_step(
            facts.model_config.max_model_len, block_size, max_num_seqs, max_num_batched_tokens
        )
    return LLMEngine.from_model(
        model,
        dtype=dtype,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        num_gpu_blocks_override=num_blocks,
        **settings,
    )


def blocks_of_a_step(max_model_len: int, block_size: int, max_num_seqs: int, max_num_batched_tokens: int) -> int:
    """One prompt of full length, the tokens of one step, a begun block for each request, and the null block."""
    return -(-max_model_len // block_size) + -(-max_num_batched_tokens // block_size) + max_num_seqs + 1


def memory_bytes(engine: LLMEngine) -> int:
    """What an engine keeps: weights and cache."""
    return engine.plan.weight_bytes + engine.plan.pool_bytes
