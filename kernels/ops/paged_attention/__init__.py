"""Attention over a paged KV cache, for one flat batch of requests that decode, prefill, or continue a chunk.

    out[row] = sum over the visible positions j of softmax_j(score(row, j)) * value[j]
    score(row, j) = soft_cap(scale * query[row] . key[j]) - alibi_slope * (p - j),   row at position p of its request
    visible: 0 <= p - j, and p - j < sliding_window where there is one

This step's keys and values are already in the cache (reshape_and_cache runs first). Query head h reads KV head
h // (num_heads / num_kv_heads). Encoders have no cache: `encoder_attention` below.

A quantised cache (quantised_cache.py) stands for the values code * scale; the reference and Triton's kernel read it.

A slot is read only if it holds a position below its request's seq_len: unused slots may contain anything, NaN too.
Called by models/layers.py. Twin in vLLM: v1/attention/backends and ops/triton_unified_attention.py.
"""

from types import ModuleType

import torch

from minivllm.kernels.dispatch import choose
from minivllm.kernels.jit import supports
from minivllm.kernels.paged_attention import cpu, reference
from minivllm.kernels.paged_attention.cpu_plan import KEYS_PER_ITEM
from minivllm.kernels.paged_attention.metadata import AttentionMetadata, HeadShares, StepTensors, validate_metadata
from minivllm.kernels.quantised_cache import check_scales, is_quantised

__all__ = [
    "KEYS_PER_ITEM",
    "AttentionMetadata",
    "HeadShares",
    "StepTensors",
    "encoder_attention",
    "paged_attention",
    "validate_metadata",
]


def paged_attention(
    query: torch.Tensor,  # [num_tokens, num_heads, head_size]
    k_cache: torch.Tensor,  # [num_kv_heads, num_blocks, block_size, head_size]
    v_cache: torch.Tensor,  # [num_kv_heads, num_blocks, block_size, head_size]
    metadata: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,  # [num_heads] fp32
    k_scales: torch.Tensor | None = None,  # [num_kv_heads, num_blocks, block_size] fp32, for an int8 or float8 cache
    v_scales: torch.Tensor | None = None,  # [num_kv_heads, num_blocks, block_size] fp32
    head_shares: HeadShares | None = None,  # of each KV head, the part of the step's work that is done here
    impl: str = "auto",
) -> torch.Tensor:  # [num_tokens, num_heads, head_size]
    """Attention of every query row over its own request's context; `sliding_window` counts keys, its own included.

    With metadata.batch_invariant a row's bits depend on its request alone: not on the other requests, the chunking
    or the block ids. With head_shares, which CPUs alone have, a head is 0 for the requests for which another rank
    computes it (heads_of_requests), and the sum over the ranks is the whole. Raises ValueError naming both sides where
    arguments do not fit. The tensors' shapes are checked on every call (about 2 microseconds); metadata once per step,
    on the call that finds `metadata.plan` empty.
    """
    _check_tensors(query, k_cache, v_cache, metadata)
    check_scales(k_cache, v_cache, k_scales, v_scales)
    if metadata.plan is None:
        _check_options(query, metadata, sliding_window, soft_cap, alibi_slopes)
        _check_shares(head_shares, k_cache.shape[0], choose(impl, query))
        validate_metadata(metadata, num_blocks=k_cache.shape[1])
    scales = {"k_scales": k_scales, "v_scales": v_scales} if is_quantised(k_cache) else {}
    shares = {} if head_shares is None else {"head_shares": head_shares}
    return _implementation(impl, query, has_scales=bool(scales)).paged_attention(
        query,
        k_cache,
        v_cache,
        metadata,
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        alibi_slopes=alibi_slopes,
        **scales,
        **shares,
    )


def encoder_attention(
    query: torch.Tensor,  # [num_tokens, num_heads, head_size]
    key: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
    value: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
    query_start_loc: list[int],  # [num_reqs + 1], host
    *,
    scale: float,
    batch_invariant: bool = False,
    impl: str = "auto",
) -> torch.Tensor:  # [num_tokens, num_heads, head_size]
    """Bidirectional attention inside each request: its rows attend all of its rows; nothing is cached.

    Raises ValueError naming both sides where arguments do not fit.
    """
    if key.shape != value.shape or key.shape[0] != query.shape[0] or key.shape[2] != query.shape[2]:
        raise ValueError(
            f"key, value: expected [{query.shape[0]}, num_kv_heads, {query.shape[2]}] as query {list(query.shape)}, "
            f"got key {list(key.shape)} and value {list(value.shape)}"
        )
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"num_heads: expected a multiple of num_kv_heads {key.shape[1]}, got {query.shape[1]}")
    if query_start_loc[0] != 0 or query_start_loc[-1] != query.shape[0]:
        raise ValueError(
            f"query_start_loc: expected 0 .. {query.shape[0]} (the query's rows), "
            f"got {query_start_loc[0]} .. {query_start_loc[-1]}"
        )
    if choose(impl, query) == "cpu":
        return cpu.encoder_attention(query, key, value, query_start_loc, scale=scale, batch_invariant=batch_invariant)
    return reference.encoder_attention(query, key, value, query_start_loc, scale=scale)


def _check_tensors(
    query: torch.Tensor,  # [num_tokens, num_heads, head_size]
    k_cache: torch.Tensor,  # [num_kv_heads, num_blocks, block_size, head_size]
    v_cache: torch.Tensor,  # [num_kv_heads, num_blocks, block_size, head_size]
    metadata: AttentionMetadata,
) -> None:
    """The checks that may differ from layer to layer; written flat because 30 layers run them every step."""
    num_kv_heads, _, block_size, head_size = shape = k_cache.shape
    num_tokens, num_heads, query_head_size = query.shape
    if num_heads % num_kv_heads or query_head_size != head_size or head_size % 8:
        raise ValueError(
            f"query: expected num_heads a multiple of num_kv_heads and head_size a multiple of 8 as in k_cache "
            f"{list(shape)}, got {list(query.shape)}"
        )
    if block_size != metadata.block_size or v_cache.shape != shape:
        raise ValueError(
            f"k_cache, v_cache: expected equal shapes with block_size {metadata.block_size} as metadata says, "
            f"got {list(shape)} and {list(v_cache.shape)}"
        )
    if num_tokens != metadata.query_start_loc[-1]:
        raise ValueError(f"query: expected {metadata.num_tokens} rows as query_start_loc says, got {num_tokens}")
    if not (query.dtype == k_cache.dtype or is_quantised(k_cache)) or not (
        k_cache.is_contiguous() and v_cache.is_contiguous()
    ):
        raise ValueError(
            f"k_cache, v_cache: expected contiguous tensors of the query's dtype {query.dtype}, got {k_cache.dtype}, "
            f"contiguous {k_cache.is_contiguous()} and {v_cache.is_contiguous()}"
        )


def _check_options(
    query: torch.Tensor,  # [num_tokens, num_heads, head_size]
    metadata: AttentionMetadata,
    sliding_window: int | None,
    soft_cap: float | None,
    alibi_slopes: torch.Tensor | None,  # [num_heads]
) -> None:
    if not metadata.causal:
        raise ValueError("metadata.causal: expected True for a KV cache, got False; encoders call encoder_attention")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window: expected at least 1 key or None, got {sliding_window}")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap: expected a positive number or None, got {soft_cap}")
    if alibi_slopes is not None and alibi_slopes.shape != (query.shape[1],):
        raise ValueError(f"alibi_slopes: expected [{query.shape[1]}], got {list(alibi_slopes.shape)}")


def _check_shares(head_shares: HeadShares | None, num_kv_heads: int, implementation: str) -> None:
    if head_shares is None:
        return
    if len(head_shares) != num_kv_heads or implementation == "triton":
        raise ValueError(
            f"head_shares: expected one for each of {num_kv_heads} key/value heads and an implementation for CPUs, "
            f"got {len(head_shares)} and {implementation}"
        )


def _implementation(
    impl: str,
    query: torch.Tensor,  # [num_tokens, num_heads, head_size]
    *,
    has_scales: bool,
) -> ModuleType:
    """The CPU path reads long runs of the cache in place, so it has no use for codes: there the reference steps in."""
    chosen = choose(impl, query)
    if chosen == "cpu" and has_scales:
        if impl == "cpu":
            raise ValueError("impl: 'cpu' reads no quantised cache; use 'auto', which takes the reference on a CPU")
        return reference
    if chosen == "triton":
        from minivllm.kernels.paged_attention import kernel  # only here: triton is not everywhere

        return kernel
    return cpu if chosen == "cpu" and supports(query) else reference
