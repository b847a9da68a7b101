"""penalties and logit_bias in Triton: gather the logits of the listed ids, change them, scatter them back.

    program (row, part):  ids and counts, BLOCK at a time ──▶ gather logits ──▶ float64 ──▶ round once ──▶ scatter

The vocabulary is never walked. The grid is the same at every step, however long the lists are: PARTS programs share a
row's list, and each ends when the list does. float64 is dear on small GPUs, but these are a few thousand values.
Called by the package on GPU tensors. Twin in vLLM: csrc/sampler.cu.
"""

import torch
import triton
import triton.language as tl

from minivllm.kernels.build import Build, Workload
from minivllm.kernels.dispatch import warp_size

BLOCK = 512
PARTS = 4
NUM_THREADS = 128
FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)


@triton.jit
def penalties_kernel(
    logits_ptr,  # [num_reqs, vocab_size]
    seen_token_ids_ptr,  # [num_reqs, max_seen] int32
    output_counts_ptr,  # [num_reqs, max_seen] int32
    num_seen_ptr,  # [num_reqs] int32
    repetition_ptr,  # [num_reqs] fp64, as the next two
    frequency_ptr,
    presence_ptr,
    logits_stride,  # between rows
    max_seen,
    vocab_size,
    BLOCK: tl.constexpr,
):
    """One part of one row's list."""
    row = tl.program_id(0).to(tl.int64)
    num_seen = tl.minimum(tl.load(num_seen_ptr + row), max_seen)
    repetition = tl.load(repetition_ptr + row)
    frequency = tl.load(frequency_ptr + row)
    presence = tl.load(presence_ptr + row)
    for first in range(tl.program_id(1) * BLOCK, num_seen, tl.num_programs(1) * BLOCK):
        entries = first + tl.arange(0, BLOCK)
        in_row = entries < max_seen  # a multiple of 16: 128-bit loads. A mask up to num_seen would make them narrow
        ids = tl.load(seen_token_ids_ptr + row * max_seen + entries, mask=in_row, other=-1)  # [BLOCK]
        counts = tl.load(output_counts_ptr + row * max_seen + entries, mask=in_row, other=0)
        is_token = (entries < num_seen) & (ids >= 0) & (ids < vocab_size)
        target = logits_ptr + row * logits_stride + ids
        logits = tl.load(target, mask=is_token, other=0.0)
        before = logits.to(tl.float64)
        after = tl.where(before > 0, before / repetition, before * repetition)
        after -= frequency * counts.to(tl.float64) + tl.where(counts > 0, presence, 0.0)
        after = tl.minimum(tl.maximum(after, -FLOAT32_MAX), FLOAT32_MAX)
        is_finite = tl.abs(before) <= FLOAT32_MAX  # false for NaN
        tl.store(target, tl.where(is_finite, after.to(tl.float32), logits), mask=is_token)


@triton.jit
def logit_bias_kernel(
    logits_ptr,  # [num_reqs, vocab_size]
    token_ids_ptr,  # [num_reqs, max_ids] int32
    bias_ptr,  # [num_reqs, max_ids]
    num_ids_ptr,  # [num_reqs] int32
    logits_stride,  # between rows
    max_ids,
    vocab_size,
    BLOCK: tl.constexpr,
):
    """One part of one row's list."""
    row = tl.program_id(0).to(tl.int64)
    num_ids = tl.minimum(tl.load(num_ids_ptr + row), max_ids)
    for first in range(tl.program_id(1) * BLOCK, num_ids, tl.num_programs(1) * BLOCK):
        entries = first + tl.arange(0, BLOCK)
        in_row = entries < max_ids
        ids = tl.load(token_ids_ptr + row * max_ids + entries, mask=in_row, other=-1)  # [BLOCK]
        bias = tl.load(bias_ptr + row * max_ids + entries, mask=in_row, other=0.0)
        is_token = (entries < num_ids) & (ids >= 0) & (ids < vocab_size)
        target = logits_ptr + row * logits_stride + ids
        tl.store(target, tl.load(target, mask=is_token, other=0.0) + bias, mask=is_token)


def penalties(
    logits: torch.Tensor,  # [num_reqs, vocab_size] fp32
    seen_token_ids: torch.Tensor,  # [num_reqs, max_seen] int32
    output_counts: torch.Tensor,  # [num_reqs, max_seen] int32
    num_seen: torch.Tensor,  # [num_reqs] int32
    repetition: torch.Tensor,  # [num_reqs] float64
    frequency: torch.Tensor,  # [num_reqs] float64
    presence: torch.Tensor,  # [num_reqs] float64
) -> None:
    """See the package's docstring."""
    if seen_token_ids.numel():
        penalties_kernel[(logits.shape[0], PARTS)](
            logits,
            seen_token_ids,
            output_counts,
            num_seen.contiguous(),
            repetition.contiguous(),
            frequency.contiguous(),
            presence.contiguous(),
            logits.stride(0),
            seen_token_ids.shape[1],
            logits.shape[1],
            BLOCK=BLOCK,
            num_warps=NUM_THREADS // warp_size(logits),
            enable_fp_fusion=False,  # a fused multiply-add would round once less than the CPU
        )


def logit_bias(
    logits: torch.Tensor,  # [num_reqs, vocab_size] fp32
    token_ids: torch.Tensor,  # [num_reqs, max_ids] int32
    bias: torch.Tensor,  # [num_reqs, max_ids] fp32
    num_ids: torch.Tensor,  # [num_reqs] int32
) -> None:
    """See the package's docstring."""
    if token_ids.numel():
        logit_bias_kernel[(logits.shape[0], PARTS)](
            logits,
            token_ids,
            bias,
            num_ids.contiguous(),
            logits.stride(0),
            token_ids.shape[1],
            logits.shape[1],
            BLOCK=BLOCK,
            num_warps=NUM_THREADS // warp_size(logits),
        )


def builds() -> list[Build]:
    """64 rows that have seen 1,024 ids each, and 64 rows with OpenAI's largest bias list."""
    rows, num_seen, num_biased = 64, 1024, 300
    strides = ("logits_stride", "vocab_size")
    settings = dict.fromkeys(("repetition_ptr", "frequency_ptr", "presence_ptr"), "*fp64")
    lists = dict.fromkeys(("seen_token_ids_ptr", "output_counts_ptr", "num_seen_ptr"), "*i32")
    return [
        Build(
            operation="penalties",
            name=f"{num_seen} seen ids",
            kernel=penalties_kernel,
            types={"logits_ptr": "*fp32", **lists, **settings, **dict.fromkeys((*strides, "max_seen"), "i32")},
            constants={"BLOCK": BLOCK},
            divisible=frozenset({"logits_ptr", *lists, *settings, *strides, "max_seen"}),
            num_threads=NUM_THREADS,
            workload=_workload(rows, num_seen, 7),
        ),
        Build(
            operation="penalties",
            name=f"bias of {num_biased} ids",
            kernel=logit_bias_kernel,
            types={
                **dict.fromkeys(("logits_ptr", "bias_ptr"), "*fp32"),
                **dict.fromkeys(("token_ids_ptr", "num_ids_ptr"), "*i32"),
                **dict.fromkeys((*strides, "max_ids"), "i32"),
            },
            constants={"BLOCK": BLOCK},
            divisible=frozenset({"logits_ptr", "bias_ptr", "token_ids_ptr", "num_ids_ptr", *strides, "max_ids"}),
            num_threads=NUM_THREADS,
            workload=_workload(rows, num_biased, 1),
        ),
    ]


def _workload(rows: int, ids: int, flops: int) -> Workload:
    """Two lists of 4 bytes; a scattered logit moves a sector of 32 bytes, there and back."""
    per_id = 4 + 4 + 2 * 32
    return Workload(f"{rows} rows", rows * ids * per_id, rows * ids * flops, rows * PARTS, BLOCK * (4 + 4 + 32))
