"""What penalties and logit_bias mean, one row after the other. Called through `impl="reference"` and by tests.

Twin in vLLM: model_executor/layers/utils.py (apply_penalties).
"""

import torch


def penalties(
    logits: torch.Tensor,  # [num_reqs, vocab_size]
    seen_token_ids: torch.Tensor,  # [num_reqs, max_seen] int32
    output_counts: torch.Tensor,  # [num_reqs, max_seen] int32
    num_seen: torch.Tensor,  # [num_reqs] int32
    repetition: torch.Tensor,  # [num_reqs] float64
    frequency: torch.Tensor,  # [num_reqs] float64
    presence: torch.Tensor,  # [num_reqs] float64
) -> None:
    """See the package's docstring."""
    largest = torch.finfo(logits.dtype).max
    for row, size in enumerate(num_seen.tolist()):
        ids, counts = _within(seen_token_ids[row, :size], output_counts[row, :size], logits.shape[1])
        before = logits[row, ids].double()  # [num_kept]
        after = torch.where(before > 0, before / repetition[row], before * repetition[row])
        after = after - (frequency[row] * counts + presence[row] * (counts > 0))
        after = after.clamp(-largest, largest)
        logits[row, ids] = torch.where(before.isfinite(), after, before).to(logits.dtype)


def logit_bias(
    logits: torch.Tensor,  # [num_reqs, vocab_size]
    token_ids: torch.Tensor,  # [num_reqs, max_ids] int32
    bias: torch.Tensor,  # [num_reqs, max_ids] fp32
    num_ids: torch.Tensor,  # [num_reqs] int32
) -> None:
    """See the package's docstring."""
    for row, size in enumerate(num_ids.tolist()):
        ids, values = _within(token_ids[row, :size], bias[row, :size], logits.shape[1])
        logits[row, ids] += values


def _within(
    ids: torch.Tensor,  # [num_ids] int32
    values: torch.Tensor,  # [num_ids]
    vocab_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # [num_kept] int64, [num_kept]
    """The ids that have a logit, and their values."""
    kept = (ids >= 0) & (ids < vocab_size)
    return ids[kept].long(), values[kept]
