"""What a rotary embedding means, pair by pair, in plain torch. Called through `impl="reference"` and by tests."""

import torch


def rotate(
    x: torch.Tensor,  # [num_tokens, heads, head_size]
    cos: torch.Tensor,  # [num_tokens, head_size]
    sin: torch.Tensor,  # [num_tokens, head_size]
) -> torch.Tensor:  # [num_tokens, heads, head_size]
    """(a, b) -> (a cos t - b sin t, b cos t + a sin t), a in the first half of the head and b in the second."""
    half = x.shape[-1] // 2
    wide = torch.promote_types(x.dtype, cos.dtype)
    a, b = x[..., :half].to(wide), x[..., half:].to(wide)
    c, s = cos[:, None, half:], sin[:, None, half:]  # [num_tokens, 1, half]
    return torch.cat([a * c - b * s, b * c + a * s], dim=-1).to(x.dtype)
