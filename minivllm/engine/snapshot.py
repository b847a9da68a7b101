"""A snapshot of the engine for people who look on: requests, the last step's decisions, every block. Plain data.

    scheduler.running, .waiting ─┐
    block tables, block pool ────┼──▶ take_snapshot ──▶ {"version": 1, "requests": [...], "blocks": {...}, ...}
    last step's decisions ───────┘

Sizes, counts and ids only: no text, no token id and no block hash leaves the engine here. Blocks are columns, one
entry for each block; a block's owners are the requests that have it in `block_ids`.

Must run in the engine's own thread, between two steps. Knows no HTTP. Called through AsyncEngine.call by
entrypoints/engine_state.py. Twin in vLLM: none; the nearest is vllm/v1/metrics/stats.py.
"""

from __future__ import annotations

from itertools import compress
from typing import Any

from minivllm.core.block_pool import BlockPool
from minivllm.core.request import Request
from minivllm.engine.llm_engine import LLMEngine

STATE_VERSION = 1  # grows when a field changes its meaning or goes; a new field is no new version


def take_snapshot(engine: LLMEngine) -> dict[str, Any]:
    """Everything of one moment."""
    scheduler, step = engine.scheduler, engine.last_step
    requests = [_describe_request(engine, request) for request in (*scheduler.running, *scheduler.waiting)]
    statuses = [request["status"] for request in requests]
    computed, output = engine.throughput.per_second()
    return {
        "version": STATE_VERSION,
        "model": _describe_model(engine),
        "config": _describe_config(engine),
        "step": step.step if step is not None else 0,
        "num_scheduled_tokens": step.total_num_scheduled_tokens if step is not None else 0,
        "num_running": statuses.count("running"),
        "num_waiting": statuses.count("waiting"),
        "num_preempted": statuses.count("preempted"),
        "tokens_per_second": {"computed": round(computed, 2), "output": round(output, 2)},
        "totals": {
            "num_computed_tokens": engine.throughput.num_computed_tokens,
            "num_output_tokens": engine.throughput.num_output_tokens,
            "num_preemptions": scheduler.num_preemptions,
        },
        "requests": requests,
        "decisions": [
            {
                "request_id": decision.request_id,
                "action": decision.action,
                "num_scheduled_tokens": decision.num_scheduled_tokens,
                "reason": decision.reason,
            }
            for decision in engine.decisions()
        ],
        "blocks": _describe_blocks(scheduler.kv_cache.pool),
    }


def _describe_model(engine: LLMEngine) -> dict[str, Any]:
    model = engine.config.model
    return {
        "name": model.name,
        "dtype": model.dtype,
        "max_model_len": model.max_model_len,
        "vocab_size": model.vocab_size,
        "is_pooling": model.is_pooling,
    }


def _describe_config(engine: LLMEngine) -> dict[str, Any]:
    scheduler = engine.config.scheduler
    return {
        "block_size": engine.config.cache.block_size,
        "num_blocks": engine.scheduler.kv_cache.pool.num_blocks,
        "enable_prefix_caching": engine.config.cache.enable_prefix_caching,
        "max_num_seqs": scheduler.max_num_seqs,
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        "max_model_len": scheduler.max_model_len,
        "enable_chunked_prefill": scheduler.enable_chunked_prefill,
        "long_prefill_token_threshold": scheduler.long_prefill_token_threshold,
        "scheduling_policy": scheduler.policy,
        "batch_invariant": engine.config.batch_invariant,
    }


def _describe_request(engine: LLMEngine, request: Request) -> dict[str, Any]:
    table = engine.scheduler.kv_cache.tables.get(request.request_id)
    return {
        "request_id": request.request_id,
        "status": request.status.name.lower(),
        "num_prompt_tokens": request.num_prompt_tokens,
        "num_output_tokens": request.num_output_tokens,
        "max_tokens": request.max_tokens,
        "num_computed_tokens": request.num_computed_tokens,
        "num_cached_tokens": request.num_cached_tokens,
        "num_preemptions": request.num_preemptions,
        "priority": request.priority,
        "age_seconds": round(engine.output_processor.age_seconds(request.request_id), 3),
        "block_ids": table.block_ids if table is not None else [],
    }


def _describe_blocks(pool: BlockPool) -> dict[str, Any]:
    """ref_counts[i] and cached[i] are of block i. A block is free when nobody holds it; the null block never is."""
    ref_counts = [block.ref_cnt for block in pool.blocks]
    cached = [0 if block.block_hash is None else 1 for block in pool.blocks]
    return {
        "null_block_id": pool.null_block.block_id,
        "num_free": pool.num_free_blocks,
        "num_held": pool.num_blocks - 1 - pool.num_free_blocks,
        "num_shared": sum(count > 1 for count in ref_counts),
        "num_cached": sum(cached),
        "num_cached_free": sum(count == 0 for count in compress(ref_counts, cached)),
        "ref_counts": ref_counts,
        "cached": cached,
    }
