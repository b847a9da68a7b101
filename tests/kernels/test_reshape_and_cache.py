"""reshape_and_cache: an exact copy into the named slots and nowhere else, in both implementations."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.kernels.reshape_and_cache import reshape_and_cache
from tests.kernels.helpers import DTYPES, as_bits, random_values

GUARD = 64  # values of memory in front of and behind each cache, which nobody may touch
IMPLS = ("cpu", "reference")


class GuardedCaches:
    """Two caches [num_kv_heads, num_blocks, block_size, head_size] of NaN inside larger memory."""

    def __init__(self, num_kv_heads: int, num_blocks: int, block_size: int, head_size: int, dtype: torch.dtype):
        self.shape = (num_kv_heads, num_blocks, block_size, head_size)
        num_values = num_kv_heads * num_blocks * block_size * head_size
        self.memory = [torch.full((num_values + 2 * GUARD,), torch.nan, dtype=dtype) for _ in "kv"]
        self.k, self.v = (memory[GUARD:-GUARD].view(self.shape) for memory in self.memory)

    def write(self, key: torch.Tensor, value: torch.Tensor, slots: list[int], impl: str) -> None:
        """key, value: [num_tokens, num_kv_heads, head_size]."""
        reshape_and_cache(key, value, self.k, self.v, torch.tensor(slots, dtype=torch.int64), impl=impl)

    def expected(self, rows: torch.Tensor, slots: list[int]) -> torch.Tensor:
        """All memory of one cache after `rows` [num_tokens, num_kv_heads, head_size] were written, [num_values]."""
        memory = torch.full_like(self.memory[0], torch.nan)
        cache = memory[GUARD:-GUARD].view(self.shape)
        for row, slot in zip(rows, slots, strict=True):
            if slot >= 0:
                cache[:, slot // self.shape[2], slot % self.shape[2]] = row
        return memory


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:  # [num_values], [num_values]
    assert torch.equal(as_bits(got), as_bits(expected))


@pytest.mark.parametrize("impl", IMPLS)
def test_two_tokens_by_hand(impl: str):
    """Blocks of 2: slot 5 is the second place of block 2, slot 2 the first of block 1."""
    k_cache, v_cache = torch.zeros(1, 3, 2, 1), torch.zeros(1, 3, 2, 1)
    key, value = torch.tensor([[[1.0]], [[2.0]]]), torch.tensor([[[3.0]], [[4.0]]])
    reshape_and_cache(key, value, k_cache, v_cache, torch.tensor([5, 2]), impl=impl)
    assert k_cache.flatten().tolist() == [0, 0, 2, 0, 0, 1]
    assert v_cache.flatten().tolist() == [0, 0, 4, 0, 0, 3]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_rows_arrive_exactly_and_no_other_slot_changes(data: st.DataObject):
    """Any slots in any order, some of them -1; a fresh slot is NaN and stays NaN, and so does the memory around."""
    impl = data.draw(st.sampled_from(IMPLS))
    dtype = data.draw(st.sampled_from(DTYPES))
    num_kv_heads, block_size = data.draw(st.sampled_from([1, 2, 5])), data.draw(st.sampled_from([1, 8, 16]))
    caches = GuardedCaches(num_kv_heads, data.draw(st.integers(1, 6)), block_size, 8, dtype)
    num_slots = caches.shape[1] * block_size
    slots = data.draw(st.lists(st.integers(0, num_slots - 1), unique=True, max_size=2 * block_size + 1))
    for index in data.draw(st.lists(st.integers(0, len(slots)), max_size=3)):
        slots.insert(index, -1)
    key, value = (random_values(len(slots), num_kv_heads, 8, dtype=dtype, seed=seed) for seed in (1, 2))
    caches.write(key, value, slots, impl)
    assert_same_bits(caches.memory[0], caches.expected(key, slots))
    assert_same_bits(caches.memory[1], caches.expected(value, slots))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("num_tokens", [1, 7, 63, 15, 17, 33])
@pytest.mark.parametrize("head_size", [64, 80, 128])
def test_odd_sizes_arrive_exactly(impl: str, num_tokens: int, head_size: int):
    caches = GuardedCaches(3, 5, 16, head_size, torch.bfloat16)
    slots = torch.randperm(80, generator=torch.Generator().manual_seed(0))[:num_tokens].tolist()
    key, value = (random_values(num_tokens, 3, head_size, dtype=torch.bfloat16, seed=seed) for seed in (1, 2))
    caches.write(key, value, slots, impl)
    assert_same_bits(caches.memory[0], caches.expected(key, slots))
    assert_same_bits(caches.memory[1], caches.expected(value, slots))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_step_of_padding_writes_nothing(impl: str):
    caches = GuardedCaches(2, 2, 8, 8, torch.float32)
    rows = random_values(3, 2, 8, dtype=torch.float32)
    caches.write(rows, rows, [-1, -1, -1], impl)
    assert all(memory.isnan().all() for memory in caches.memory)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_step_without_tokens_writes_nothing(impl: str):
    caches = GuardedCaches(2, 2, 8, 8, torch.float32)
    rows = torch.zeros(0, 2, 8)
    caches.write(rows, rows, [], impl)
    assert all(memory.isnan().all() for memory in caches.memory)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_written_slot_is_overwritten_and_its_neighbours_keep_their_rows(impl: str):
    caches = GuardedCaches(2, 2, 4, 8, torch.float32)
    first, second = (random_values(8, 2, 8, dtype=torch.float32, seed=seed) for seed in (1, 2))
    caches.write(first, first, list(range(8)), impl)
    caches.write(second[3:4], second[3:4], [3], impl)
    rows = first.clone()
    rows[3] = second[3]
    assert_same_bits(caches.memory[0], caches.expected(rows, list(range(8))))


@pytest.mark.parametrize("impl", IMPLS)
def test_views_into_a_fused_row_of_query_key_value_are_copied_right(impl: str):
    qkv = random_values(5, 6, 16, dtype=torch.float32)
    key, value = qkv[:, 2:4], qkv[:, 4:6]
    assert not key.is_contiguous()
    caches = GuardedCaches(2, 2, 8, 16, torch.float32)
    caches.write(key, value, [9, -1, 0, 15, 3], impl)
    assert_same_bits(caches.memory[0], caches.expected(key, [9, -1, 0, 15, 3]))
    assert_same_bits(caches.memory[1], caches.expected(value, [9, -1, 0, 15, 3]))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("with_padding", [False, True])
@pytest.mark.parametrize("slot", [16, 17, 2**40, -2, -17, -(2**40)])
def test_a_slot_outside_the_cache_is_refused_and_nothing_outside_is_touched(impl: str, with_padding: bool, slot: int):
    """Negative slots do not count from the end, and padding beside a bad slot does not hide it."""
    caches = GuardedCaches(2, 2, 8, 8, torch.float32)
    slots = [3, slot, -1 if with_padding else 5]
    rows = random_values(3, 2, 8, dtype=torch.float32)
    with pytest.raises(ValueError, match=rf"slot_mapping: expected slots in \[-1, 16\), got {slot}$"):
        caches.write(rows, rows, slots, impl)
    for memory in caches.memory:
        assert memory[:GUARD].isnan().all() and memory[-GUARD:].isnan().all()
    untouched = [s for s in range(16) if s not in slots]
    assert caches.k.flatten(1, 2)[:, untouched].isnan().all()
    assert caches.v.flatten(1, 2)[:, untouched].isnan().all()


def arguments(**changes: Any) -> dict[str, Any]:
    """A call that fits, with changes."""
    rows, cache = torch.zeros(3, 2, 8), torch.zeros(2, 4, 16, 8)
    call = {"key": rows, "value": rows, "k_cache": cache, "v_cache": cache, "slot_mapping": torch.arange(3)}
    return {**call, **changes}


SHAPES = r"key, value: expected \[num_tokens, 2, 8\] as the caches "


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"key": torch.zeros(3, 1, 8)},
            SHAPES + r"\[2, 4, 16, 8\] and \[2, 4, 16, 8\], got \[3, 1, 8\] and \[3, 2, 8\]",
        ),
        ({"key": torch.zeros(3, 2, 4)}, SHAPES + r".*, got \[3, 2, 4\] and \[3, 2, 8\]"),
        ({"value": torch.zeros(2, 2, 8)}, SHAPES + r".*, got \[3, 2, 8\] and \[2, 2, 8\]"),
        ({"v_cache": torch.zeros(2, 5, 16, 8)}, SHAPES + r"\[2, 4, 16, 8\] and \[2, 5, 16, 8\], got"),
        ({"slot_mapping": torch.arange(2)}, r"slot_mapping: expected \[3\] int64, got \[2\] torch.int64"),
        ({"slot_mapping": torch.arange(3).int()}, r"slot_mapping: expected \[3\] int64, got \[3\] torch.int32"),
        (
            {"key": torch.zeros(3, 2, 8).double()},
            r"key, value: expected torch.float32 as the caches, got torch.float64 and torch.float32",
        ),
        (
            {"value": torch.zeros(3, 2, 8).bfloat16()},
            r"key, value: expected torch.float32 as the caches, got torch.float32 and torch.bfloat16",
        ),
        ({"impl": "fast"}, r"impl: expected one of .*, got 'fast'"),
    ],
    ids=["heads", "head_size", "tokens", "caches", "mapping", "mapping dtype", "key dtype", "value dtype", "impl"],
)
def test_every_wrong_argument_is_named_with_both_sides(changes: dict[str, Any], message: str):
    reshape_and_cache(**arguments())
    with pytest.raises(ValueError, match=message):
        reshape_and_cache(**arguments(**changes))
