"""What logprobs means, in plain torch. Called through `impl="reference"` and by tests."""

import torch


def logprobs(
    logits: torch.Tensor,  # [num_reqs, vocab_size]
    token_ids: torch.Tensor,  # [num_reqs] int64
    num_top: int,
) -> tuple[torch.Tensor, ...]:  # [num_reqs], [num_reqs] int64, [num_reqs, num_top] int64, [num_reqs, num_top]
    """See the package's docstring. A stable sort keeps equal logits in the order of their ids."""
    vocab_size = logits.shape[1]
    is_token = (token_ids >= 0) & (token_ids < vocab_size)  # [num_reqs]
    own = logits.gather(1, torch.where(is_token, token_ids, 0)[:, None])  # [num_reqs, 1]
    own = torch.where(is_token[:, None], own, -torch.inf)
    is_broken = ~logits.max(dim=1, keepdim=True).values.isfinite()  # [num_reqs, 1]; the largest of a NaN is NaN
    log_sum = torch.where(is_broken, torch.nan, logits.logsumexp(dim=1, keepdim=True))  # [num_reqs, 1]
    ranks = torch.where(is_broken, vocab_size, (logits >= own).sum(dim=1, keepdim=True))  # [num_reqs, 1]
    best, ids = logits.sort(dim=1, descending=True, stable=True)  # [num_reqs, vocab_size]
    top_ids = torch.where(is_broken, -1, ids[:, :num_top])
    return (own - log_sum)[:, 0], ranks[:, 0], top_ids, best[:, :num_top] - log_sum
