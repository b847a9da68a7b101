"""The kernels' rule, and what Triton's interpreter changes in it."""

from __future__ import annotations

import torch

from tests.kernels.helpers import assert_kernel_is_right

# The interpreter cuts bfloat16 results off where a GPU rounds them: bfloat16 is judged by one step instead of half.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def assert_right(
    kernel: torch.Tensor,  # [...] what Triton computed
    reference: torch.Tensor,  # [...] the reference in the kernel's dtype
    exact: torch.Tensor,  # [...] the reference in float64
) -> None:
    """assert_kernel_is_right, with a second step of rounding for a cut bfloat16."""
    if kernel.dtype == torch.bfloat16:
        assert kernel.isfinite().all(), "the kernel read poison, or left a value unwritten"
        step = torch.finfo(torch.bfloat16).eps * exact.abs()
        kernel = torch.where((kernel.double() - exact).abs() <= step, exact.to(kernel.dtype), kernel)
    assert_kernel_is_right(kernel, reference, exact)
