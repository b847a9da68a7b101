"""What paged_attention and its metadata refuse, and that the message names both sides.

The tensors are looked at on every call; metadata and options once per step, while metadata.plan is empty.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from minivllm.kernels.paged_attention import AttentionMetadata, paged_attention, validate_metadata

IMPLS = ("cpu", "reference")


def metadata(**changes: Any) -> AttentionMetadata:
    """Blocks of 4; request 0 computes the last 2 of its 6 tokens (blocks 1, 2), request 1 its 9th (3, 4, 5)."""
    fitting = AttentionMetadata(
        query_start_loc=[0, 2, 3],
        seq_lens=[6, 9],
        block_table=torch.tensor([[1, 2, 0], [3, 4, 5]], dtype=torch.int32),
        slot_mapping=torch.tensor([8, 9, 20]),
        block_size=4,
    )
    return replace(fitting, **changes)


def call(**changes: Any) -> torch.Tensor:  # [3, 4, 8]
    """A call that fits, with changes."""
    cache = torch.zeros(2, 6, 4, 8)
    fitting = {
        "query": torch.zeros(3, 4, 8),
        "k_cache": cache,
        "v_cache": cache,
        "metadata": metadata(),
        "scale": 1.0,
    }
    return paged_attention(**{**fitting, **changes})


def test_metadata_counts_requests_and_rows():
    assert (metadata().num_reqs, metadata().num_tokens) == (2, 3)


HEADS = (
    r"query: expected num_heads a multiple of num_kv_heads and head_size a multiple of 8 as in k_cache "
    r"\[2, 6, 4, 8\], got "
)
CACHES = r"k_cache, v_cache: expected equal shapes with block_size 4 as metadata says, got "
ODD_CACHE = torch.zeros(2, 6, 4, 12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.zeros(3, 5, 8)}, HEADS + r"\[3, 5, 8\]"),
        ({"query": torch.zeros(3, 4, 16)}, HEADS + r"\[3, 4, 16\]"),
        (
            {"query": torch.zeros(3, 4, 12), "k_cache": ODD_CACHE, "v_cache": ODD_CACHE},
            r"head_size a multiple of 8 as in k_cache \[2, 6, 4, 12\], got \[3, 4, 12\]",
        ),
        ({"v_cache": torch.zeros(2, 7, 4, 8)}, CACHES + r"\[2, 6, 4, 8\] and \[2, 7, 4, 8\]"),
        (
            {"k_cache": torch.zeros(2, 3, 8, 8), "v_cache": torch.zeros(2, 3, 8, 8)},
            CACHES + r"\[2, 3, 8, 8\] and \[2, 3, 8, 8\]",
        ),
        ({"query": torch.zeros(4, 4, 8)}, r"query: expected 3 rows as query_start_loc says, got 4"),
        (
            {"query": torch.zeros(3, 4, 8).bfloat16()},
            r"expected contiguous tensors of the query's dtype torch.bfloat16, got torch.float32, "
            r"contiguous True and True",
        ),
        (
            {"k_cache": torch.zeros(2, 6, 8, 4).transpose(2, 3)},
            r"expected contiguous tensors of the query's dtype torch.float32, got torch.float32, "
            r"contiguous False and True",
        ),
        ({"v_cache": torch.zeros(2, 6, 8, 4).transpose(2, 3)}, r"contiguous True and False"),
    ],
    ids=["heads", "head_size", "odd head_size", "caches", "block_size", "rows", "dtype", "strided k", "strided v"],
)
def test_tensors_that_do_not_fit_are_refused_on_every_call(impl: str, changes: dict[str, Any], message: str):
    shared = metadata()
    call(metadata=shared, impl=impl)
    with pytest.raises(ValueError, match=message):
        call(**changes, impl=impl)
    with pytest.raises(ValueError, match=message):
        call(**{"metadata": shared, **changes}, impl=impl)  # another layer of the same step


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 0}, r"sliding_window: expected at least 1 key or None, got 0"),
        ({"sliding_window": -1}, r"sliding_window: expected at least 1 key or None, got -1"),
        ({"soft_cap": 0.0}, r"soft_cap: expected a positive number or None, got 0.0"),
        ({"soft_cap": -5.0}, r"soft_cap: expected a positive number or None, got -5.0"),
        ({"soft_cap": float("nan")}, r"soft_cap: expected a positive number or None, got nan"),
        ({"alibi_slopes": torch.ones(2)}, r"alibi_slopes: expected \[4\], got \[2\]"),
        (
            {"metadata": metadata(causal=False)},
            r"metadata.causal: expected True for a KV cache, got False; encoders call encoder_attention",
        ),
    ],
    ids=["window 0", "window -1", "cap 0", "cap -5", "cap nan", "slopes", "causal"],
)
def test_options_out_of_range_are_refused(impl: str, changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        call(**changes, impl=impl)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match=r"impl: expected one of .*, got 'fast'"):
        call(impl="fast")


TABLE = r"block_table: expected \[2, >= 3\] for 2 requests of at most 9 tokens in blocks of 4, got "


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"seq_lens": [6]},
            r"query_start_loc: expected 2 entries starting at 0 for 1 seq_lens, got 3 entries starting at 0",
        ),
        (
            {"query_start_loc": [1, 2, 3]},
            r"query_start_loc: expected 3 entries starting at 0 for 2 seq_lens, got 3 entries starting at 1",
        ),
        (
            {"query_start_loc": [0, 0, 3]},
            r"request 0: expected 1 <= query rows <= seq_len, got 0 query rows \(query_start_loc 0\.\.0\) and "
            r"seq_len 6",
        ),
        ({"query_start_loc": [0, 4, 3]}, r"request 1: expected 1 <= query rows <= seq_len, got -1 query rows"),
        (
            {"seq_lens": [1, 9]},
            r"request 0: expected 1 <= .*, got 2 query rows \(query_start_loc 0\.\.2\) and seq_len 1",
        ),
        ({"slot_mapping": torch.tensor([8, 9])}, r"slot_mapping: expected \[3\] as query_start_loc says, got \[2\]"),
        ({"block_table": torch.zeros(2, 2, dtype=torch.int32)}, TABLE + r"\[2, 2\]"),
        ({"block_table": torch.zeros(3, 3, dtype=torch.int32)}, TABLE + r"\[3, 3\]"),
        ({"block_table": torch.zeros(6, dtype=torch.int32)}, TABLE + r"\[6\]"),
        (
            {"block_table": torch.tensor([[1, 2, 0], [3, 4, 6]], dtype=torch.int32)},
            r"block_table: expected block ids in \[0, 6\), the cache's blocks, got 0\.\.6",
        ),
        (
            {"block_table": torch.tensor([[1, 2, -1], [3, 4, 5]], dtype=torch.int32)},
            r"block_table: expected block ids in \[0, 6\), the cache's blocks, got -1\.\.5",
        ),
    ],
    ids=["lists", "start", "no rows", "rows backwards", "seq_len", "mapping", "width", "rows", "flat", "high", "low"],
)
def test_metadata_that_does_not_fit_is_refused_before_anything_is_read(changes: dict[str, Any], message: str):
    validate_metadata(metadata(), num_blocks=6)
    with pytest.raises(ValueError, match=message):
        validate_metadata(metadata(**changes), num_blocks=6)
    for impl in IMPLS:
        with pytest.raises(ValueError, match=message):
            call(metadata=metadata(**changes), impl=impl)


def test_metadata_is_checked_once_per_step():
    """The plan that the first layer leaves behind says so: 30 layers would otherwise pay 30 times."""
    shared = metadata()
    call(metadata=shared)
    assert shared.plan is not None
    shared.causal = False  # nobody looks again
    call(metadata=shared)
