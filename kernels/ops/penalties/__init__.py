"""Penalties for tokens that a request has seen, and logit_bias: a few logits per row change, the others are not read.

    penalties   x > 0: x / repetition, else x * repetition;  then - frequency * count - presence * (count > 0)
    logit_bias  x + bias

The seen ids are those of prompt and output (of the output only where repetition is 1); `count` is how often the output
has the id. Computed in float64 and rounded once, as minivllm/sample/penalties.py does, so both give the same bits.
A logit that is not finite stays as it is: masked stays masked, NaN stays visible. A finite one stays finite.

Ids outside the vocabulary are ignored. A row names each id at most once. Lists are padded, like a block table: what
stands behind the first `num_seen` entries may be anything.
Called by worker/gpu_sampler.py for logits on a GPU; on a CPU minivllm/sample does the same.
Twin in vLLM: v1/sample/ops/penalties.py and apply_penalties in csrc; logit_bias: v1/sample/logits_processor.
"""

from types import ModuleType

import torch

from minivllm.kernels.dispatch import choose
from minivllm.kernels.penalties import reference

__all__ = ["logit_bias", "penalties"]


def penalties(
    logits: torch.Tensor,  # [num_reqs, vocab_size] fp32
    seen_token_ids: torch.Tensor,  # [num_reqs, max_seen] int32
    output_counts: torch.Tensor,  # [num_reqs, max_seen] int32
    num_seen: torch.Tensor,  # [num_reqs] int32, 0: a row without penalties
    repetition: torch.Tensor,  # [num_reqs] float64, > 0
    frequency: torch.Tensor,  # [num_reqs] float64
    presence: torch.Tensor,  # [num_reqs] float64
    *,
    impl: str = "auto",
) -> None:
    """Changes the logits in place. Raises ValueError naming both sides where shapes, dtypes or strides do not fit."""
    _check_lists(logits, "seen_token_ids", seen_token_ids, "output_counts", output_counts, torch.int32)
    for name, tensor, dtype in (
        ("num_seen", num_seen, torch.int32),
        ("repetition", repetition, torch.float64),
        ("frequency", frequency, torch.float64),
        ("presence", presence, torch.float64),
    ):
        _check_row_values(logits, name, tensor, dtype)
    _implementation(impl, logits).penalties(
        logits, seen_token_ids, output_counts, num_seen, repetition, frequency, presence
    )


def logit_bias(
    logits: torch.Tensor,  # [num_reqs, vocab_size] fp32
    token_ids: torch.Tensor,  # [num_reqs, max_ids] int32
    bias: torch.Tensor,  # [num_reqs, max_ids] fp32
    num_ids: torch.Tensor,  # [num_reqs] int32, 0: a row without a bias
    *,
    impl: str = "auto",
) -> None:
    """Changes the logits in place, before the penalties. Raises ValueError like `penalties`."""
    _check_lists(logits, "token_ids", token_ids, "bias", bias, torch.float32)
    _check_row_values(logits, "num_ids", num_ids, torch.int32)
    _implementation(impl, logits).logit_bias(logits, token_ids, bias, num_ids)


def _check_lists(
    logits: torch.Tensor,  # [num_reqs, vocab_size]
    ids_name: str,
    ids: torch.Tensor,  # [num_reqs, max_ids]
    values_name: str,
    values: torch.Tensor,  # [num_reqs, max_ids]
    dtype: torch.dtype,
) -> None:
    if logits.dim() != 2 or logits.dtype not in (torch.float32, torch.float64) or logits.stride(1) != 1:
        raise ValueError(
            f"logits: expected [num_reqs, vocab_size] float32 with values side by side, got {list(logits.shape)} "
            f"{logits.dtype} with strides {logits.stride()}"
        )
    if ids.dim() != 2 or ids.shape[0] != logits.shape[0] or ids.dtype != torch.int32:
        raise ValueError(f"{ids_name}: expected [{logits.shape[0]}, any] int32, got {list(ids.shape)} {ids.dtype}")
    if values.shape != ids.shape or values.dtype != dtype:
        raise ValueError(
            f"{values_name}: expected {list(ids.shape)} {dtype} as {ids_name}, got {list(values.shape)} {values.dtype}"
        )
    if not (ids.is_contiguous() and values.is_contiguous()):
        raise ValueError(f"{ids_name}, {values_name}: expected contiguous rows, got {ids.stride()}, {values.stride()}")


def _check_row_values(
    logits: torch.Tensor,  # [num_reqs, vocab_size]
    name: str,
    tensor: torch.Tensor,  # [num_reqs]
    dtype: torch.dtype,
) -> None:
    if tensor.shape != logits.shape[:1] or tensor.dtype != dtype:
        raise ValueError(f"{name}: expected [{logits.shape[0]}] {dtype}, got {list(tensor.shape)} {tensor.dtype}")


def _implementation(impl: str, x: torch.Tensor) -> ModuleType:  # [...]
    if choose(impl, x) == "triton":
        from minivllm.kernels.penalties import kernel  # only here: triton is not everywhere

        return kernel
    return reference  # the CPU's fast path is minivllm/sample, which works on numpy rows
