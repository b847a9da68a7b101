"""batch_invariant=True: the bits of a request's output depend on that request alone.

One request is computed whole, alone, in scattered blocks; then in every other way. Each time the same rows must come
out, bit for bit.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.kernels.paged_attention import encoder_attention
from minivllm.kernels.rms_norm import rms_norm
from minivllm.kernels.rotary_embedding import rotary_embedding
from minivllm.kernels.silu_and_mul import silu_and_mul
from tests.kernels.helpers import DTYPES, Request, Shape, as_bits, make_batch, num_blocks_of, random_values

SEQ_LEN = 150  # over one key tile of 128 and not a multiple of anything
COMPANIONS = [Request(7, 7, seed=91), Request(300, 1, seed=92), Request(40, 4, seed=93), Request(129, 129, seed=94)]
OPTIONS = {
    "plain": {},
    "window": {"sliding_window": 20},
    "window of one": {"sliding_window": 1},
    "wide window": {"sliding_window": 140},
    "soft cap": {"soft_cap": 5.0},
    "alibi": {"alibi": True},
}


def options_for(name: str, shape: Shape) -> dict[str, Any]:
    """Keyword arguments of paged_attention."""
    options = dict(OPTIONS[name])
    if options.pop("alibi", False):
        options["alibi_slopes"] = 2.0 ** -torch.arange(1, shape.num_kv_heads * shape.group + 1)
    return options


def rows_in_chunks(
    chunks: list[int],
    shape: Shape,
    options: dict[str, Any],
    *,
    companions: Sequence[Request] = (),
    place: int = 0,
    runs_of: Any = lambda num_blocks: None,
    seed: int = 0,
) -> torch.Tensor:
    """The request's output [sum(chunks), num_heads, head_size], computed chunk by chunk: in every step the cache
    holds only what is computed by then, and the request stands at `place` among the companions."""
    rows, seq_len = [], 0
    for step, num_rows in enumerate(chunks):
        seq_len += num_rows
        request = Request(seq_len, num_rows, runs_of(num_blocks_of(seq_len, shape.block_size)), seed=5)
        requests = [*companions[:place], request, *companions[place:]]
        batch = make_batch(requests, shape, batch_invariant=True, seed=seed + step)
        rows.append(batch.rows_of(batch.run(**options))[min(place, len(companions))])
    return torch.cat(rows)


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:  # [...], [...]
    assert torch.equal(as_bits(got), as_bits(expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [1, 3, 5, 7])
@pytest.mark.parametrize("head_size", [64, 80])
@pytest.mark.parametrize("name", OPTIONS)
def test_any_chunking_alone_or_in_a_batch_gives_the_same_bits(
    dtype: torch.dtype, group: int, head_size: int, name: str
):
    shape = Shape(2, group, head_size, 16, dtype)
    options = options_for(name, shape)
    whole = rows_in_chunks([SEQ_LEN], shape, options)
    assert_same_bits(rows_in_chunks([63, 1, 1, 64, 21], shape, options), whole)
    assert_same_bits(rows_in_chunks([17, 100, 33], shape, options, companions=COMPANIONS, place=2), whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_by_token_gives_the_bits_of_one_prefill(dtype: torch.dtype):
    shape = Shape(1, 3, 64, 16, dtype)
    whole = rows_in_chunks([SEQ_LEN], shape, {})
    assert_same_bits(rows_in_chunks([1] * SEQ_LEN, shape, {}), whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "runs_of", [lambda n: (n,), lambda n: (1,) * n, lambda n: (1, n - 1)], ids=["one", "all", "two"]
)
def test_block_ids_change_no_bit(dtype: torch.dtype, runs_of: Any):
    shape = Shape(2, 3, 64, 16, dtype)
    whole = rows_in_chunks([SEQ_LEN], shape, {})
    for seed in range(3):
        assert_same_bits(rows_in_chunks([SEQ_LEN - 1, 1], shape, {}, runs_of=runs_of, seed=seed), whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_block_size_changes_no_bit(dtype: torch.dtype):
    by_block_size = [rows_in_chunks([SEQ_LEN], Shape(2, 3, 64, size, dtype), {}) for size in (8, 16, 32)]
    assert_same_bits(by_block_size[1], by_block_size[0])
    assert_same_bits(by_block_size[2], by_block_size[0])


def test_two_threads_change_no_bit_between_batches():
    """The number of threads is the machine's; what else runs in the batch is not allowed to show."""
    shape = Shape(2, 3, 64, 16)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        whole = rows_in_chunks([SEQ_LEN], shape, {})
        together = rows_in_chunks([63, 1, 1, 64, 21], shape, {}, companions=COMPANIONS, place=2)
    finally:
        torch.set_num_threads(threads_before)
    assert_same_bits(together, whole)


def cuts(lengths: list[int], total: int) -> Iterator[int]:
    """The drawn chunk lengths, as far as they go, and the rest in one."""
    for length in lengths:
        if length >= total:
            break
        yield length
        total -= length
    yield total


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_no_history_changes_a_bit(data: st.DataObject):
    """Any prompt length, any chunks, any companions, any blocks, any option."""
    shape = Shape(
        num_kv_heads=data.draw(st.sampled_from([1, 2])),
        group=data.draw(st.sampled_from([1, 3, 5, 7])),
        head_size=data.draw(st.sampled_from([64, 80, 128])),
        block_size=data.draw(st.sampled_from([8, 16, 32])),
        dtype=data.draw(st.sampled_from(DTYPES)),
    )
    options = options_for(data.draw(st.sampled_from(list(OPTIONS))), shape)
    seq_len = data.draw(st.sampled_from([1, 7, 63, 128, 129]) | st.integers(1, 280))
    chunks = list(cuts(data.draw(st.lists(st.integers(1, 70), max_size=6)), seq_len))
    companions = data.draw(st.lists(st.sampled_from(COMPANIONS), max_size=3))
    place = data.draw(st.integers(0, len(companions)))
    whole = rows_in_chunks([seq_len], shape, options, runs_of=lambda num_blocks: (num_blocks,))
    history = rows_in_chunks(
        chunks, shape, options, companions=companions, place=place, seed=data.draw(st.integers(0, 99))
    )
    assert_same_bits(history, whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [1, 3])
def test_an_encoder_request_has_the_same_bits_alone_and_in_any_batch(dtype: torch.dtype, group: int):
    lengths = [5, 63, 1, 17, 130]
    starts = [sum(lengths[:r]) for r in range(len(lengths) + 1)]
    query = random_values(starts[-1], 2 * group, 64, dtype=dtype, seed=1)
    key, value = (random_values(starts[-1], 2, 64, dtype=dtype, seed=seed) for seed in (2, 3))
    together = encoder_attention(query, key, value, starts, scale=0.125, batch_invariant=True)
    for start, end in zip(starts, starts[1:], strict=False):
        operands = (x[start:end].clone() for x in (query, key, value))
        alone = encoder_attention(*operands, [0, end - start], scale=0.125, batch_invariant=True)
        assert_same_bits(together[start:end], alone)


def norm_of(rows: torch.Tensor) -> torch.Tensor:  # [num_rows, size] -> [num_rows, size]
    return rms_norm(rows, rows[0] * 0.5, 1e-6, impl="cpu")


def turned(rows: torch.Tensor) -> torch.Tensor:  # [num_rows, size] -> [num_rows, 1, size]
    heads, angles = rows.unsqueeze(1), rows.float().cos()
    return rotary_embedding(heads, heads, angles, angles, impl="cpu")[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", [norm_of, turned, silu_and_mul])
@pytest.mark.parametrize("size", [16, 24, 64])
@pytest.mark.parametrize("num_rows", [1, 2, 12])
def test_where_rows_lie_in_memory_changes_no_bit(
    function: Callable[[torch.Tensor], torch.Tensor],
    dtype: torch.dtype,
    size: int,
    num_rows: int,
    monkeypatch: pytest.MonkeyPatch,
):
    """Compiled loops ask whether what they write lies close behind what they read, and then take another way."""
    values = random_values(num_rows, size, dtype=dtype, seed=size)
    expected = function(values.clone())
    memory = torch.zeros(2 * values.numel() + 200, dtype=dtype)  # behind the rows is what is written
    rows = memory[: values.numel()].view(values.shape).copy_(values)
    for distance in range(0, 160, 4):
        written = memory[values.numel() + distance :]
        monkeypatch.setattr(torch, "empty", lambda shape, **_: written[: math.prod(shape)].view(shape))  # noqa: B023
        assert_same_bits(function(rows), expected)
