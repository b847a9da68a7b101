"""What token_bitmask means, in plain torch. Called through `impl="reference"` and by tests."""

import torch


def token_bitmask(
    logits: torch.Tensor,  # [num_reqs, vocab_size]
    bitmask: torch.Tensor,  # [num_reqs, ceil(vocab_size / 32)] int32
) -> None:
    """See the package's docstring."""
    shifts = torch.arange(32, dtype=torch.int32, device=bitmask.device)
    bits = (bitmask[:, :, None] >> shifts) & 1  # [num_reqs, num_words, 32]
    refused = bits.flatten(1)[:, : logits.shape[1]] == 0  # [num_reqs, vocab_size]
    logits.masked_fill_(refused, -torch.inf)
