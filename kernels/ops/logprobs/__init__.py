"""Log-probability and rank of the chosen token, and the most likely tokens beside it.

    logprob(t) = logits[t] - log(sum over all v of exp(logits[v]))        natural logarithm
    rank       = how many logits are >= the token's own (1 = best; equal ones make it larger)
    top        = the num_top largest logits, best first, equal ones by id

A token id outside the vocabulary has logprob -inf and the last rank. A row with NaN or +inf, or with nothing but -inf,
has no probabilities: its logprobs are NaN, its rank is the last, its top ids are -1.
Called by worker/gpu_sampler.py for logits on a GPU; on a CPU minivllm/sample does the same.
Twin in vLLM: Sampler.gather_logprobs in v1/sample/sampler.py, v1/worker/gpu/sample/logprob.py.
"""

from types import ModuleType
from typing import NamedTuple

import torch

from minivllm.kernels.dispatch import choose
from minivllm.kernels.logprobs import reference

__all__ = ["MAX_TOP", "Logprobs", "logprobs"]

MAX_TOP = 20  # what OpenAI's API allows


class Logprobs(NamedTuple):
    """One row per request; logprobs in the logits' dtype."""

    logprobs: torch.Tensor  # [num_reqs]
    ranks: torch.Tensor  # [num_reqs] int64
    top_token_ids: torch.Tensor  # [num_reqs, num_top] int64
    top_logprobs: torch.Tensor  # [num_reqs, num_top]


def logprobs(
    logits: torch.Tensor,  # [num_reqs, vocab_size] fp32
    token_ids: torch.Tensor,  # [num_reqs] int64
    num_top: int,
    *,
    impl: str = "auto",
) -> Logprobs:
    """Changes no argument; num_top is at most MAX_TOP and vocab_size.

    Raises ValueError naming both sides where shapes, dtypes, strides or num_top do not fit.
    """
    if logits.dim() != 2 or logits.dtype not in (torch.float32, torch.float64) or logits.stride(1) != 1:
        raise ValueError(
            f"logits: expected [num_reqs, vocab_size] float32 with values side by side, got {list(logits.shape)} "
            f"{logits.dtype} with strides {logits.stride()}"
        )
    num_reqs, vocab_size = logits.shape
    if not vocab_size:
        raise ValueError(f"logits: expected at least one token, got {list(logits.shape)}")
    if token_ids.shape != (num_reqs,) or token_ids.dtype != torch.int64:
        raise ValueError(f"token_ids: expected [{num_reqs}] int64, got {list(token_ids.shape)} {token_ids.dtype}")
    if not 0 <= num_top <= min(MAX_TOP, vocab_size):
        raise ValueError(f"num_top: expected 0 to {min(MAX_TOP, vocab_size)}, got {num_top}")
    return Logprobs(*_implementation(impl, logits).logprobs(logits, token_ids, num_top))


def _implementation(impl: str, x: torch.Tensor) -> ModuleType:  # [...]
    if choose(impl, x) == "triton":
        from minivllm.kernels.logprobs import kernel  # only here: triton is not everywhere

        return kernel
    return reference  # the CPU's fast path is minivllm/sample, which works on numpy rows
