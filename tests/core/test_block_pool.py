"""BlockPool: who is given away next, what survives being freed, and what check_integrity catches.

Eleven blocks, of which block 0 is the null block: the free queue starts as 1 .. 10.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from minivllm.core.block_pool import BlockPool, KVCacheBlock
from tests.core.helpers import CountingQueue, ids, lines_executed

ALL = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]


def cached_pool(*names: str) -> tuple[BlockPool, list[KVCacheBlock]]:
    """A pool of 11 in which block i + 1 is held once and carries the i-th name."""
    pool = BlockPool(11)
    blocks = pool.get_new_blocks(len(names))
    for block, name in zip(blocks, names, strict=True):
        pool.cache(block, name.encode())
    return pool, blocks


# ------------------------------------------------------------------ taking
def test_blocks_are_given_away_in_order_and_the_null_block_never():
    pool = BlockPool(11)
    assert pool.free_block_ids() == ALL  # block 0 pads block tables
    assert ids(pool.get_new_blocks(3)) == [1, 2, 3]
    assert ids(pool.get_new_blocks(7)) == [4, 5, 6, 7, 8, 9, 10]
    assert pool.free_block_ids() == []
    assert pool.null_block.block_id == 0 and pool.null_block.ref_cnt == 1
    pool.check_integrity()


def test_usage_is_the_share_of_the_blocks_that_requests_can_hold():
    pool = BlockPool(11)
    assert (pool.usage, pool.num_free_blocks) == (0.0, 10)
    blocks = pool.get_new_blocks(5)
    assert (pool.usage, pool.num_free_blocks) == (0.5, 5)  # of ten: the null block does not count
    pool.cache(blocks[0], b"a")
    pool.free(blocks)
    assert (pool.usage, pool.num_free_blocks) == (0.0, 10)  # a cached block can be handed out, so it is free
    pool.get_new_blocks(10)
    assert pool.usage == 1.0


def test_asking_for_more_than_there_is_changes_nothing():
    pool, [a] = cached_pool("a")
    pool.free([a])
    with pytest.raises(ValueError, match="asked for 11 blocks, 10 are free"):
        pool.get_new_blocks(11)
    assert pool.free_block_ids() == [2, 3, 4, 5, 6, 7, 8, 9, 10, 1]
    assert pool.find(b"a") is a  # nothing was evicted on the way to the refusal
    assert pool.get_new_blocks(0) == []


def test_a_pool_without_a_usable_block_is_refused():
    with pytest.raises(ValueError, match="at least 2 .*null block.*, got 1"):
        BlockPool(1)
    assert BlockPool(2).free_block_ids() == [1]


# ------------------------------------------------------------------ giving back
def test_unhashed_blocks_go_to_the_front_and_hashed_ones_to_the_back():
    pool, [a, b] = cached_pool("a", "b")
    c, d = pool.get_new_blocks(2)
    pool.free([d, c, b, a])  # a request lets go of its blocks last-first
    # d, then c were put in front: nothing is lost by giving them away. b, then a at the back: kept as long as possible,
    # and the tail b goes before the head a, without which it would be useless.
    assert pool.free_block_ids() == [3, 4, 5, 6, 7, 8, 9, 10, 2, 1]


def test_a_block_is_free_when_its_last_holder_lets_go():
    pool, [a] = cached_pool("a")
    pool.touch([a])
    assert a.ref_cnt == 2
    pool.free([a])
    assert a.ref_cnt == 1 and pool.free_block_ids() == [2, 3, 4, 5, 6, 7, 8, 9, 10]
    pool.free([a])
    assert a.ref_cnt == 0 and pool.free_block_ids() == [2, 3, 4, 5, 6, 7, 8, 9, 10, 1]


def test_a_freed_full_block_keeps_its_content_until_it_is_given_away():
    pool, [a] = cached_pool("a")
    pool.free([a])
    assert pool.find(b"a") is a
    assert ids(pool.get_new_blocks(9)) == [2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert pool.find(b"a") is a  # nine times somebody else was given away
    assert ids(pool.get_new_blocks(1)) == [1]
    assert pool.find(b"a") is None and a.block_hash is None  # the new owner overwrites it


def test_a_freed_full_block_is_revived_from_the_middle_of_the_queue():
    pool, [a, b, c] = cached_pool("a", "b", "c")
    pool.free([c, b, a])
    assert pool.free_block_ids() == [4, 5, 6, 7, 8, 9, 10, 3, 2, 1]
    pool.touch([b])
    assert b.ref_cnt == 1
    assert pool.free_block_ids() == [4, 5, 6, 7, 8, 9, 10, 3, 1]  # no longer up for grabs
    assert pool.find(b"b") is b  # and still findable for the next one
    pool.check_integrity()


def test_the_least_recently_used_prefix_is_evicted_first():
    pool, [a, b, c] = cached_pool("a", "b", "c")
    pool.free([a])
    pool.free([b])
    pool.free([c])
    pool.touch([a])
    pool.free([a])  # used again: now the youngest
    assert pool.free_block_ids() == [4, 5, 6, 7, 8, 9, 10, 2, 3, 1]
    pool.get_new_blocks(7)  # the never used ones: nothing is forgotten
    assert [pool.find(name) for name in (b"a", b"b", b"c")] == [a, b, c]
    pool.get_new_blocks(1)
    assert [pool.find(name) for name in (b"a", b"b", b"c")] == [a, None, c]
    pool.get_new_blocks(1)
    assert [pool.find(name) for name in (b"a", b"b", b"c")] == [a, None, None]


# ------------------------------------------------------------------ names
def test_identical_blocks_are_not_merged_and_the_oldest_answers():
    pool, [first, second] = cached_pool("same", "same")
    assert pool.num_cached_blocks == 2
    assert pool.find(b"same") is first
    pool.evict(first)
    assert pool.find(b"same") is second  # evicting one copy must not hide the other
    pool.evict(second)
    assert pool.find(b"same") is None and pool.num_cached_blocks == 0
    pool.check_integrity()


def test_evicting_a_nameless_block_does_nothing():
    pool = BlockPool(11)
    [block] = pool.get_new_blocks(1)
    pool.evict(block)
    assert block.block_hash is None and block.ref_cnt == 1
    pool.check_integrity()


def test_an_evicted_block_that_somebody_holds_stays_his():
    pool, [a] = cached_pool("a")
    pool.evict(a)
    assert a.ref_cnt == 1 and 1 not in pool.free_block_ids()
    pool.free([a])
    assert pool.free_block_ids() == ALL  # nameless now, so it is in front again


def test_a_reset_forgets_every_prefix_and_is_refused_while_a_block_is_held():
    pool, [a, b] = cached_pool("a", "b")
    pool.free([a])
    assert pool.reset_prefix_cache() is False
    assert pool.find(b"a") is a and pool.find(b"b") is b  # refused as a whole, not half done
    pool.free([b])
    assert pool.reset_prefix_cache() is True
    assert pool.num_cached_blocks == 0
    assert pool.find(b"a") is None and pool.find(b"b") is None
    assert a.block_hash is None and pool.num_free_blocks == 10
    pool.check_integrity()


def test_a_block_tells_who_it_is():
    pool, [a] = cached_pool("abcd")
    assert repr(a) == "KVCacheBlock(1, ref_cnt=1, hash=61626364)"
    assert repr(pool.blocks[2]) == "KVCacheBlock(2, ref_cnt=0, hash=None)"


# ------------------------------------------------------------------ contradictions
def hold_and_free(pool: BlockPool) -> None:
    pool._free[1] = pool.blocks[1]


def lose(pool: BlockPool) -> None:
    del pool._free[7]


def free_twice(pool: BlockPool) -> None:
    pool.blocks[7].ref_cnt = -1


def name_without_entry(pool: BlockPool) -> None:
    pool.blocks[2].block_hash = b"never cached"


def wrong_name(pool: BlockPool) -> None:
    pool.blocks[1].block_hash = b"b"


def entry_without_name(pool: BlockPool) -> None:
    pool.blocks[1].block_hash = None


def null_block_held(pool: BlockPool) -> None:
    pool.null_block.ref_cnt += 1


def null_block_free(pool: BlockPool) -> None:
    pool._free[0] = pool.null_block


def null_block_named(pool: BlockPool) -> None:
    pool.cache(pool.null_block, b"null")


CONTRADICTIONS: dict[Callable[[BlockPool], None], str] = {
    hold_and_free: r"KVCacheBlock\(1, ref_cnt=1, .*\) is in the free queue",
    lose: r"KVCacheBlock\(7, ref_cnt=0, .*\) is not in the free queue",
    free_twice: r"KVCacheBlock\(7, ref_cnt=-1, .*\) is in the free queue",
    name_without_entry: r"KVCacheBlock\(2, .*\) has a hash that the cache does not know",
    wrong_name: r"KVCacheBlock\(1, .*\) has a hash that the cache does not know",
    entry_without_name: "0 blocks have a hash, the cache knows 1",
    null_block_held: r"the null block was given away: KVCacheBlock\(0, ref_cnt=2",
    null_block_free: r"the null block was given away: KVCacheBlock\(0, ref_cnt=1",
    null_block_named: r"the null block was given away: KVCacheBlock\(0, ref_cnt=1, hash=6e756c6c",
}


@pytest.mark.parametrize("plant", CONTRADICTIONS, ids=lambda plant: plant.__name__)
def test_check_integrity_names_the_contradiction(plant: Callable[[BlockPool], None]):
    pool, _ = cached_pool("a")
    pool.check_integrity()  # sound so far
    plant(pool)
    with pytest.raises(RuntimeError, match=CONTRADICTIONS[plant]):
        pool.check_integrity()


# ------------------------------------------------------------------ cost
def every_operation(pool: BlockPool) -> None:
    """Take, name, find, revive, let go and evict: eight blocks through the whole life of a block."""
    blocks = pool.get_new_blocks(8)
    for number, block in enumerate(blocks[:6]):
        pool.cache(block, b"%d" % number)
    pool.free(reversed(blocks))
    for number in (3, 1, 4):
        pool.touch([pool.find(b"%d" % number)])
    pool.free(blocks[index] for index in (4, 1, 3))
    pool.evict(blocks[5])
    assert 0.0 <= pool.usage <= 1.0 and pool.num_free_blocks


def test_the_cost_of_an_operation_does_not_depend_on_the_size_of_the_pool():
    lines, calls = [], []
    for num_blocks in (11, 1_000, 100_000):
        pool = BlockPool(num_blocks)
        pool._free = queue = CountingQueue(pool._free)
        queue.num_calls = 0
        lines.append(lines_executed(lambda pool=pool: every_operation(pool)))
        calls.append(queue.num_calls)
        assert queue.num_entries_walked == 0  # nobody searches the queue
    assert lines[0] == lines[1] == lines[2]
    # 8 taken; 8 put in, 2 of them moved to the front; 3 revived from the middle and put in again
    assert calls == [8 + 8 + 2 + 3 + 3] * 3
