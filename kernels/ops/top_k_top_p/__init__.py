"""Restricts each row's distribution by min_p, top_k and top_p, and draws one token from what is left.

    weight(t) = exp((logits[t] - max) / temperature)      order: logit descending, equal ones by id
    min_p     keeps weights >= min_p
    top_k     of those the k first, and all that equal the k-th              (0, or vocab_size and more: off)
    top_p     of those each token before which less than top_p of their weight lies; at least one    (1: off)
    draw      the token in which uniform * (weight kept) falls, walking in that order; by id where nothing restricts

Temperature 0 takes the largest logit, equal ones by id, whatever the other settings are. A row's token depends on its
own logits, settings and uniform number alone, so a request draws the same alone and in a batch. The uniform numbers
are those of minivllm/sample/random.py, one for (seed, position): CPU and GPU then draw the same token up to rounding.

A row with NaN or +inf, or with nothing but -inf, has no distribution: its token is -1 and it keeps nothing.
Called by worker/gpu_sampler.py for logits on a GPU; on a CPU minivllm/sample does the same.
Twin in vLLM: v1/sample/ops/topk_topp_sampler.py and topk_topp_triton.py.
"""

from types import ModuleType
from typing import NamedTuple

import torch

from minivllm.kernels.dispatch import choose
from minivllm.kernels.top_k_top_p import reference

__all__ = ["Sampled", "top_k_top_p_sample"]


class Sampled(NamedTuple):
    """One entry per request. The tokens that could be drawn are the first num_kept in the order above."""

    token_ids: torch.Tensor  # [num_reqs] int64
    num_kept: torch.Tensor  # [num_reqs] int64, vocab_size where nothing restricts


def top_k_top_p_sample(
    logits: torch.Tensor,  # [num_reqs, vocab_size] fp32
    temperature: torch.Tensor,  # [num_reqs] float64, 0: greedy
    top_k: torch.Tensor,  # [num_reqs] int32
    top_p: torch.Tensor,  # [num_reqs] float64
    min_p: torch.Tensor,  # [num_reqs] float64
    uniform: torch.Tensor,  # [num_reqs] float64 in [0, 1)
    *,
    impl: str = "auto",
) -> Sampled:
    """Changes no argument. Raises ValueError naming both sides where shapes, dtypes or strides do not fit."""
    if logits.dim() != 2 or logits.dtype not in (torch.float32, torch.float64) or logits.stride(1) != 1:
        raise ValueError(
            f"logits: expected [num_reqs, vocab_size] float32 with values side by side, got {list(logits.shape)} "
            f"{logits.dtype} with strides {logits.stride()}"
        )
    if not logits.shape[1]:
        raise ValueError(f"logits: expected at least one token, got {list(logits.shape)}")
    for name, tensor, dtype in (
        ("temperature", temperature, torch.float64),
        ("top_k", top_k, torch.int32),
        ("top_p", top_p, torch.float64),
        ("min_p", min_p, torch.float64),
        ("uniform", uniform, torch.float64),
    ):
        if tensor.shape != logits.shape[:1] or tensor.dtype != dtype:
            raise ValueError(f"{name}: expected [{logits.shape[0]}] {dtype}, got {list(tensor.shape)} {tensor.dtype}")
    return Sampled(*_implementation(impl, logits).sample(logits, temperature, top_k, top_p, min_p, uniform))


def _implementation(impl: str, x: torch.Tensor) -> ModuleType:  # [...]
    if choose(impl, x) == "triton":
        from minivllm.kernels.top_k_top_p import kernel  # only here: triton is not everywhere

        return kernel
    return reference  # the CPU's fast path is minivllm/sample, which works on numpy rows
