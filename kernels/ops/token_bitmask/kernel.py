"""token_bitmask in Triton: a program per row and stretch of words, seen as a picture [WORDS, 32] of logits.

    word ──▶ shift by 0 .. 31 ──▶ [WORDS, 32] bits ──▶ where(bit, logit, -inf) ──▶ store all

Storing -inf through the bits as a mask would compile to one narrow store per token; a load, a `where` and a store of
everything are 128 bits wide. A stretch in which every token is allowed is left alone: requests without a grammar cost
the words only. Called by the package on GPU tensors. Twin in vLLM: xgrammar's apply_token_bitmask_inplace_triton.
"""

import torch
import triton
import triton.language as tl

from minivllm.kernels.build import Build, Workload
from minivllm.kernels.dispatch import warp_size

WORDS = 64  # 2,048 logits per program: enough in flight, and small enough that whole stretches are often allowed
NUM_THREADS = 128


@triton.jit
def token_bitmask_kernel(
    logits_ptr,  # [num_reqs, vocab_size]
    bitmask_ptr,  # [num_reqs, num_words] int32
    logits_stride,  # between rows
    bitmask_stride,
    vocab_size,
    WORDS: tl.constexpr,
):
    """One stretch of one row."""
    row = tl.program_id(0).to(tl.int64)
    words = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    num_words = tl.cdiv(vocab_size, 32)
    bits = tl.load(bitmask_ptr + row * bitmask_stride + words, mask=words < num_words, other=-1)  # [WORDS]
    if tl.max((bits != -1).to(tl.int32), axis=0) == 0:
        return
    shifts = tl.arange(0, 32)
    is_allowed = ((bits[:, None] >> shifts[None, :]) & 1) != 0  # [WORDS, 32]
    tokens = words[:, None] * 32 + shifts[None, :]
    is_token = tokens < vocab_size
    target = logits_ptr + row * logits_stride + tokens
    logits = tl.load(target, mask=is_token)
    tl.store(target, tl.where(is_allowed, logits, float("-inf")), mask=is_token)


def token_bitmask(
    logits: torch.Tensor,  # [num_reqs, vocab_size] fp32
    bitmask: torch.Tensor,  # [num_reqs, ceil(vocab_size / 32)] int32
) -> None:
    """See the package's docstring."""
    num_reqs, vocab_size = logits.shape
    bitmask = bitmask if bitmask.stride(1) == 1 else bitmask.contiguous()
    if num_reqs and vocab_size:
        token_bitmask_kernel[(num_reqs, triton.cdiv(vocab_size, 32 * WORDS))](
            logits,
            bitmask,
            logits.stride(0),
            bitmask.stride(0),
            vocab_size,
            WORDS=WORDS,
            num_warps=NUM_THREADS // warp_size(logits),
        )


def builds() -> list[Build]:
    """64 rows of Qwen2.5's vocabulary, each with a grammar."""
    rows, vocab_size = 64, 151936
    return [
        Build(
            operation="token_bitmask",
            name=f"vocabulary {vocab_size}",
            kernel=token_bitmask_kernel,
            types={
                "logits_ptr": "*fp32",
                "bitmask_ptr": "*i32",
                **dict.fromkeys(("logits_stride", "bitmask_stride", "vocab_size"), "i32"),
            },
            constants={"WORDS": WORDS},
            divisible=frozenset({"logits_ptr", "bitmask_ptr", "logits_stride", "vocab_size"}),
            num_threads=NUM_THREADS,
            workload=Workload(
                f"{rows} rows",
                rows * (8 * vocab_size + vocab_size // 8),
                0,
                rows * triton.cdiv(vocab_size, 32 * WORDS),
                4 * 32 * WORDS,
            ),
        )
    ]
