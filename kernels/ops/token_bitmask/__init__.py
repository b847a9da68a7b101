"""Grammar mask: the logits of tokens that a bitmask refuses become -inf.

    logits[row, t] = -inf   where bit t % 32 of bitmask[row, t // 32] is 0

Everything else keeps its bits, NaN too. Bits behind the vocabulary mean nothing. The mask of allowed_token_ids and
banned ids is of the same kind, so a second call serves them.
Called by worker/gpu_sampler.py for logits on a GPU; on a CPU minivllm/sample does the same.
Twin in vLLM: apply_grammar_bitmask in v1/structured_output/utils.py, xgrammar's apply_token_bitmask_inplace.
"""

from types import ModuleType

import torch

from minivllm.kernels.dispatch import choose
from minivllm.kernels.token_bitmask import reference

__all__ = ["token_bitmask"]


def token_bitmask(
    logits: torch.Tensor,  # [num_reqs, vocab_size] fp32
    bitmask: torch.Tensor,  # [num_reqs, ceil(vocab_size / 32)] int32
    *,
    impl: str = "auto",
) -> None:
    """Changes the logits in place; rows may lie apart, the values of one row lie side by side.

    Raises ValueError naming both sides where shapes, dtypes or strides do not fit.
    """
    if logits.dim() != 2 or logits.dtype not in (torch.float32, torch.float64) or logits.stride(1) != 1:
        raise ValueError(
            f"logits: expected [num_reqs, vocab_size] float32 with values side by side, got {list(logits.shape)} "
            f"{logits.dtype} with strides {logits.stride()}"
        )
    num_reqs, vocab_size = logits.shape
    expected = (num_reqs, -(-vocab_size // 32))
    if bitmask.shape != expected or bitmask.dtype != torch.int32:
        raise ValueError(
            f"bitmask: expected {list(expected)} int32 for logits {list(logits.shape)}, got {list(bitmask.shape)} "
            f"{bitmask.dtype}"
        )
    _implementation(impl, logits).token_bitmask(logits, bitmask)


def _implementation(impl: str, x: torch.Tensor) -> ModuleType:  # [...]
    if choose(impl, x) == "triton":
        from minivllm.kernels.token_bitmask import kernel  # only here: triton is not everywhere

        return kernel
    return reference  # the CPU's fast path is minivllm/sample, which works on numpy rows
