"""Caches of codes and scales, full of poison where no request has a position, and steps over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from minivllm.kernels.paged_attention import AttentionMetadata, paged_attention
from minivllm.kernels.reshape_and_cache import reshape_and_cache
from tests.kernels.helpers import Batch, Request, Shape, make_batch

CACHE_DTYPES = (torch.int8, torch.float8_e4m3fn)
POISON = 0x7F  # as a byte: NaN in e4m3, the largest int8


def empty_caches(
    num_kv_heads: int, num_blocks: int, block_size: int, head_size: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """k_cache, v_cache [num_kv_heads, num_blocks, block_size, head_size] and their scales, one per slot: all poison."""
    shape = (num_kv_heads, num_blocks, block_size, head_size)
    caches = {name: torch.full(shape, POISON, dtype=torch.int8).view(dtype) for name in ("k_cache", "v_cache")}
    return caches | {name: torch.full(shape[:3], torch.nan) for name in ("k_scales", "v_scales")}


class QuantisedBatch(NamedTuple):
    """One attention call over a quantised cache, and the same step over the values that were quantised."""

    original: Batch
    caches: dict[str, torch.Tensor]  # k_cache, v_cache, k_scales, v_scales
    query: torch.Tensor  # [num_tokens, num_heads, head_size]

    def run(self, **options: Any) -> torch.Tensor:  # [num_tokens, num_heads, head_size]
        """paged_attention on the codes, with a plan of its own."""
        scale = self.query.shape[-1] ** -0.5
        return paged_attention(
            self.query, metadata=fresh(self.original.metadata), **self.caches, **{"scale": scale, **options}
        )

    def double(self) -> QuantisedBatch:
        """The same codes and scales under a query in float64."""
        return self._replace(query=self.query.double())

    def rows_of(self, values: torch.Tensor) -> list[torch.Tensor]:  # [num_tokens, ...] -> num_reqs x [num_rows, ...]
        """Cut by request."""
        return self.original.rows_of(values)


def fresh(metadata: AttentionMetadata) -> AttentionMetadata:
    """The same step without a plan."""
    m = metadata
    return AttentionMetadata(
        m.query_start_loc, m.seq_lens, m.block_table, m.slot_mapping, m.block_size, m.batch_invariant
    )


def make_quantised(
    requests: Sequence[Request],
    shape: Shape,
    cache_dtype: torch.dtype,
    *,
    value_size: float = 1.0,
    batch_invariant: bool = False,
    seed: int = 0,
) -> QuantisedBatch:
    """make_batch's step, its cache written anew by the reference of reshape_and_cache; `value_size` multiplies all
    values. Only slots that a request owns are written: the others keep their poison."""
    batch = make_batch(requests, shape, batch_invariant=batch_invariant, seed=seed)
    batch.v_cache.mul_(value_size)
    num_kv_heads, num_blocks, block_size, head_size = batch.k_cache.shape
    caches = empty_caches(num_kv_heads, num_blocks, block_size, head_size, cache_dtype)
    rows = [cache.flatten(1, 2).transpose(0, 1) for cache in (batch.k_cache, batch.v_cache)]  # [num_slots, heads, size]
    owned = rows[0].isfinite().all(dim=(1, 2)).nonzero()[:, 0]  # [num_owned]
    reshape_and_cache(rows[0][owned], rows[1][owned], **caches, slot_mapping=owned, impl="reference")
    return QuantisedBatch(batch, caches, batch.query)


def every_e4m3_midpoint() -> torch.Tensor:  # [num_rows, 1, 8] fp32
    """Rows whose largest value is 448, so that their scale is 1: every finite code of e4m3, and for every two
    neighbours their middle and the float32 values around it, of both signs."""
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # [127], ascending
    middles = (codes[1:] + codes[:-1]) / 2
    around = [torch.nextafter(middles, torch.full_like(middles, limit)) for limit in (0.0, 448.0)]
    values = torch.cat([codes, middles, *around])
    values = torch.cat([values, -values])
    values = torch.cat([values, values.new_zeros(-values.numel() % 7)]).view(-1, 7)
    return torch.cat([values, values.new_full((len(values), 1), 448.0)], dim=1)[:, None]
