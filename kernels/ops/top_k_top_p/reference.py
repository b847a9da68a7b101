"""What top_k_top_p_sample means: sort, cut, add up, look up. Called through `impl="reference"` and by tests.

Twin in vLLM: apply_top_k_top_p_pytorch in v1/sample/ops/topk_topp_sampler.py.
"""

import math

import torch


def sample(
    logits: torch.Tensor,  # [num_reqs, vocab_size]
    temperature: torch.Tensor,  # [num_reqs]
    top_k: torch.Tensor,  # [num_reqs]
    top_p: torch.Tensor,  # [num_reqs]
    min_p: torch.Tensor,  # [num_reqs]
    uniform: torch.Tensor,  # [num_reqs]
) -> tuple[torch.Tensor, torch.Tensor]:  # token ids and how many were kept, both [num_reqs] int64
    """See the package's docstring."""
    settings = zip(*(values.tolist() for values in (temperature, top_k, top_p, min_p, uniform)), strict=True)
    drawn = [_sample(row, *values) for row, values in zip(logits, settings, strict=True)]
    pairs = torch.tensor(drawn, dtype=torch.int64, device=logits.device).reshape(-1, 2)  # [num_reqs, 2]
    return pairs[:, 0].contiguous(), pairs[:, 1].contiguous()


def _sample(
    row: torch.Tensor,  # [vocab_size]
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    uniform: float,
) -> tuple[int, int]:
    """(token id, how many were kept) of one row; all sums in float64."""
    largest = float(row.max())
    if not math.isfinite(largest):
        return -1, 0
    if temperature == 0.0:
        return int((row == largest).nonzero()[0]), 1
    top_k = top_k if top_k < len(row) else 0
    values, ids = row.double(), torch.arange(len(row), device=row.device)
    num_kept = len(row)
    if top_k or min_p > 0.0 or top_p < 1.0:
        values, ids = values.sort(descending=True, stable=True)  # equal ones stay in the order of their ids
        num_kept = int((values > -torch.inf).sum())
    weights = ((values - largest) / temperature).exp()  # [vocab_size]
    if min_p > 0.0:
        num_kept = min(num_kept, int((weights >= min_p).sum()))
    if 0 < top_k < num_kept:
        num_kept = min(num_kept, int((values >= values[top_k - 1]).sum()))
    if top_p < 1.0:
        mass = weights[:num_kept].cumsum(0)
        num_kept = min(num_kept, 1 + int(torch.searchsorted(mass, top_p * mass[-1])))
    mass = weights[:num_kept].cumsum(0)  # [num_kept]
    target = min(uniform * float(mass[-1]), math.nextafter(float(mass[-1]), 0.0))
    return int(ids[int(torch.searchsorted(mass, target, right=True))]), num_kept
