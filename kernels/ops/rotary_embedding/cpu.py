"""rotary_embedding in one pass. Called by the package on CPU tensors. Twin in vLLM: csrc/cpu/pos_encoding.cpp."""

from typing import Any

import torch

from minivllm.kernels.jit import array_at, jit, like, narrow, prange, widen


def rotate(
    x: torch.Tensor,  # [num_tokens, heads, head_size]
    cos: torch.Tensor,  # [num_tokens, head_size]
    sin: torch.Tensor,  # [num_tokens, head_size]
) -> torch.Tensor:  # [num_tokens, heads, head_size]
    """See the package's docstring. Queries and keys are slices of one wider product: their tokens are read in place."""
    num_tokens, heads, head_size = x.shape
    stride = x.stride(0)
    if x.stride(1) != head_size or x.stride(2) != 1:
        x, stride = x.contiguous(), heads * head_size
    out = torch.empty(x.shape, dtype=x.dtype)
    cos, sin = cos.contiguous(), sin.contiguous()  # by name: a copy lives as long as its address is used
    addresses = (x.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr())
    _rotate(*addresses, num_tokens, stride, heads, head_size, like(x), like(cos))
    return out


@jit(parallel=True, in_order=True)
def _rotate(
    x: int,
    cos: int,
    sin: int,
    out: int,  # written
    num_tokens: int,
    stride: int,  # values from one token of x to the next
    heads: int,
    head_size: int,
    like: Any,
    like_angles: Any,
) -> None:
    tokens, outs = array_at(x, (num_tokens * stride,), like), array_at(out, (num_tokens, heads, head_size), like)
    cosines, sines = (
        array_at(cos, (num_tokens, head_size), like_angles),
        array_at(sin, (num_tokens, head_size), like_angles),
    )
    half = head_size // 2
    for token in prange(num_tokens):
        for head in range(heads):
            first = token * stride + head * head_size
            for i in range(half):
                a, b = widen(tokens[first + i]), widen(tokens[first + half + i])
                outs[token, head, i] = narrow(a * cosines[token, i] + b * sines[token, i], like)
                outs[token, head, half + i] = narrow(b * cosines[token, half + i] + a * sines[token, half + i], like)
