"""silu_and_mul in one pass. Called by the package on CPU tensors. Twin in vLLM: csrc/cpu/activation.cpp."""

from typing import Any

import numpy as np
import torch

from minivllm.kernels.jit import array_at, exp, jit, like, narrow, prange, tanh, widen

GELU_SCALE, GELU_CUBE = 0.7978845608, 0.044715  # sqrt(2 / pi), and the cubic term of the tanh form


def silu_and_mul(
    x: torch.Tensor,  # [..., 2 * size]
    activation: str,
) -> torch.Tensor:  # [..., size]
    """In bf16 the activated gate is rounded before it is multiplied, as transformers does."""
    x = x.contiguous()
    size = x.shape[-1] // 2
    out = torch.empty((*x.shape[:-1], size), dtype=x.dtype)
    _gate(x.data_ptr(), out.data_ptr(), x.numel() // (2 * size), size, activation == "silu", like(x))
    return out


@jit(parallel=True, in_order=True)
def _gate(
    x: int,
    out: int,  # written
    num_rows: int,
    size: int,
    is_silu: bool,  # else gelu_tanh
    like: Any,
) -> None:
    rows, outs = array_at(x, (num_rows, 2 * size), like), array_at(out, (num_rows, size), like)
    for row in prange(num_rows):
        for i in range(size):
            gate = widen(rows[row, i])
            if is_silu:
                gate /= np.float32(1) + exp(-gate)
            else:
                bent = np.float32(1) + tanh(
                    np.float32(GELU_SCALE) * (gate + np.float32(GELU_CUBE) * gate * gate * gate)
                )
                gate *= np.float32(0.5) * bent
            rounded = widen(narrow(gate, like))
            outs[row, i] = narrow(rounded * widen(rows[row, size + i]), like)
