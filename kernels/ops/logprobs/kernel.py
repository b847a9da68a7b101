"""logprobs in Triton: one pass over the vocabulary in pieces, and a merge of the pieces.

    logits[row]  |  piece 0  |  piece 1  |  ...        program (row, piece) of `piece_kernel`, all in registers
                      │            │
                   max, sum of exp(x - max), how many >= own, its num_top largest
                      └─────┬──────┘
                       merge_kernel (row):  sums brought to one maximum, counts added, the largest of the largest

A token is one integer, its *key*: the logit's bits, turned so that integers order as floats do, above the id turned
around. So the largest key is the largest logit, and among equal ones the lowest id; num_top times the largest is taken
out, and nothing is sorted. -0.0 becomes 0.0 first, because the two are equal.

Called by the package on GPU tensors. Twin in vLLM: v1/worker/gpu/sample/logprob.py. Rescaled sums: Milakov and
Gimelshein, "Online normalizer calculation for softmax", arXiv 1805.02867.
"""

import torch
import triton
import triton.language as tl

from minivllm.kernels.build import Build, Workload
from minivllm.kernels.dispatch import warp_size

BLOCK = 4096
NUM_THREADS = 256
TAKEN = tl.constexpr(-(2**63))  # below every key
LOW_BITS = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _keys(logits, tokens):
    """int64, in the order (logit ascending, id descending)."""
    bits = tl.where(logits == 0.0, 0.0, logits).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ LOW_BITS, bits).to(tl.int64)
    return (ordered << 32) | (tokens ^ LOW_BITS).to(tl.int64)


@triton.jit
def _logit_of(key):
    """The logit in a key."""
    ordered = (key >> 32).to(tl.int32)
    return tl.where(ordered < 0, ordered ^ LOW_BITS, ordered).to(tl.float32, bitcast=True)


@triton.jit
def _own_logit(logits_ptr, row_offset, token_ids_ptr, row, vocab_size):
    """Of the chosen token; -inf for an id outside the vocabulary."""
    token = tl.load(token_ids_ptr + row)
    is_token = (token >= 0) & (token < vocab_size)
    return tl.load(logits_ptr + row_offset + token, mask=is_token, other=float("-inf"))


@triton.jit
def piece_kernel(
    logits_ptr,  # [num_reqs, vocab_size]
    token_ids_ptr,  # [num_reqs] int64
    max_ptr,  # [num_reqs, num_pieces], as the next two
    sum_ptr,
    count_ptr,  # int32
    top_keys_ptr,  # [num_reqs, num_pieces, num_top] int64
    logits_stride,  # between rows
    vocab_size,
    num_top: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One piece of one row."""
    row = tl.program_id(0).to(tl.int64)
    piece = row * tl.num_programs(1) + tl.program_id(1)
    tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_token = tokens < vocab_size
    own = _own_logit(logits_ptr, row * logits_stride, token_ids_ptr, row, vocab_size)
    logits = tl.load(logits_ptr + row * logits_stride + tokens, mask=is_token, other=float("-inf"))  # [BLOCK]

    is_broken = (logits != logits) | (logits == float("inf"))
    logits = tl.where(is_broken, float("-inf"), logits)  # maxima of NaN differ from GPU to GPU; the sum remembers it
    largest = tl.max(logits, axis=0)
    safe = tl.where(largest == float("-inf"), 0.0, largest)  # a piece of nothing but -inf: exp(-inf) = 0
    total = tl.sum(tl.exp(logits - safe), axis=0)
    total = tl.where(tl.max(is_broken.to(tl.int32), axis=0) > 0, float("nan"), total)
    tl.store(max_ptr + piece, largest)
    tl.store(sum_ptr + piece, total)
    tl.store(count_ptr + piece, tl.sum(((logits >= own) & is_token).to(tl.int32), axis=0))

    keys = tl.where(is_token, _keys(logits, tokens), TAKEN)  # [BLOCK]
    for place in range(num_top):
        best = tl.max(keys, axis=0)
        tl.store(top_keys_ptr + piece * num_top + place, best)
        keys = tl.where(keys == best, TAKEN, keys)


@triton.jit
def merge_kernel(
    logits_ptr,  # [num_reqs, vocab_size]
    token_ids_ptr,  # [num_reqs] int64
    max_ptr,  # [num_reqs, num_pieces], as the next two
    sum_ptr,
    count_ptr,  # int32
    top_keys_ptr,  # [num_reqs, num_pieces, num_top] int64
    logprobs_ptr,  # [num_reqs]
    ranks_ptr,  # [num_reqs] int64
    top_token_ids_ptr,  # [num_reqs, num_top] int64
    top_logprobs_ptr,  # [num_reqs, num_top]
    logits_stride,  # between rows
    vocab_size,
    num_pieces,
    num_top: tl.constexpr,
    PIECES: tl.constexpr,  # power of two >= num_pieces
    KEYS: tl.constexpr,  # power of two >= num_pieces * num_top
):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    pieces = tl.arange(0, PIECES)
    is_piece = pieces < num_pieces
    maxima = tl.load(max_ptr + row * num_pieces + pieces, mask=is_piece, other=float("-inf"))  # [PIECES]
    sums = tl.load(sum_ptr + row * num_pieces + pieces, mask=is_piece, other=0.0)
    counts = tl.load(count_ptr + row * num_pieces + pieces, mask=is_piece, other=0)
    largest = tl.max(maxima, axis=0)
    safe = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(sums * tl.exp(maxima - safe), axis=0)
    is_broken = (total > 0.0) == 0  # NaN, or nothing but -inf
    log_sum = tl.log(tl.where(is_broken, float("nan"), total))

    own = _own_logit(logits_ptr, row * logits_stride, token_ids_ptr, row, vocab_size)
    tl.store(logprobs_ptr + row, own - safe - log_sum)
    rank = tl.where(is_broken, vocab_size, tl.sum(counts, axis=0))
    tl.store(ranks_ptr + row, rank.to(tl.int64))

    candidates = tl.arange(0, KEYS)
    num_keys = num_pieces * num_top
    keys = tl.load(top_keys_ptr + row * num_keys + candidates, mask=candidates < num_keys, other=TAKEN)  # [KEYS]
    for place in range(num_top):
        best = tl.max(keys, axis=0)
        token = (best & LOW_BITS) ^ LOW_BITS
        tl.store(top_token_ids_ptr + row * num_top + place, tl.where(is_broken, -1, token))
        tl.store(top_logprobs_ptr + row * num_top + place, _logit_of(best) - safe - log_sum)
        keys = tl.where(keys == best, TAKEN, keys)


def logprobs(
    logits: torch.Tensor,  # [num_reqs, vocab_size] fp32
    token_ids: torch.Tensor,  # [num_reqs] int64
    num_top: int,
) -> tuple[torch.Tensor, ...]:  # [num_reqs], [num_reqs] int64, [num_reqs, num_top] int64, [num_reqs, num_top]
    """See the package's docstring."""
    num_reqs, vocab_size = logits.shape
    num_pieces = triton.cdiv(vocab_size, BLOCK)
    token_ids = token_ids.contiguous()
    largest, total, out = (torch.empty(num_reqs, size, device=logits.device) for size in (num_pieces, num_pieces, 1))
    counts = torch.empty(num_reqs, num_pieces, dtype=torch.int32, device=logits.device)
    top_keys, ranks, top_ids = (
        torch.empty(num_reqs, size, dtype=torch.int64, device=logits.device)
        for size in (num_pieces * num_top, 1, num_top)
    )
    top_logprobs = torch.empty(num_reqs, num_top, device=logits.device)
    parts = (largest, total, counts, top_keys)
    if num_reqs:
        warps = {"num_warps": NUM_THREADS // warp_size(logits)}
        piece_kernel[(num_reqs, num_pieces)](
            logits, token_ids, *parts, logits.stride(0), vocab_size, num_top=num_top, BLOCK=BLOCK, **warps
        )
        merge_kernel[(num_reqs,)](
            logits,
            token_ids,
            *parts,
            out,
            ranks,
            top_ids,
            top_logprobs,
            logits.stride(0),
            vocab_size,
            num_pieces,
            num_top=num_top,
            PIECES=triton.next_power_of_2(num_pieces),
            KEYS=triton.next_power_of_2(max(num_pieces * num_top, 1)),
            **warps,
        )
    return out[:, 0], ranks[:, 0], top_ids, top_logprobs


def builds() -> list[Build]:
    """64 rows of Qwen2.5's vocabulary, with the most that may be asked, and with the chosen token only."""
    return [build for num_top in (0, 20) for build in _builds(64, 151936, num_top)]


def _builds(rows: int, vocab_size: int, num_top: int) -> list[Build]:
    pieces = triton.cdiv(vocab_size, BLOCK)
    parts = {"max_ptr": "*fp32", "sum_ptr": "*fp32", "count_ptr": "*i32", "top_keys_ptr": "*i64"}
    inputs = {"logits_ptr": "*fp32", "token_ids_ptr": "*i64", **parts}
    outputs = {"logprobs_ptr": "*fp32", "ranks_ptr": "*i64", "top_token_ids_ptr": "*i64", "top_logprobs_ptr": "*fp32"}
    sizes = dict.fromkeys(("logits_stride", "vocab_size"), "i32")
    part_bytes = pieces * (12 + 8 * num_top)
    return [
        Build(
            operation="logprobs",
            name=f"piece, top {num_top}",
            kernel=piece_kernel,
            types={**inputs, **sizes},
            constants={"num_top": num_top, "BLOCK": BLOCK},
            divisible=frozenset({*inputs, *sizes}),
            num_threads=NUM_THREADS,
            workload=Workload(
                f"{rows} rows of {vocab_size}",
                rows * (4 * vocab_size + part_bytes),
                rows * vocab_size * (5 + 2 * num_top),
                rows * pieces,
                4 * BLOCK,
            ),
        ),
        Build(
            operation="logprobs",
            name=f"merge, top {num_top}",
            kernel=merge_kernel,
            types={**inputs, **outputs, **sizes, "num_pieces": "i32"},
            constants={
                "num_top": num_top,
                "PIECES": triton.next_power_of_2(pieces),
                "KEYS": triton.next_power_of_2(max(pieces * num_top, 1)),
            },
            divisible=frozenset({*inputs, *outputs, *sizes}),
            num_threads=NUM_THREADS,
            workload=Workload(
                f"{rows} rows of {pieces} pieces",
                rows * (part_bytes + 16 + 12 * num_top),
                rows * pieces * (4 + 2 * num_top),
                rows,
                part_bytes,
            ),
            has_wide_loads=False,  # rows of a few dozen values, of any length
        ),
    ]
