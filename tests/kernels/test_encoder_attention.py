"""encoder_attention: the CPU path obeys the rule, requests do not see each other, wrong arguments are named."""

from typing import Any

import pytest
import torch

from minivllm.kernels.paged_attention import encoder_attention
from tests.kernels.helpers import DTYPES, as_bits, assert_kernel_is_right, poisoned_memory, random_values

Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def operands(num_tokens: int, group: int = 1, head_size: int = 64, dtype: torch.dtype = torch.float32) -> Operands:
    """Query [num_tokens, 2 * group, head_size], key and value [num_tokens, 2, head_size]."""
    query = random_values(num_tokens, 2 * group, head_size, dtype=dtype, seed=1, size=2.0)
    key, value = (random_values(num_tokens, 2, head_size, dtype=dtype, seed=seed) for seed in (2, 3))
    return query, key, value


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("group", [1, 3, 5, 7])
@pytest.mark.parametrize("head_size", [64, 80, 128])
def test_a_ragged_batch_is_right(dtype: torch.dtype, batch_invariant: bool, group: int, head_size: int):
    starts = [0, 1, 8, 71, 86, 103, 136]  # lengths 1, 7, 63, 15, 17, 33
    inputs = operands(136, group, head_size, dtype)
    with poisoned_memory():
        kernel = encoder_attention(*inputs, starts, scale=head_size**-0.5, batch_invariant=batch_invariant, impl="cpu")
    reference = encoder_attention(*inputs, starts, scale=head_size**-0.5, impl="reference")
    exact = encoder_attention(*(x.double() for x in inputs), starts, scale=head_size**-0.5, impl="reference")
    assert_kernel_is_right(kernel, reference, exact)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_requests_do_not_see_each_other(impl: str):
    """A neighbour full of NaN changes no bit."""
    query, key, value = operands(12)
    before = encoder_attention(query, key, value, [0, 5, 12], scale=0.125, impl=impl)[5:]
    for x in (query, key, value):
        x[:5] = torch.nan
    after = encoder_attention(query, key, value, [0, 5, 12], scale=0.125, impl=impl)
    assert after[:5].isnan().all()
    assert torch.equal(as_bits(after[5:]), as_bits(before))


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_views_into_a_fused_row_are_read_right_and_left_alone(batch_invariant: bool):
    fused = random_values(9, 6, 64, dtype=torch.float32)
    before = fused.clone()
    strided = fused[:, :2], fused[:, 2:4], fused[:, 4:]
    options = {"scale": 0.125, "batch_invariant": batch_invariant}
    out = encoder_attention(*strided, [0, 4, 9], **options)
    assert torch.equal(fused, before)
    assert torch.equal(out, encoder_attention(*(x.contiguous() for x in strided), [0, 4, 9], **options))


def call(**changes: Any) -> torch.Tensor:  # [6, 4, 8]
    """A call that fits, with changes."""
    rows = torch.zeros(6, 2, 8)
    fitting = {"query": torch.zeros(6, 4, 8), "key": rows, "value": rows, "query_start_loc": [0, 6], "scale": 1.0}
    return encoder_attention(**{**fitting, **changes})


ROWS = r"key, value: expected \[6, num_kv_heads, 8\] as query \[6, 4, 8\], got "


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": torch.zeros(5, 2, 8)}, ROWS + r"key \[5, 2, 8\] and value \[6, 2, 8\]"),
        ({"value": torch.zeros(6, 1, 8)}, ROWS + r"key \[6, 2, 8\] and value \[6, 1, 8\]"),
        ({"key": torch.zeros(5, 2, 8), "value": torch.zeros(5, 2, 8)}, ROWS + r"key \[5, 2, 8\] and value \[5, 2, 8\]"),
        ({"key": torch.zeros(6, 2, 4), "value": torch.zeros(6, 2, 4)}, ROWS + r"key \[6, 2, 4\] and value \[6, 2, 4\]"),
        (
            {"key": torch.zeros(6, 3, 8), "value": torch.zeros(6, 3, 8)},
            r"num_heads: expected a multiple of num_kv_heads 3, got 4",
        ),
        ({"query_start_loc": [0, 5]}, r"query_start_loc: expected 0 \.\. 6 \(the query's rows\), got 0 \.\. 5"),
        ({"query_start_loc": [1, 6]}, r"query_start_loc: expected 0 \.\. 6 \(the query's rows\), got 1 \.\. 6"),
        ({"impl": "fast"}, r"impl: expected one of .*, got 'fast'"),
    ],
    ids=["key rows", "value heads", "rows", "head_size", "heads", "end", "start", "impl"],
)
def test_every_wrong_argument_is_named_with_both_sides(changes: dict[str, Any], message: str):
    call()
    with pytest.raises(ValueError, match=message):
        call(**changes)
