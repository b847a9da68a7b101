"""From one row of logits to the tokens that may be drawn and their weights, and from weights to one token.

The vocabulary is never sorted. top_k, top_p and min_p each keep a prefix of the tokens ordered by (logit descending,
id ascending), so it is enough to find a *bound* below which nothing can be kept, to collect the few tokens above it
in one pass, and to be exact among those:
    min_p   the bound is the maximum logit + temperature * log(min_p)
    top_k   the k-th largest of the maxima of disjoint groups: k tokens are at least that large
    top_p   the tokens whose probability is below (1 - top_p) / vocab_size weigh less than 1 - top_p together
Ties: all tokens equal to the k-th are kept by top_k; top_p keeps the smallest set, lower ids first.

One row at a time, on purpose: a row's result cannot depend on its batch, bit for bit, and a row stays in the CPU's
cache through all passes (32 rows of 49,152 in one tensor do not).

It does NOT know requests, seeds or the steps before the temperature. Called by sample/sampler.py, sample/logprobs.py.
Twin in vLLM: v1/sample/ops/topk_topp_sampler.py, v1/sample/logits_processor/builtin.py (min_p).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

LogitsRow = npt.NDArray[np.float32]  # [vocab_size]
TokenIds = npt.NDArray[np.int64]  # [num_candidates]
Weights = npt.NDArray[np.floating]  # [num_candidates] or [vocab_size], not normalised

_BLOCK_TOKENS = 256  # the inverse CDF first finds a block, then the token in it
_SMALL_SORT = 512  # from here on sorting (logit, id) packed into integers beats a stable argsort
_LOWEST = float(np.finfo(np.float32).min)  # a bound: excludes -inf only


def kth_largest_bound(row: LogitsRow, k: int) -> float:
    """A number that at least k logits reach, and few more than k: for 1 <= k <= vocab_size.

    Token i belongs to group i % num_groups. Taking 4k groups or more makes k of them hold about 1.15 k tokens.
    """
    num_groups = max(4 * k, 2048)
    depth = len(row) // num_groups
    if depth < 4:  # a small vocabulary or a large k: select among all tokens, still without sorting
        return float(np.partition(row, len(row) - k)[len(row) - k])
    maxima = row[: depth * num_groups].reshape(depth, num_groups).max(axis=0)
    return float(np.partition(maxima, num_groups - k)[num_groups - k])


def dense_weights(row: LogitsRow, row_max: float, temperature: float) -> LogitsRow:
    """exp((logit - max) / temperature) for the whole vocabulary: fp32, largest 1, never overflows."""
    scaled = torch.sub(torch.from_numpy(row), row_max)  # [vocab_size]
    if temperature != 1.0:
        scaled *= 1.0 / temperature
    weights: LogitsRow = scaled.exp_().numpy()  # numpy's exp takes 2-3 times as long without AVX512
    return weights


def by_likelihood(row: LogitsRow, ids: TokenIds) -> TokenIds:
    """`ids` (ascending) ordered by (logit descending, id ascending).  # [num_candidates]"""
    if len(ids) <= _SMALL_SORT:
        return ids[(-row[ids]).argsort(kind="stable")]
    bits = (row[ids] + np.float32(0.0)).view(np.int32)  # + 0: -0.0 equals 0.0
    ordered = np.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # integers in the order of the floats
    keys: TokenIds = ids - (ordered.astype(np.int64) << 32)
    keys.sort()
    return keys & 0xFFFFFFFF


def restrict(
    row: LogitsRow, row_max: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[TokenIds | None, Weights]:
    """The final distribution of one row: (ids, most likely first; weights), or (None, weights of all tokens).

    row_max is the row's maximum and must be finite. top_k 0, top_p 1 and min_p 0 mean off. min_p is applied first,
    then top_k, then top_p (vLLM's order; transformers applies min_p last).
    """
    top_k = top_k if top_k < len(row) else 0
    total: float | None = None  # of everything that top_p chooses from
    if top_k or min_p > 0.0:
        ids = np.flatnonzero(row >= np.float32(_bound(row, row_max, temperature, top_k, min_p)))
    else:
        dense = dense_weights(row, row_max, temperature)
        if top_p >= 1.0:
            return None, dense
        total = float(dense.sum(dtype=np.float64))
        ids = _nucleus_candidates(dense, total, top_p)

    ids = by_likelihood(row, ids)
    values = row[ids]  # [num_candidates]
    weights = np.exp((values.astype(np.float64) - row_max) / temperature)  # [num_candidates]
    num_kept = len(ids)
    if min_p > 0.0:
        num_kept = int(np.count_nonzero(weights >= min_p))
    if 0 < top_k < num_kept:
        num_kept = min(num_kept, int(np.count_nonzero(values >= values[top_k - 1])))
    if top_p < 1.0:  # a token stays while those before it weigh less than the share
        mass = weights[:num_kept].cumsum()
        share = top_p * (float(mass[-1]) if total is None else total)
        num_kept = min(num_kept, 1 + int(mass.searchsorted(share, side="left")))
    return ids[:num_kept], weights[:num_kept]


def _bound(row: LogitsRow, row_max: float, temperature: float, top_k: int, min_p: float) -> float:
    """No token whose logit is below this passes min_p and top_k."""
    bound = kth_largest_bound(row, top_k) if top_k else -math.inf
    if min_p > 0.0:
        drop = -temperature * math.log(min_p)
        bound = max(bound, row_max - drop - 1e-5 * (abs(row_max) + drop))  # a little low; `restrict` is exact
    return max(bound, _LOWEST)


def _nucleus_candidates(weights: LogitsRow, total: float, top_p: float) -> TokenIds:
    """Ids that contain every token top_p can keep.

    The tokens left out are the lightest; what is kept is enough as soon as it weighs top_p * total. That is certain
    for (1 - top_p) / vocab_size; a higher cut is tried first because it nearly always does, with fewer tokens.
    """
    for share in (1024, len(weights)):
        lightest = 0.999 * (1.0 - top_p) * total / share  # a little low: total is rounded
        ids = np.flatnonzero(weights >= np.float32(lightest))
        if share >= len(weights) or weights[ids].sum(dtype=np.float64) >= top_p * total:
            break
    return ids


def inverse_cdf(weights: Weights, u: float) -> int:
    """The index that the uniform number u in [0, 1) selects: index i with probability weights[i] / sum(weights).

    weights: finite, >= 0, with a positive sum. Sums are float64. Never an index of weight 0, never out of range.
    """
    start = 0
    if len(weights) > 4 * _BLOCK_TOKENS:
        block_weights = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK_TOKENS), dtype=np.float64)
        block, u = _locate(block_weights, u)
        start = block * _BLOCK_TOKENS
        weights = weights[start : start + _BLOCK_TOKENS]
    return start + _locate(weights, u)[0]


def _locate(weights: Weights, u: float) -> tuple[int, float]:
    """(index, what is left of u): given the index, the rest is again uniform on [0, 1) and serves the next level."""
    cdf = weights.cumsum(dtype=np.float64)
    total = float(cdf[-1])
    target = min(u * total, math.nextafter(total, 0.0))  # u * total may round up to total
    index = int(cdf.searchsorted(target, side="right"))  # cdf[index - 1] <= target < cdf[index]
    below = float(cdf[index - 1]) if index else 0.0
    return index, (target - below) / (float(cdf[index]) - below)
