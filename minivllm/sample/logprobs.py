"""Log-probabilities of the token at a position and of the most likely ones beside it.

Natural logarithms, from the logits as the model gave them (after the grammar, before everything else). Only the ids
asked for are computed; the row is read three times and never sorted.

It does NOT know text, requests or how the token was chosen. Called by sample/sampler.py and worker/model_runner.py.
Twin in vLLM: Sampler.gather_logprobs in v1/sample/sampler.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from minivllm.outputs import TokenLogprobs
from minivllm.sample.top_k_top_p import LogitsRow, TokenIds, by_likelihood, dense_weights, kth_largest_bound


def host_logits(logits: torch.Tensor) -> npt.NDArray[np.float32]:
    """`logits` [num_rows, vocab_size] as numpy, fp32, in main memory; shares memory where that is possible."""
    return logits.detach().to("cpu", torch.float32).contiguous().numpy()


def top_token_ids(row: LogitsRow, num_tokens: int) -> TokenIds:
    """The ids of the num_tokens largest logits, best first, equal ones by id. At most vocab_size of them."""
    num_tokens = min(num_tokens, len(row))
    if num_tokens == 0:
        return np.empty(0, dtype=np.int64)
    bound = kth_largest_bound(row, num_tokens)
    ids = np.flatnonzero(row >= bound) if bound > -math.inf else np.flatnonzero(row > -math.inf)
    ids = by_likelihood(row, ids)[:num_tokens]
    if len(ids) < num_tokens:  # a grammar left fewer tokens: the rest have probability 0
        ids = np.concatenate([ids, np.flatnonzero(row == -math.inf)[: num_tokens - len(ids)]])
    return ids


def token_logprobs(row: LogitsRow, token_id: int, num_logprobs: int) -> TokenLogprobs:
    """Logprobs of `token_id` and of the `num_logprobs` best tokens of `row` [vocab_size].

    rank = how many logits are >= the token's own (1 = best; ties make it larger), vLLM's rule. An id outside the row
    has logprob -inf and the last rank. A row with NaN or +inf, or with nothing but -inf, gives NaN logprobs.
    """
    row_max = float(row.max())
    if not math.isfinite(row_max):
        return TokenLogprobs([token_id], [math.nan], len(row))
    log_sum = row_max + math.log(float(dense_weights(row, row_max, 1.0).sum(dtype=np.float64)))
    own = float(row[token_id]) if 0 <= token_id < len(row) else -math.inf
    ids = top_token_ids(row, num_logprobs)
    best: list[float] = (row[ids].astype(np.float64) - log_sum).tolist()
    rank = int(np.count_nonzero(row >= np.float32(own)))
    return TokenLogprobs([token_id, *ids.tolist()], [own - log_sum, *best], rank)


def prompt_logprobs(logits: torch.Tensor, next_token_ids: Sequence[int], num_logprobs: int) -> list[TokenLogprobs]:
    """One entry per row of `logits` [num_rows, vocab_size]: the logprobs of the token that follows in the prompt."""
    rows = host_logits(logits)
    return [token_logprobs(row, token_id, num_logprobs) for row, token_id in zip(rows, next_token_ids, strict=True)]
