"""The reference of attention, which all else is measured by, against torch's scaled_dot_product_attention in float64.

The two share nothing: torch sees each request alone, dense and padded with nothing.
"""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from minivllm.kernels.paged_attention import encoder_attention
from tests.kernels.helpers import Batch, Request, Shape, make_batch, random_values
from tests.tolerances import FLOAT64_RTOL

SHAPE = Shape(num_kv_heads=2, group=3, head_size=8, block_size=4, dtype=torch.float64)
REQUESTS = [Request(9, 1, seed=1), Request(7, 7, runs=(2,), seed=2), Request(13, 5, seed=3), Request(1, 1, seed=4)]


def dense(batch: Batch, r: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query [num_heads, num_rows, head_size], key and value [num_kv_heads, seq_len, head_size], collected one by one
    from the blocks of request r."""
    seq_len, block_size = batch.requests[r].seq_len, batch.metadata.block_size
    table = batch.metadata.block_table[r].tolist()
    places = [(table[position // block_size], position % block_size) for position in range(seq_len)]
    key, value = (
        torch.stack([cache[:, block, offset] for block, offset in places], dim=1)
        for cache in (batch.k_cache, batch.v_cache)
    )
    return batch.rows_of(batch.query)[r].transpose(0, 1), key, value


def by_torch(batch: Batch, r: int, bias: torch.Tensor) -> torch.Tensor:  # bias: [num_heads or 1, num_rows, seq_len]
    """scaled_dot_product_attention of request r, [num_rows, num_heads, head_size]."""
    query, key, value = dense(batch, r)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=8**-0.5, enable_gqa=True)
    return out.transpose(0, 1)


def distances(request: Request) -> torch.Tensor:  # [num_rows, seq_len]
    """Position of the row minus position of the key."""
    return torch.arange(request.seq_len)[-request.num_rows :, None] - torch.arange(request.seq_len)


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:  # [...], [...]
    torch.testing.assert_close(got, expected, rtol=FLOAT64_RTOL, atol=FLOAT64_RTOL)


@pytest.mark.parametrize(
    "options",
    [{}, {"sliding_window": 1}, {"sliding_window": 4}, {"sliding_window": 9}, {"sliding_window": 99}],
    ids=str,
)
def test_the_reference_is_scaled_dot_product_attention(options: dict[str, Any]):
    batch = make_batch(REQUESTS, SHAPE)
    outputs = batch.rows_of(batch.run(impl="reference", **options))
    for r, request in enumerate(REQUESTS):
        hidden = (distances(request) < 0) | (distances(request) >= options.get("sliding_window", 1000))
        bias = torch.zeros(hidden.shape, dtype=torch.float64).masked_fill(hidden, -torch.inf)
        assert_close(outputs[r], by_torch(batch, r, bias[None]))


def test_alibi_is_a_bias_that_falls_with_the_distance():
    batch = make_batch(REQUESTS, SHAPE)
    slopes = 2.0 ** -torch.arange(1, 7)
    outputs = batch.rows_of(batch.run(impl="reference", alibi_slopes=slopes))
    for r, request in enumerate(REQUESTS):
        hidden = distances(request) < 0
        bias = -slopes.double()[:, None, None] * distances(request)
        assert_close(outputs[r], by_torch(batch, r, bias.masked_fill(hidden, -torch.inf)))


def test_a_soft_cap_squashes_the_scaled_scores():
    batch = make_batch(REQUESTS, SHAPE)
    outputs = batch.rows_of(batch.run(impl="reference", soft_cap=0.5))
    for r, request in enumerate(REQUESTS):
        query, key, value = dense(batch, r)
        key, value = key.repeat_interleave(3, dim=0), value.repeat_interleave(3, dim=0)
        scores = 0.5 * torch.tanh(query @ key.transpose(1, 2) * 8**-0.5 / 0.5)
        weights = scores.exp().masked_fill(distances(request) < 0, 0)
        expected = (weights / weights.sum(-1, keepdim=True)) @ value
        assert_close(outputs[r], expected.transpose(0, 1))


def test_a_row_that_sees_one_key_gives_its_value():
    """The first token of a prompt, and every token under a window of one key."""
    batch = make_batch([Request(3, 3)], SHAPE)
    value = dense(batch, 0)[2].repeat_interleave(3, dim=0).transpose(0, 1)  # [num_rows, num_heads, head_size]
    assert_close(batch.run(impl="reference")[0], value[0])
    assert_close(batch.run(impl="reference", sliding_window=1), value)


def test_query_heads_share_the_head_of_their_group():
    """Heads 0-2 read KV head 0 and heads 3-5 read KV head 1: values that name their head come out unchanged."""
    batch = make_batch([Request(6, 1)], SHAPE)
    batch.v_cache.copy_(torch.tensor([10.0, 20.0]).double().view(2, 1, 1, 1).expand_as(batch.v_cache))
    assert_close(batch.run(impl="reference")[0, :, 0], torch.tensor([10.0] * 3 + [20.0] * 3).double())


def test_the_encoder_reference_is_attention_without_a_mask_inside_each_request():
    query = random_values(12, 6, 8, dtype=torch.float64, seed=1)
    key, value = (random_values(12, 2, 8, dtype=torch.float64, seed=seed) for seed in (2, 3))
    out = encoder_attention(query, key, value, [0, 1, 5, 12], scale=0.3, impl="reference")
    for start, end in ((0, 1), (1, 5), (5, 12)):
        operands = (x[start:end].transpose(0, 1) for x in (query, key, value))
        expected = F.scaled_dot_product_attention(*operands, scale=0.3, enable_gqa=True)
        assert_close(out[start:end], expected.transpose(0, 1))
