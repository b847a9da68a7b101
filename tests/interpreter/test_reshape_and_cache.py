"""reshape_and_cache in the interpreter: exact copies, and nothing else is touched."""

import pytest
import torch

from minivllm.kernels.reshape_and_cache import reshape_and_cache
from tests.interpreter.helpers import DTYPES, far_apart
from tests.kernels.helpers import as_bits, random_values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_kv_heads", "block_size", "head_size"), [(1, 16, 64), (3, 16, 80), (2, 128, 8)])
def test_rows_land_in_their_slots_and_nothing_else_changes(
    dtype: torch.dtype, num_kv_heads: int, block_size: int, head_size: int
):
    """Slots outside the cache write nothing: on a GPU nobody waits to find them."""
    qkv = random_values(6, 3 * num_kv_heads, head_size, dtype=dtype)
    _, key, value = qkv.split(num_kv_heads, dim=1)
    shape = (num_kv_heads, 4, block_size, head_size)
    caches = [torch.full(shape, torch.nan, dtype=dtype) for _ in "kv"]
    num_slots = 4 * block_size
    slots = torch.tensor([3, -1, num_slots - 1, 0, num_slots, 2**40])
    reshape_and_cache(key, value, *caches, slots, impl="triton")
    for cache, rows in zip(caches, (key, value), strict=True):
        flat = cache.view(num_kv_heads, num_slots, head_size)
        for token, slot in ((0, 3), (2, num_slots - 1), (3, 0)):
            assert torch.equal(as_bits(flat[:, slot]), as_bits(rows[token]))
        written = torch.zeros(num_slots, dtype=torch.bool)
        written[[3, num_slots - 1, 0]] = True
        assert flat[:, ~written].isnan().all()


def test_offsets_beyond_two_to_the_31_are_right():
    """The cache has 2^31 + 2^20 values, of which only the touched pages exist."""
    num_blocks, block_size, head_size = 2**15 + 16, 16, 4096
    k_cache, v_cache = (torch.empty(1, num_blocks, block_size, head_size, dtype=torch.float16) for _ in "kv")
    assert k_cache.numel() > 2**31
    key, value = (random_values(1, 1, head_size, dtype=torch.float16, seed=seed) for seed in (1, 2))
    slot = num_blocks * block_size - 1
    reshape_and_cache(key, value, k_cache, v_cache, torch.tensor([slot]), impl="triton")
    assert torch.equal(k_cache[0, -1, -1], key[0, 0])
    assert torch.equal(v_cache[0, -1, -1], value[0, 0])


def test_every_stride_of_keys_and_values_is_taken_as_it_is():
    """Keys and values lie apart, each in wider rows of its own."""
    key = random_values(3, 3, 40, dtype=torch.float32, seed=1)[:, :2, 8:24]
    value = random_values(3, 2, 56, dtype=torch.float32, seed=2)[:, :, 16:32]
    k_cache, v_cache = (torch.full((2, 1, 16, 16), torch.nan) for _ in "kv")
    reshape_and_cache(key, value, k_cache, v_cache, torch.tensor([9, 2, 4]), impl="triton")
    for cache, rows in ((k_cache, key), (v_cache, value)):
        assert torch.equal(cache[:, 0, [9, 2, 4]], rows.transpose(0, 1))


def test_keys_and_values_of_tokens_that_lie_far_apart():
    rows = far_apart(3, 2, 16)
    k_cache, v_cache = (torch.zeros(2, 1, 16, 16, dtype=torch.float16) for _ in "kv")
    reshape_and_cache(rows, rows, k_cache, v_cache, torch.tensor([1, 0, 2]), impl="triton")
    for cache in (k_cache, v_cache):
        assert torch.equal(cache[:, 0, [1, 0, 2]], rows.transpose(0, 1))
