"""decoder_step in one compiled call: the loop over the layers, and in it the kernels of the single operations.

Python runs once per step instead of once per operation. That saves more than its own time: megabytes of weights go
through the caches between two operations, and what Python and torch need to start the next one has to come back from
memory. A small operation costs three to five times there what it costs alone (benchmarks/LOG.md).

Called by the package. Twin in vLLM: none; a CUDA graph of the step does the same on a GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from minivllm.kernels.decoder_step.meeting import ALONE, SLOT_ROWS, add_up, meet
from minivllm.kernels.decoder_step.weights import ATTENTION, NORMS, PRODUCTS, ROTATION, SUMS, DecoderWeights
from minivllm.kernels.jit import FLOAT32, INT64, array_at, cycles, jit, like, narrow, prange, use_torch_threads, widen
from minivllm.kernels.packed_matmul.cpu import BYTES, multiply, multiply_and_gate, padded, widened
from minivllm.kernels.paged_attention.cpu_plan import PROMPT_ROWS, LayerShape, StepPlan, plan_layer
from minivllm.kernels.paged_attention.cpu_prompts_amx import attend as attend_prompts
from minivllm.kernels.paged_attention.cpu_prompts_amx import lay_out
from minivllm.kernels.paged_attention.cpu_rows import known_head_size, merge
from minivllm.kernels.paged_attention.cpu_rows_amx import attend_with_amx
from minivllm.kernels.paged_attention.metadata import AttentionMetadata
from minivllm.kernels.rms_norm.cpu import norm_row, norm_rows, sum_of_squares

ROWS_FOR_THREADS = 8  # fewer are done before a second thread has begun
ROWS_FOR_EACH_RANK = 4  # of fewer every rank sums and norms all, and they meet half as often


def decoder_step(
    hidden_states: torch.Tensor,  # [num_tokens, hidden_size]
    cos: torch.Tensor,  # [num_tokens, head_size]
    sin: torch.Tensor,  # [num_tokens, head_size]
    weights: DecoderWeights,
    metadata: AttentionMetadata,
) -> torch.Tensor:  # [num_tokens, hidden_size]
    """See the package's docstring. Fills metadata.plan."""
    if metadata.plan is None:
        use_torch_threads()
        metadata.plan = StepPlan(metadata)
    assert isinstance(metadata.plan, StepPlan), metadata.plan
    shape, num_rows = weights.shape, len(hidden_states)
    num_kv_heads, num_blocks, block_size, head_size = weights.layers[0].k_cache.shape
    group = shape.num_heads // num_kv_heads
    layer_shape = LayerShape(
        *(num_kv_heads, group, head_size, hidden_states.dtype, shape.sliding_window),
        all_tiles=False,
        all_rows=False,
        head_shares=shape.head_shares,
    )
    plan = metadata.plan.derive(plan_layer, layer_shape, metadata.block_table)
    rows, prompts = plan.rows, plan.prompts  # with AMX there is no third way
    residual, out = hidden_states.contiguous(), torch.empty_like(hidden_states)
    workspace = _workspace(num_rows, weights)  # alive until the call returns
    meeting = weights.meeting
    is_done = run_layers(
        (residual.data_ptr(), out.data_ptr(), weights.last_norm.data_ptr(), cos.data_ptr(), sin.data_ptr()),
        weights.addresses,
        (shape.hidden_size, shape.num_heads, shape.qkv_size, shape.intermediate_size),
        (num_rows, num_kv_heads, num_blocks, block_size, group, head_size),
        shape.eps,
        metadata.slot_mapping.numpy(),
        (rows.block_table, rows.items),
        ((shape.scale, 0.0), rows.no_slopes, rows.window),
        (rows.attended, rows.totals),
        rows.chunks,
        rows.has_shared_rows,
        (prompts.prompts, prompts.tiles, prompts.works),
        prompts.laid_out,
        known_head_size(head_size),
        tuple(buffer.data_ptr() for buffer in workspace),
        ALONE if meeting is None else meeting.numbers,
        weights.cycles,
        like(hidden_states),
    )
    if meeting is not None and not is_done:
        raise meeting.errors.pop()
    return out


def _workspace(num_rows: int, weights: DecoderWeights) -> tuple[torch.Tensor, ...]:
    """What a layer leaves behind for the next operation: hidden, normed, qkv, query, attended, gated; and the threads'
    scratch.

    The left-hand sides of products and of attention have whole tiles of rows, zeros where there is none.
    """
    shape, whole = weights.shape, padded(num_rows) + PROMPT_ROWS
    query_size = shape.num_heads * shape.head_size
    widths = (shape.hidden_size, shape.hidden_size, shape.qkv_size, query_size, query_size, shape.intermediate_size)
    rows = tuple(torch.zeros(whole, width, dtype=torch.bfloat16) for width in widths)
    return (*rows, widened(max(shape.hidden_size, query_size, shape.intermediate_size)))


@jit(nogil=True)
def run_layers(
    ends: tuple[int, ...],  # addresses of: embedding, result, last norm, cos, sin
    layers: Any,  # [num_layers, 18], the fields of DecoderLayer
    sizes: tuple[int, ...],  # hidden_size, num_heads, qkv_size, intermediate_size
    cache_sizes: tuple[int, ...],  # num_rows, num_kv_heads, num_blocks, block_size, group, head_size
    eps: float,
    slot_mapping: Any,  # [num_rows] int64
    contexts: tuple[Any, ...],  # block table and items, as `attend` takes them; so are the next two
    scoring: tuple[Any, ...],  # scale and soft cap, slopes, window
    partial: tuple[Any, ...],  # what items leave behind for merge
    chunks: Any,
    has_shared_rows: bool,
    prompts: tuple[Any, ...],  # of plan_prompts: prompts, tiles, works
    laid_out: tuple[int, ...],  # addresses of their keys and values, and how many
    known_head_size: Any,
    workspace: tuple[int, ...],  # addresses; hidden holds zeros
    meeting: tuple[int, ...],  # a Meeting's numbers, or ALONE
    spent: Any,  # [num_parts] cycles, added to
    like: Any,
) -> bool:
    """The step. Addresses are those of dense tensors as the package's docstring shapes them. False: another rank did
    not come."""
    residual, out, last_norm, cos, sin = ends
    num_rows, num_kv_heads, _, _, _, head_size = cache_sizes
    hidden_size, num_heads, qkv_size, intermediate_size = sizes
    hidden, normed, qkv, query, attended, gated, scratch = workspace

    now = cycles()
    add_and_norm(hidden, residual, layers[0, 0], normed, num_rows, hidden_size, eps, like)
    spend(spent, NORMS, now)
    for number in range(len(layers)):
        _, post_norm, q_norm, k_norm, k_cache, v_cache = layers[number, :6]
        values, biases, levels = layers[number, 6:10], layers[number, 10:14], layers[number, 14:]
        w_qkv, w_o, w_gate_up, w_down = [(values[i], levels[i]) for i in range(4)]
        qkv_bias, o_bias, gate_up_bias, down_bias = biases
        now = cycles()
        multiply(normed, w_qkv, qkv_bias, qkv, (num_rows, hidden_size, qkv_size), scratch, like)
        now = spend(spent, PRODUCTS, now)
        norms, caches = (q_norm, k_norm), (k_cache, v_cache)
        rotate_and_keep(qkv, query, (cos, sin), slot_mapping, norms, eps, caches, cache_sizes, num_heads, like)
        now = spend(spent, ROTATION, now)
        attention = (query, k_cache, v_cache, attended)
        attend_with_amx(*attention, cache_sizes, known_head_size, *contexts, *scoring, *partial, like)
        if has_shared_rows:
            merge(contexts[1], chunks, *partial, num_heads // num_kv_heads, attended, num_rows, like)
        if len(prompts[2]) > 0:
            about = (cache_sizes, known_head_size, prompts[0])
            lay_out(caches, *about, contexts[0], prompts[1], laid_out)
            attend_prompts(query, attended, *about, prompts[2], laid_out, scoring[0][0], scoring[2])
        spend(spent, ATTENTION, now)
        sizes_of_o, norm = (num_rows, num_heads * head_size, hidden_size), (residual, post_norm, normed)
        if not multiply_and_norm(attended, w_o, o_bias, hidden, sizes_of_o, scratch, norm, eps, meeting, spent, like):
            return False
        now = cycles()
        sizes_of_gate = (num_rows, hidden_size, intermediate_size)
        multiply_and_gate(normed, w_gate_up, gate_up_bias, gated, sizes_of_gate, scratch, like)
        spend(spent, PRODUCTS, now)
        sizes_of_down = (num_rows, intermediate_size, hidden_size)
        norm = (residual, last_norm, out)
        if number + 1 < len(layers):
            norm = (residual, layers[number + 1, 0], normed)
        if not multiply_and_norm(
            gated, w_down, down_bias, hidden, sizes_of_down, scratch, norm, eps, meeting, spent, like
        ):
            return False
    return True


@jit
def multiply_and_norm(
    rows: int,  # as `multiply` takes them
    weight: tuple[int, int],
    bias: int,
    hidden: int,  # [num_rows, out_features] written: the sum
    sizes: tuple[int, ...],  # num_rows, in_features of this rank, out_features
    scratch: int,
    norm: tuple[int, ...],  # residual, weight, and what is written
    eps: float,
    meeting: tuple[int, ...],
    spent: Any,
    like: Any,
) -> bool:
    """residual += rows . weight + bias, summed over the ranks; out = norm(residual). False: another rank did not come.

    Of many rows each rank sums and norms some and then they hand each other what they have. So a rank's residual is
    right for its own rows only, in every layer the same.
    """
    num_rows, in_features, out_features = sizes
    residual, norm_weight, out = norm
    rank, size, slots, slot_bytes, _, count_at, _, _ = meeting
    now = cycles()
    if size == 1:
        multiply(rows, weight, bias, hidden, sizes, scratch, like)
        now = spend(spent, PRODUCTS, now)
        add_and_norm(hidden, residual, norm_weight, out, num_rows, out_features, eps, like)
        spend(spent, NORMS, now)
        return True
    count, row_bytes = array_at(count_at, (1,), INT64), out_features * BYTES
    rows_at_once = slot_bytes // row_bytes // SLOT_ROWS * SLOT_ROWS
    is_shared = num_rows >= size * ROWS_FOR_EACH_RANK
    for first in range(0, num_rows, rows_at_once):
        some, at = min(rows_at_once, num_rows - first), first * row_bytes
        count[0] += 1
        parts = slots + (count[0] & 1) * size * slot_bytes
        source, own = rows + first * in_features * BYTES, parts + rank * slot_bytes
        multiply(source, weight, bias, own, (some, in_features, out_features), scratch, like)
        now = spend(spent, PRODUCTS, now)
        places = (hidden + at, residual + at, norm_weight, out + at)
        if not sum_and_norm(parts, places, some, out_features, is_shared, eps, meeting, spent, like):
            return False
        now = cycles()
    return True


@jit
def sum_and_norm(
    parts: int,  # every rank's part of the rows, this rank's is written
    places: tuple[int, ...],  # hidden, residual, weight, out: of these rows
    num_rows: int,
    size: int,
    is_shared: bool,  # each rank takes some of the rows, else every rank all of them
    eps: float,
    meeting: tuple[int, ...],
    spent: Any,
    like: Any,
) -> bool:
    """hidden = the sum of the parts, residual += hidden, out = norm(residual). False: another rank did not come."""
    hidden, residual, weight, out = places
    rank, num_ranks, slots, slot_bytes, _, count_at, _, _ = meeting
    count, row_bytes, now = array_at(count_at, (1,), INT64), size * BYTES, cycles()
    if not meet(meeting, count[0]):
        return False
    start, end = (num_rows * rank // num_ranks, num_rows * (rank + 1) // num_ranks) if is_shared else (0, num_rows)
    at, target, finished = start * row_bytes, out + start * row_bytes, slots
    add_up(parts + at, num_ranks, slot_bytes, hidden + at, (end - start) * size, like)
    now = spend(spent, SUMS, now)
    if is_shared:  # into a slot of the next set
        count[0] += 1
        finished = slots + (count[0] & 1) * num_ranks * slot_bytes
        target = finished + rank * slot_bytes
    add_and_norm(hidden + at, residual + at, weight, target, end - start, size, eps, like)
    now = spend(spent, NORMS, now)
    if is_shared:
        if not meet(meeting, count[0]):
            return False
        for other in range(num_ranks):
            start, end = num_rows * other // num_ranks, num_rows * (other + 1) // num_ranks
            copy(finished + other * slot_bytes, out + start * row_bytes, (end - start) * size, like)
        spend(spent, SUMS, now)
    return True


@jit
def copy(source: int, target: int, num_values: int, like: Any) -> None:
    values, copies = array_at(source, (num_values,), like), array_at(target, (num_values,), like)
    for i in range(num_values):
        copies[i] = values[i]


@jit(inline="always")
def spend(spent: Any, part: int, since: int) -> int:
    """The time is booked on the part. Returns now."""
    now = cycles()
    spent[part] += now - since
    return now


@jit(inline="always")
def add_and_norm(
    hidden: int, residual: int, weight: int, out: int, num_rows: int, size: int, eps: float, like: Any
) -> None:
    """residual += hidden; out = norm(residual)"""
    has_residual = num_rows > 0  # a literal True would be a type of its own, and the kernels compiled once more
    if num_rows < ROWS_FOR_THREADS:
        for row in range(num_rows):
            norm_row(row, (hidden, residual, residual, out, weight), num_rows, size, has_residual, eps, 0.0, like)
    else:
        norm_rows(hidden, residual, residual, out, weight, num_rows, size, has_residual, eps, 0.0, like)


@jit(inline="always")
def rotate_and_keep(
    qkv: int,
    query: int,
    angles: tuple[int, ...],
    slot_mapping: Any,
    norms: tuple[int, ...],
    eps: float,
    caches: tuple[int, ...],
    cache_sizes: tuple[int, ...],
    num_heads: int,
    like: Any,
) -> None:
    """rms_norm of the heads where the model has it, rotary_embedding, reshape_and_cache."""
    if cache_sizes[0] < ROWS_FOR_THREADS:
        for row in range(cache_sizes[0]):
            rotate_row(row, qkv, query, angles, slot_mapping, norms, eps, caches, cache_sizes, num_heads, like)
    else:
        rotate_rows(qkv, query, angles, slot_mapping, norms, eps, caches, cache_sizes, num_heads, like)


@jit(parallel=True)
def rotate_rows(
    qkv: int,
    query: int,
    angles: tuple[int, ...],
    slot_mapping: Any,
    norms: tuple[int, ...],
    eps: float,
    caches: tuple[int, ...],
    cache_sizes: tuple[int, ...],
    num_heads: int,
    like: Any,
) -> None:
    """Every row by one of the threads."""
    for row in prange(cache_sizes[0]):
        rotate_row(np.int64(row), qkv, query, angles, slot_mapping, norms, eps, caches, cache_sizes, num_heads, like)


@jit
def rotate_row(
    row: int,
    qkv: int,  # [num_rows, num_heads + 2 * num_kv_heads, head_size] changed: heads are normed in place
    query: int,  # [num_rows, num_heads, head_size] written: rotated
    angles: tuple[int, ...],  # cos and sin: [num_rows, head_size] fp32
    slot_mapping: Any,  # [num_rows]
    norms: tuple[int, ...],  # of q and k: [head_size], or 0
    eps: float,
    caches: tuple[int, ...],  # of k and v, written: rotated keys, values
    cache_sizes: tuple[int, ...],
    num_heads: int,
    like: Any,
) -> None:
    """One token's query heads into `query`, its keys and values into their slot."""
    _, num_kv_heads, num_blocks, block_size, _, head_size = cache_sizes
    head_bytes, slot = head_size * BYTES, slot_mapping[row]
    cos, sin = angles[0] + row * head_size * 4, angles[1] + row * head_size * 4
    source = qkv + row * (num_heads + 2 * num_kv_heads) * head_bytes
    for head in range(num_heads):
        target = query + (row * num_heads + head) * head_bytes
        rotate_head(source + head * head_bytes, target, cos, sin, norms[0], eps, head_size, like)
    if slot < 0:
        return
    for head in range(num_kv_heads):
        place = (head * num_blocks * block_size + slot) * head_bytes
        key = source + (num_heads + head) * head_bytes
        rotate_head(key, caches[0] + place, cos, sin, norms[1], eps, head_size, like)
        value = array_at(key + num_kv_heads * head_bytes, (head_size,), like)
        kept = array_at(caches[1] + place, (head_size,), like)
        for i in range(head_size):
            kept[i] = value[i]


@jit(in_order=True)
def rotate_head(source: int, target: int, cos: int, sin: int, norm: int, eps: float, head_size: int, like: Any) -> None:
    """target = the rotated source, normed where `norm` is not 0; all [head_size]."""
    values, rotated = array_at(source, (head_size,), like), array_at(target, (head_size,), like)
    cosines, sines = array_at(cos, (head_size,), FLOAT32), array_at(sin, (head_size,), FLOAT32)
    half = head_size // 2
    if norm != 0:
        weights = array_at(norm, (head_size,), like)
        scale = np.float32(1) / np.sqrt(sum_of_squares(values) / np.float32(head_size) + np.float32(eps))
        for i in range(head_size):
            values[i] = narrow(widen(values[i]) * scale * widen(weights[i]), like)
    for i in range(half):
        a, b = widen(values[i]), widen(values[half + i])
        rotated[i] = narrow(a * cosines[i] + b * sines[i], like)
        rotated[half + i] = narrow(b * cosines[half + i] + a * sines[half + i], like)
