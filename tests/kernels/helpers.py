"""The rule by which a kernel is right, memory that starts as NaN, and ragged batches over a poisoned paged cache.

A request's queries, keys and values depend on its seed and the position alone, so the same request can be met again
in another batch, cut into other chunks, or at other block ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from minivllm.kernels.paged_attention import AttentionMetadata, paged_attention
from minivllm.kernels.paged_attention.cpu_plan import LayerPlan, StepPlan
from tests.tolerances import KERNEL_ERROR_FACTOR, ROUNDED_ONCE

DTYPES = (torch.float32, torch.bfloat16)


# ------------------------------------------------------------------ the rule
def assert_kernel_is_right(
    kernel: torch.Tensor,  # [...]
    reference: torch.Tensor,  # [...] the reference in the kernel's dtype
    exact: torch.Tensor,  # [...] the reference in float64, from the same (quantised) inputs
) -> None:
    """error(kernel) <= 2 x (error(reference in the kernel's dtype) + eps(dtype) x max|exact|)."""
    assert (kernel.shape, kernel.dtype) == (reference.shape, reference.dtype)
    assert exact.dtype == torch.float64
    assert exact.isfinite().all(), "the reference read poison"
    assert kernel.isfinite().all(), "the kernel read poison, or left a value unwritten"
    allowed = KERNEL_ERROR_FACTOR * (_error(reference, exact) + torch.finfo(kernel.dtype).eps * _largest(exact))
    error = _error(kernel, exact)
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"


def assert_rounded_once(kernel: torch.Tensor, exact: torch.Tensor) -> None:  # [...], [...] float64
    """Every single value is the exact one rounded to the kernel's dtype; before that it was computed in fp32."""
    half_a_step = ROUNDED_ONCE * torch.finfo(kernel.dtype).eps * exact.abs()
    computed = torch.finfo(torch.float32).eps * KERNEL_ERROR_FACTOR * _largest(exact)
    too_far = (kernel.double() - exact).abs() > half_a_step + computed
    assert not too_far.any(), f"{int(too_far.sum())} of {too_far.numel()} values were rounded more than once"


def _error(values: torch.Tensor, exact: torch.Tensor) -> float:  # both [...]
    return _largest(values.double() - exact)


def _largest(values: torch.Tensor) -> float:  # [...]
    return float(values.abs().max()) if values.numel() else 0.0


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every tensor that torch creates uninitialised is full of NaN."""
    torch.use_deterministic_algorithms(True)  # brings torch.utils.deterministic.fill_uninitialized_memory with it
    try:
        assert torch.empty(1).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def random_values(*shape: int, dtype: torch.dtype, seed: int = 0, size: float = 1.0) -> torch.Tensor:  # [*shape]
    """Normal values, rounded to `dtype`. The first rows do not depend on how many rows there are."""
    values = size * np.random.default_rng(seed).standard_normal(shape)
    return torch.from_numpy(values).to(dtype)


def as_bits(values: torch.Tensor) -> torch.Tensor:  # [...], [...]
    """The same memory as integers, so that NaN equals itself and 0.0 is not -0.0."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return values.contiguous().view(integers[values.dtype.itemsize])


# ------------------------------------------------------------------ ragged batches
class Shape(NamedTuple):
    """What all requests of a batch share."""

    num_kv_heads: int = 2
    group: int = 1  # query heads per KV head
    head_size: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32


SHAPE = Shape()


class Request(NamedTuple):
    """One request of a step. `runs`: how many consecutive blocks come one after the other, None: no two together."""

    seq_len: int
    num_rows: int = 1
    runs: tuple[int, ...] | None = None
    seed: int = 0


class Batch(NamedTuple):
    """The arguments of one attention call; metadata without a plan."""

    requests: list[Request]
    query: torch.Tensor  # [num_tokens, num_heads, head_size]
    k_cache: torch.Tensor  # [num_kv_heads, num_blocks, block_size, head_size]
    v_cache: torch.Tensor  # [num_kv_heads, num_blocks, block_size, head_size]
    metadata: AttentionMetadata

    def run(self, **options: Any) -> torch.Tensor:  # [num_tokens, num_heads, head_size]
        """paged_attention on this batch, scaled as usual."""
        scale = self.query.shape[-1] ** -0.5
        return paged_attention(self.query, self.k_cache, self.v_cache, self.metadata, **{"scale": scale, **options})

    def double(self) -> Batch:
        """The same values in float64, and metadata of their own."""
        m = self.metadata
        metadata = AttentionMetadata(m.query_start_loc, m.seq_lens, m.block_table, m.slot_mapping, m.block_size)
        return Batch(self.requests, self.query.double(), self.k_cache.double(), self.v_cache.double(), metadata)

    def rows_of(self, values: torch.Tensor) -> list[torch.Tensor]:  # [num_tokens, ...] -> num_reqs x [num_rows, ...]
        """Cut by request."""
        return list(values.split([request.num_rows for request in self.requests]))

    @property
    def plan(self) -> LayerPlan:
        """What the CPU path derived when it ran for layers of one shape."""
        assert isinstance(self.metadata.plan, StepPlan)
        (plan,) = self.metadata.plan._derived.values()
        return plan


def num_blocks_of(seq_len: int, block_size: int) -> int:
    """Blocks that hold seq_len tokens."""
    return -(-seq_len // block_size)


def make_batch(
    requests: Sequence[Request], shape: Shape = SHAPE, *, batch_invariant: bool = False, seed: int = 0
) -> Batch:
    """A step over a cache that is NaN wherever no request has a position below its seq_len: the null block (which
    pads the table), the blocks between runs, and the rest of every last block. Runs lie in random order and never
    touch each other."""
    num_kv_heads, group, head_size, block_size, dtype = shape
    tables = _place([_runs(request, block_size) for request in requests], seed)
    num_blocks = 2 + max(block_id for table in tables for block_id in table)
    cache_shape = (num_kv_heads, num_blocks * block_size, head_size)
    k_cache, v_cache = (torch.full(cache_shape, torch.nan, dtype=dtype) for _ in "kv")
    queries, slot_mapping, query_start_loc = [], [], [0]
    for request, table in zip(requests, tables, strict=True):
        seq_len, num_rows = request.seq_len, request.num_rows
        slots = torch.tensor([table[p // block_size] * block_size + p % block_size for p in range(seq_len)])
        for cache, stream in ((k_cache, 0), (v_cache, 1)):
            rows = random_values(seq_len, num_kv_heads, head_size, dtype=dtype, seed=3 * request.seed + stream)
            cache[:, slots] = rows.transpose(0, 1)
        rows = random_values(seq_len, num_kv_heads * group, head_size, dtype=dtype, seed=3 * request.seed + 2, size=2.0)
        queries.append(rows[seq_len - num_rows :])
        slot_mapping.append(slots[seq_len - num_rows :])
        query_start_loc.append(query_start_loc[-1] + num_rows)
    width = 1 + max(len(table) for table in tables)  # one column of padding more than needed
    metadata = AttentionMetadata(
        query_start_loc=query_start_loc,
        seq_lens=[request.seq_len for request in requests],
        block_table=torch.tensor([table + [0] * (width - len(table)) for table in tables], dtype=torch.int32),
        slot_mapping=torch.cat(slot_mapping),
        block_size=block_size,
        batch_invariant=batch_invariant,
    )
    caches = (cache.view(num_kv_heads, num_blocks, block_size, head_size) for cache in (k_cache, v_cache))
    return Batch(list(requests), torch.cat(queries), *caches, metadata)


def _runs(request: Request, block_size: int) -> list[int]:
    num_blocks = num_blocks_of(request.seq_len, block_size)
    runs = [1] * num_blocks if request.runs is None else list(request.runs)
    assert sum(runs) == num_blocks, f"{request} has {num_blocks} blocks, runs of {sum(runs)}"
    return runs


def _place(runs: list[list[int]], seed: int) -> list[list[int]]:
    """Block ids for every request's runs: in random order from block 1 on, with one free block after each run."""
    names = [(r, i) for r, lengths in enumerate(runs) for i in range(len(lengths))]
    first_ids, next_id = {}, 1
    for index in np.random.default_rng(seed).permutation(len(names)):
        r, i = names[index]
        first_ids[r, i] = next_id
        next_id += runs[r][i] + 1
    return [
        [first_ids[r, i] + block for i, length in enumerate(lengths) for block in range(length)]
        for r, lengths in enumerate(runs)
    ]


def check(batch: Batch, **options: Any) -> torch.Tensor:  # [num_tokens, num_heads, head_size]
    """The CPU path obeys the rule on this batch; in bfloat16 on every request of its own, because there the largest
    error of a short context would hide a wrong key of a long one. Returns the output.

    One or two rows tell little about the reference's error: in float32 they are a matter of luck. So the rows of a
    prompt, computed beside the batch with the same options, join the comparison of the whole.
    """
    outputs = _three_ways(batch, options)
    num_kv_heads, _, block_size, head_size = batch.k_cache.shape
    shape = Shape(num_kv_heads, batch.query.shape[1] // num_kv_heads, head_size, block_size, batch.query.dtype)
    prompt = _three_ways(make_batch([Request(63, 63, seed=1000)], shape), options)
    assert_kernel_is_right(*(torch.cat(both) for both in zip(outputs, prompt, strict=True)))
    if batch.query.dtype == torch.bfloat16:
        for request, *own in zip(batch.requests, *map(batch.rows_of, outputs), strict=True):
            try:
                assert_kernel_is_right(*own)
            except AssertionError as error:
                raise AssertionError(f"{request}: {error}") from None
    return outputs[0]


def _three_ways(batch: Batch, options: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The CPU path, the reference in its dtype, the reference in float64, each [num_tokens, num_heads, head_size]."""
    with poisoned_memory():
        kernel = batch.run(impl="cpu", **options)
    return kernel, batch.run(impl="reference", **options), batch.double().run(impl="reference", **options)
