"""rotary_embedding in three tensor operations. Called by the package on CPU tensors."""

import torch


def rotate(
    x: torch.Tensor,  # [num_tokens, heads, head_size]
    cos: torch.Tensor,  # [num_tokens, head_size]
    sin: torch.Tensor,  # [num_tokens, head_size]
) -> torch.Tensor:  # [num_tokens, heads, head_size]
    """x * cos + (x turned by half a head) * sin: half the calls, and half the time at one row, of pairing halves."""
    wide = x.to(cos.dtype)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # [num_tokens, 1, head_size]
    return torch.addcmul(wide * cos, wide.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)
