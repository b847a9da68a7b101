"""paged_attention in Triton: one ragged kernel for decode, prefill, chunk and draft verification.

    program (tile, KV head, split):  a few query rows of ONE request, all query heads of one KV head
                                     ┌ BLOCK_M rows: row m is token m // group, head m % group of the tile
        for each TILE of keys:       │ scores = q · k,  cap, slopes, mask  ──▶ online softmax in base 2 ──▶ acc += p · v
        end:                         └ acc / sum, or with splits: acc / sum and its log2-sum-exp, for `merge_kernel`

A request with n rows gets n // BLOCK_Q + 1 tiles at most, so tile numbers are known without looking at the device:
request r starts at tile query_start_loc[r] // BLOCK_Q + r, and a binary search finds it. A tile past its request's
rows ends at once. A long context with few tiles is cut into splits that run side by side (split.py says when).

The tiles of keys lie at multiples of TILE from position 0, whatever the block size or the chunk; so a row's bits depend
on its own request only, as long as the split length is fixed, and with metadata.batch_invariant there are no splits.

Codes of a quantised cache become values of the query's type, which is exact. Scales are numbers per key: those of the
keys multiply the scores, those of the values the weights.

Called by the package on GPU tensors. Twin in vLLM: v1/attention/ops/triton_unified_attention.py. Paper:
FlashAttention-2, arXiv 2307.08691; split keys: Flash-Decoding.
"""

import os

import torch
import triton
import triton.language as tl

from minivllm.kernels.paged_attention.metadata import AttentionMetadata, StepTensors
from minivllm.kernels.paged_attention.split import MAX_HEAD_SIZE, Launch, choose_launch, num_multiprocessors

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _find_request(
    query_start_loc_ptr,  # [num_reqs + 1] int32
    tile,
    num_reqs,
    BLOCK_Q: tl.constexpr,
):
    """The last request whose first tile is not behind `tile`."""
    low = 0
    high = num_reqs
    while low < high:
        middle = (low + high) // 2
        first_tile = tl.load(query_start_loc_ptr + middle) // BLOCK_Q + middle
        if first_tile <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def _widened(codes, dtype: tl.constexpr):
    """Exact in every type: a code has at most 8 significant bits. e4b15 knows the way to float16 only."""
    if codes.dtype == tl.float8e4b15:
        codes = codes.to(tl.float16)
    return codes.to(dtype)


@triton.jit
def _code_unit(cache_ptr):
    """How often a code's value is too small as its type reads it: e4b15 reads the bits of e4m3 as 2^-8 of it."""
    return 256.0 if cache_ptr.dtype.element_ty == tl.float8e4b15 else 1.0


@triton.jit
def paged_attention_kernel(
    query_ptr,  # [num_tokens, num_heads, head_size]
    k_cache_ptr,  # [num_kv_heads, num_blocks, block_size, head_size]
    v_cache_ptr,
    k_scales_ptr,  # [num_kv_heads, num_blocks, block_size] fp32, read only where IS_QUANTISED
    v_scales_ptr,
    block_table_ptr,  # [num_reqs, max_blocks] int32
    query_start_loc_ptr,  # [num_reqs + 1] int32
    seq_lens_ptr,  # [num_reqs] int32
    alibi_slopes_ptr,  # [num_heads] fp32
    out_ptr,  # [num_tokens, num_heads, head_size], or with splits [num_splits, num_tokens, num_heads, head_size] fp32
    lse_ptr,  # [num_splits, num_tokens, num_heads] fp32, base 2
    scale,
    soft_cap,
    num_reqs,
    num_tokens,
    num_slots,  # of the cache: num_blocks * block_size
    query_token_stride,
    query_head_stride,
    block_table_stride,
    split_len,  # keys per split, a multiple of TILE
    block_size: tl.constexpr,
    head_size: tl.constexpr,
    num_heads: tl.constexpr,
    group: tl.constexpr,  # query heads per KV head
    sliding_window: tl.constexpr,  # 0: none
    HAS_CAP: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    HAS_SPLITS: tl.constexpr,
    IS_QUANTISED: tl.constexpr,
    UPCAST: tl.constexpr,  # widen what tl.dot multiplies: the interpreter computes bf16 products wrongly
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,  # BLOCK_M // group
    BLOCK_D: tl.constexpr,  # power of two >= head_size
    TILE: tl.constexpr,
):
    """One tile of query rows against one split of its request's keys; the module's docstring draws it."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    request = _find_request(query_start_loc_ptr, tile, num_reqs, BLOCK_Q)
    first_token = tl.load(query_start_loc_ptr + request)
    num_rows = tl.load(query_start_loc_ptr + request + 1) - first_token
    tile_in_request = tile - (first_token // BLOCK_Q + request)
    if tile_in_request * BLOCK_Q >= num_rows:
        return
    seq_len = tl.load(seq_lens_ptr + request)
    context = seq_len - num_rows  # keys before this step

    lanes = tl.arange(0, BLOCK_M)
    row = tile_in_request * BLOCK_Q + lanes // group  # [BLOCK_M], of the request
    head = kv_head * group + lanes % group  # [BLOCK_M]
    is_row = (lanes // group < BLOCK_Q) & (row < num_rows)
    position = context + row  # [BLOCK_M]
    token = (first_token + row).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    is_dim = dims < head_size
    query = tl.load(
        query_ptr + token[:, None] * query_token_stride + head[:, None] * query_head_stride + dims[None, :],
        mask=is_row[:, None] & is_dim[None, :],
        other=0.0,
    )  # [BLOCK_M, BLOCK_D]
    if UPCAST:
        query = query.to(tl.float32)
    if HAS_SLOPES:
        slopes = tl.load(alibi_slopes_ptr + head, mask=is_row, other=0.0)  # [BLOCK_M]

    # Only tiles in which some row sees some key: up to the last row, from the first row's window on.
    first_position = context + tile_in_request * BLOCK_Q
    last_row = tl.minimum(tile_in_request * BLOCK_Q + BLOCK_Q, num_rows) - 1
    stop = context + last_row + 1
    start = 0
    if sliding_window > 0:
        start = tl.maximum(first_position - sliding_window + 1, 0) // TILE * TILE
    if HAS_SPLITS:
        start = tl.maximum(start, split * split_len)
        stop = tl.minimum(stop, (split + 1) * split_len)

    window_edge = context + last_row - sliding_window + 1 if sliding_window > 0 else 0  # the last row's first key
    score_unit = scale if HAS_CAP or HAS_SLOPES else scale * LOG2_E  # of the softmax in base 2
    cache_head = kv_head.to(tl.int64) * num_slots * head_size
    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first_key in range(start, stop, TILE):
        key = first_key + tl.arange(0, TILE)  # [TILE], positions
        is_key = key < seq_len  # slots beyond belong to nobody: never read
        block = tl.load(
            block_table_ptr + request.to(tl.int64) * block_table_stride + key // block_size, mask=is_key, other=0
        ).to(tl.int64)
        slot = block * block_size + key % block_size
        offset = cache_head + slot * head_size  # [TILE] int64
        keys = tl.load(
            k_cache_ptr + offset[None, :] + dims[:, None], mask=is_dim[:, None] & is_key[None, :], other=0.0
        )  # [BLOCK_D, TILE]
        values = tl.load(
            v_cache_ptr + offset[:, None] + dims[None, :], mask=is_key[:, None] & is_dim[None, :], other=0.0
        )  # [TILE, BLOCK_D]
        if IS_QUANTISED:
            scale_offset = kv_head.to(tl.int64) * num_slots + slot  # [TILE]
            key_scales = tl.load(k_scales_ptr + scale_offset, mask=is_key, other=0.0) * _code_unit(k_cache_ptr)
            value_scales = tl.load(v_scales_ptr + scale_offset, mask=is_key, other=0.0) * _code_unit(v_cache_ptr)
            keys = _widened(keys, query.dtype)
            if query.dtype == tl.float16:  # a weight times a scale may be too small for it; a value is not
                values = (_widened(values, tl.float32) * value_scales[:, None]).to(query.dtype)
            else:
                values = _widened(values, query.dtype)
        elif UPCAST:
            keys = keys.to(tl.float32)
            values = values.to(tl.float32)
        scores = tl.dot(query, keys, input_precision="ieee") * score_unit  # [BLOCK_M, TILE]
        if IS_QUANTISED:
            scores *= key_scales[None, :]
        if HAS_CAP:  # tanh of the absolute value, and the sign again
            small = tl.exp(-2 * tl.abs(scores) / soft_cap)  # never overflows
            scores = tl.where(scores >= 0, soft_cap, -soft_cap) * (1 - small) / (1 + small)
        if HAS_SLOPES:
            scores -= slopes[:, None] * (position[:, None] - key[None, :]).to(tl.float32)
        if HAS_CAP or HAS_SLOPES:
            scores *= LOG2_E
        # Only a tile at the end of a row's context, or of its window, hides keys from some row: of a long prompt few.
        if (first_key + TILE > first_position + 1) | (first_key < window_edge):
            distance = position[:, None] - key[None, :]  # [BLOCK_M, TILE]
            visible = distance >= 0
            if sliding_window > 0:
                visible &= distance < sliding_window
            scores = tl.where(visible, scores, float("-inf"))

        new_max = tl.maximum(running_max, tl.max(scores, axis=1))
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)  # a row that has seen nothing: exp2(-inf) = 0
        weights = tl.exp2(scores - safe_max[:, None])  # [BLOCK_M, TILE]
        rescale = tl.exp2(running_max - safe_max)
        running_sum = running_sum * rescale + tl.sum(weights, axis=1)
        if IS_QUANTISED and query.dtype != tl.float16:
            weights *= value_scales[None, :]
        acc = acc * rescale[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        running_max = new_max

    has_seen = running_sum > 0.0  # a row may see nothing of this split, and padding (seq_len 0) nothing at all
    running_sum = tl.where(has_seen, running_sum, 1.0)
    out = acc / running_sum[:, None]
    mask = is_row[:, None] & is_dim[None, :]
    target = token * num_heads + head  # [BLOCK_M]
    if HAS_SPLITS:
        target += split.to(tl.int64) * num_tokens * num_heads
        lse = tl.where(has_seen, running_max + tl.log2(running_sum), float("-inf"))
        tl.store(lse_ptr + target, lse, mask=is_row)
    tl.store(out_ptr + target[:, None] * head_size + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def merge_kernel(
    parts_ptr,  # [num_splits, num_tokens, num_heads, head_size] fp32
    lse_ptr,  # [num_splits, num_tokens, num_heads] fp32, base 2; -inf: that split saw no key of this row
    out_ptr,  # [num_tokens, num_heads, head_size]
    num_splits,
    num_pairs,  # num_tokens * num_heads
    head_size,
    SPLITS: tl.constexpr,  # power of two >= num_splits
    BLOCK_D: tl.constexpr,
):
    """One program per token and head: the parts, weighted by how much of the softmax's sum each of them saw."""
    pair = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, SPLITS)
    dims = tl.arange(0, BLOCK_D)
    lse = tl.load(lse_ptr + splits.to(tl.int64) * num_pairs + pair, mask=splits < num_splits, other=float("-inf"))
    largest = tl.max(lse, axis=0)
    weights = tl.exp2(lse - tl.where(largest == float("-inf"), 0.0, largest))  # [SPLITS]
    total = tl.sum(weights, axis=0)
    weights = weights / tl.where(total > 0.0, total, 1.0)  # 0: a row without context, the padding of a CUDA graph
    parts = tl.load(
        parts_ptr + (splits[:, None].to(tl.int64) * num_pairs + pair) * head_size + dims[None, :],
        mask=(weights > 0)[:, None] & (dims < head_size)[None, :],
        other=0.0,
    )  # [SPLITS, BLOCK_D]
    out = tl.sum(parts * weights[:, None], axis=0)
    tl.store(out_ptr + pair * head_size + dims, out.to(out_ptr.dtype.element_ty), mask=dims < head_size)


# ------------------------------------------------------------------ the launch
def _as_stored(cache: torch.Tensor) -> torch.Tensor | triton.runtime.jit.TensorWrapper:
    """cache [num_kv_heads, num_blocks, block_size, head_size], with a type that Triton has for this GPU: before sm_89
    it knows e4m3 with another bias only."""
    is_old = (
        cache.device.type == "cuda"
        and not torch.version.hip
        and torch.cuda.get_device_capability(cache.device) < (8, 9)
    )
    return triton.reinterpret(cache, tl.float8e4b15) if cache.dtype == torch.float8_e4m3fn and is_old else cache


def paged_attention(
    query: torch.Tensor,  # [num_tokens, num_heads, head_size]
    k_cache: torch.Tensor,  # [num_kv_heads, num_blocks, block_size, head_size]
    v_cache: torch.Tensor,  # [num_kv_heads, num_blocks, block_size, head_size]
    metadata: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    alibi_slopes: torch.Tensor | None,  # [num_heads] fp32
    k_scales: torch.Tensor | None = None,  # [num_kv_heads, num_blocks, block_size] fp32
    v_scales: torch.Tensor | None = None,  # [num_kv_heads, num_blocks, block_size] fp32
    launch: Launch | None = None,
) -> torch.Tensor:  # [num_tokens, num_heads, head_size]
    """See the package's docstring. Fills metadata.plan on the first call of a step. launch: None chooses one."""
    if metadata.plan is None:
        metadata.plan = StepTensors.of(metadata, query.device)
    step = metadata.plan
    assert isinstance(step, StepTensors), step
    num_tokens, num_heads, head_size = query.shape
    num_kv_heads, num_blocks, block_size, _ = k_cache.shape
    group = num_heads // num_kv_heads
    if head_size > MAX_HEAD_SIZE:
        raise ValueError(f"query: expected heads of at most {MAX_HEAD_SIZE} values, got {head_size}")
    launch = launch or choose_launch(
        num_tokens,
        metadata.num_reqs,
        step.max_seq_len,
        num_kv_heads,
        group,
        head_size,
        multiprocessors=num_multiprocessors(query.device),
        batch_invariant=metadata.batch_invariant,
        has_slopes=alibi_slopes is not None,
        is_quantised=k_scales is not None,
    )
    query = query if query.stride(2) == 1 else query.contiguous()
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    has_splits = launch.num_splits > 1
    parts, lse = out, out
    if has_splits:
        parts = torch.empty((launch.num_splits, *query.shape), dtype=torch.float32, device=query.device)
        lse = torch.empty(parts.shape[:3], dtype=torch.float32, device=query.device)
    block_d = triton.next_power_of_2(head_size)
    paged_attention_kernel[(launch.num_tiles, num_kv_heads, launch.num_splits)](
        query,
        _as_stored(k_cache),
        _as_stored(v_cache),
        step.seq_lens if k_scales is None else k_scales,
        step.seq_lens if v_scales is None else v_scales,
        step.block_table,
        step.query_start_loc,
        step.seq_lens,
        step.seq_lens if alibi_slopes is None else alibi_slopes,
        parts,
        lse,
        scale,
        soft_cap or 1.0,
        metadata.num_reqs,
        num_tokens,
        num_blocks * block_size,
        query.stride(0),
        query.stride(1),
        step.block_table.stride(0),
        launch.split_len,
        block_size=block_size,
        head_size=head_size,
        num_heads=num_heads,
        group=group,
        sliding_window=sliding_window or 0,
        HAS_CAP=soft_cap is not None,
        HAS_SLOPES=alibi_slopes is not None,
        HAS_SPLITS=has_splits,
        IS_QUANTISED=k_scales is not None,
        UPCAST=query.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1",
        BLOCK_M=launch.block_m,
        BLOCK_Q=launch.block_q,
        BLOCK_D=block_d,
        TILE=launch.tile,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    if has_splits:
        merge_kernel[(num_tokens * num_heads,)](
            parts,
            lse,
            out,
            launch.num_splits,
            num_tokens * num_heads,
            head_size,
            SPLITS=triton.next_power_of_2(launch.num_splits),
            BLOCK_D=block_d,
            num_warps=4,
        )
    return out
