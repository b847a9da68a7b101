"""KVCacheManager: prefix hits, growth and release on eleven blocks of four tokens.

Block 0 is the null block, so the free queue starts as 1 .. 10. Prompts are ranges: token ids are only names here.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from minivllm.core.block_pool import KVCacheBlock
from minivllm.core.block_table import BlockTable
from minivllm.core.kv_cache_manager import KVCacheManager
from minivllm.core.request import Request
from tests.core.helpers import DRAWN, CountingQueue, ids, lines_executed, make_request

A = range(100, 114)  # 14 tokens: three full blocks and two tokens more
PREFIX = range(100, 112)  # the three full blocks


def make_manager(num_blocks: int = 11, enable_prefix_caching: bool = True) -> KVCacheManager:
    return KVCacheManager(num_blocks, 4, enable_prefix_caching)


def start(manager: KVCacheManager, request: Request, num_tokens: int | None = None) -> list[int] | None:
    """Admit a request as the scheduler does: look up, take blocks for its first tokens, compute them.

    Returns the ids of the hit blocks; None when the pool is short.
    """
    hits = manager.get_computed_blocks(request)
    num_cached = len(hits) * 4
    num_tokens = request.num_tokens - num_cached if num_tokens is None else num_tokens
    if manager.allocate_slots(request, num_tokens, hits) is None:
        return None
    request.num_computed_tokens = num_cached + num_tokens
    return ids(hits)


def decode(manager: KVCacheManager, request: Request, token_id: int = DRAWN) -> list[int]:
    """Draw one token and compute it. Returns the ids of the blocks that were added for it."""
    request.append_output_token(token_id, max_model_len=10_000)
    new_blocks = manager.allocate_slots(request, 1)
    assert new_blocks is not None
    request.num_computed_tokens += 1
    return ids(new_blocks)


def table(manager: KVCacheManager, request: Request) -> list[int]:
    return manager.tables[request.request_id].block_ids


def free_ids(manager: KVCacheManager) -> list[int]:
    return manager.pool.free_block_ids()


def named(manager: KVCacheManager) -> list[int]:
    """The ids of the blocks that a lookup can find."""
    return [block.block_id for block in manager.pool.blocks if block.block_hash is not None]


# ------------------------------------------------------------------ one prefix, from cold to revived
def test_a_prefix_is_computed_shared_freed_and_revived():
    manager = make_manager()

    # Cold: nothing is known. 14 tokens take four blocks, and the three full ones get names.
    a = make_request("a", A)
    assert start(manager, a) == []
    assert table(manager, a) == [1, 2, 3, 4]
    assert named(manager) == [1, 2, 3]

    # Shared: the same twelve tokens, another end. Three blocks are held twice, and only the tail is new.
    b = make_request("b", [*PREFIX, 7, 7, 7])
    assert start(manager, b) == [1, 2, 3]
    assert table(manager, b) == [1, 2, 3, 5]
    assert [manager.pool.blocks[block_id].ref_cnt for block_id in (1, 2, 3, 4, 5)] == [2, 2, 2, 1, 1]

    # a ends: its tail 4 has no name, so it is given away next. The prefix belongs to b still.
    manager.free(a)
    assert free_ids(manager) == [4, 6, 7, 8, 9, 10]

    # b ends: 5 goes to the front. The prefix goes to the back, last block first, so that its head is lost last.
    manager.free(b)
    assert free_ids(manager) == [5, 4, 6, 7, 8, 9, 10, 3, 2, 1]

    # Revived: freed is not empty. c finds all three blocks, out of the middle of the queue.
    c = make_request("c", [*PREFIX, 8])
    assert start(manager, c) == [1, 2, 3]
    assert table(manager, c) == [1, 2, 3, 5]
    assert free_ids(manager) == [4, 6, 7, 8, 9, 10]
    manager.check_integrity()

    # A request too large for what is free beside c evicts nothing; after c it takes everything, oldest first.
    manager.free(c)
    d = make_request("d", range(500, 537))  # 37 tokens: ten blocks
    assert start(manager, d) == []
    assert table(manager, d) == [5, 4, 6, 7, 8, 9, 10, 3, 2, 1]
    assert manager.get_computed_blocks(make_request("e", A)) == []  # the prefix is gone


def test_the_tail_of_a_prefix_is_lost_before_its_head():
    manager = make_manager()
    a = make_request("a", A)
    start(manager, a)
    manager.free(a)
    assert free_ids(manager) == [4, 5, 6, 7, 8, 9, 10, 3, 2, 1]
    filler = make_request("filler", range(500, 532))  # eight blocks: the seven without a name, and 3
    start(manager, filler)
    assert ids(manager.get_computed_blocks(make_request("b", A))) == [1, 2]


def test_the_prefix_that_was_used_least_recently_goes_first():
    manager = make_manager()
    old, new = make_request("old", range(9)), make_request("new", range(50, 59))  # two full blocks and a token each
    start(manager, old)
    start(manager, new)
    manager.free(old)
    manager.free(new)
    again = make_request("again", range(9))
    assert start(manager, again) == [1, 2]  # old is used once more
    manager.free(again)
    # without a name first: 6, 3 and the unused ones; then new's tail and head, then old's
    assert free_ids(manager) == [6, 3, 7, 8, 9, 10, 5, 4, 2, 1]
    start(manager, make_request("filler", range(500, 532)))  # eight blocks
    assert manager.get_computed_blocks(make_request("x", range(50, 59))) == []
    assert ids(manager.get_computed_blocks(make_request("y", range(9)))) == [1, 2]


# ------------------------------------------------------------------ what a lookup may find
@pytest.mark.parametrize(
    ("num_tokens", "num_hits"), [(1, 0), (3, 0), (4, 0), (5, 1), (7, 1), (8, 1), (9, 2), (12, 2), (13, 3), (14, 3)]
)
def test_one_token_is_always_computed(num_tokens: int, num_hits: int):
    """At most (num_tokens - 1) // block_size blocks: the logits of the last token are needed, and they are not cached.
    An exact multiple computes its last block again."""
    manager = make_manager()
    start(manager, make_request("a", A))
    hits = manager.get_computed_blocks(make_request("b", A[:num_tokens]))
    assert ids(hits) == [1, 2, 3][:num_hits]
    assert num_tokens - 4 * num_hits >= 1


def test_a_full_hit_of_exactly_two_blocks_still_computes_four_tokens():
    manager = make_manager()
    first, second = make_request("first", range(100, 108)), make_request("second", range(100, 108))
    start(manager, first)
    assert named(manager) == [1, 2]
    assert start(manager, second) == [1]
    assert table(manager, second) == [1, 3]  # a block of its own for the second half


def test_identical_blocks_are_kept_apart_so_that_tables_only_grow():
    manager = make_manager()
    first, second = make_request("first", range(100, 108)), make_request("second", range(100, 108))
    start(manager, first)
    start(manager, second)
    assert manager.pool.blocks[2].block_hash == manager.pool.blocks[3].block_hash
    assert table(manager, first) == [1, 2] and table(manager, second) == [1, 3]
    third = make_request("third", range(100, 110))
    assert ids(manager.get_computed_blocks(third)) == [1, 2]  # the oldest copy
    manager.free(first)
    assert free_ids(manager) == [4, 5, 6, 7, 8, 9, 10, 2]
    start(manager, make_request("filler", range(500, 532)))  # takes 2, the freed copy, as well
    assert ids(manager.get_computed_blocks(third)) == [1, 3]  # the other copy is as good


def test_a_lookup_ends_at_the_first_block_that_is_missing():
    manager = make_manager()
    start(manager, make_request("a", A))
    manager.pool.evict(manager.pool.blocks[2])
    assert ids(manager.get_computed_blocks(make_request("b", A))) == [1]  # 3 is there, but not what comes before it


def test_a_lookup_holds_nothing_and_moves_nothing():
    manager = make_manager()
    a = make_request("a", A)
    start(manager, a)
    manager.free(a)
    before = free_ids(manager)
    assert ids(manager.get_computed_blocks(make_request("b", A))) == [1, 2, 3]
    assert free_ids(manager) == before
    assert all(block.ref_cnt == 0 for block in manager.pool.blocks[1:])


def test_generated_tokens_are_cached_like_prompt_tokens():
    manager = make_manager()
    a = make_request("a", range(100, 106))
    start(manager, a)
    for token_id in (50, 51, 52):
        decode(manager, a, token_id)
    assert named(manager) == [1, 2]  # 2 holds two tokens of the prompt and two drawn ones
    manager.free(a)
    next_turn = make_request("next turn", [*range(100, 106), 50, 51, 52, 53])
    assert ids(manager.get_computed_blocks(next_turn)) == [1, 2]


def test_salted_requests_share_with_their_own_salt_only():
    manager = make_manager()
    assert start(manager, make_request("a", A[:9], cache_salt="tenant 1")) == []
    assert start(manager, make_request("b", A[:9], cache_salt="tenant 2")) == []
    assert start(manager, make_request("c", A[:9])) == []
    assert start(manager, make_request("d", A[:9], cache_salt="tenant 1")) == [1, 2]


def test_who_needs_every_position_reads_nothing_from_the_cache_but_fills_it():
    """Prompt logprobs, and pooling over all rows."""
    manager = make_manager()
    start(manager, make_request("a", A))
    careful = make_request("careful", [*PREFIX, 1, 2, 3, 4], skip_prefix_cache=True)
    assert start(manager, careful) == []
    assert table(manager, careful) == [5, 6, 7, 8]
    assert start(manager, make_request("b", [*PREFIX, 1, 2, 3, 4, 5])) == [1, 2, 3, 8]  # 8 is careful's work


def test_without_prefix_caching_nothing_is_named_and_nothing_is_found():
    manager = make_manager(enable_prefix_caching=False)
    a, b = make_request("a", A), make_request("b", A)
    assert start(manager, a) == [] and start(manager, b) == []
    assert named(manager) == [] and a.block_hashes == []
    manager.free(a)
    assert free_ids(manager) == [1, 2, 3, 4, 9, 10]  # all without a name: to the front, last first


# ------------------------------------------------------------------ growth
def test_a_request_gets_a_block_when_its_last_one_is_full_and_not_before():
    manager = make_manager()
    a = make_request("a", range(100, 103))
    start(manager, a)
    added = [decode(manager, a) for _ in range(6)]
    assert added == [[], [2], [], [], [], [3]]  # tokens 4, 5, 6, 7, 8, 9
    assert table(manager, a) == [1, 2, 3]


def test_a_block_is_named_by_the_step_that_fills_it():
    manager = make_manager()
    a = make_request("a", A)
    start(manager, a, num_tokens=6)  # a chunk
    assert (table(manager, a), named(manager)) == ([1, 2], [1])
    manager.allocate_slots(a, 2)
    a.num_computed_tokens += 2
    assert (table(manager, a), named(manager)) == ([1, 2], [1, 2])  # no new block, but 2 is full now
    manager.allocate_slots(a, 6)
    assert (table(manager, a), named(manager)) == ([1, 2, 3, 4], [1, 2, 3])


def test_a_shortage_is_none_and_changes_nothing():
    manager = make_manager()
    a, b = make_request("a", A), make_request("b", [*PREFIX, *range(500, 529)])  # 41 tokens: 3 hits, 8 new, 6 free
    start(manager, a)
    before = (free_ids(manager), named(manager), [block.ref_cnt for block in manager.pool.blocks])
    hits = manager.get_computed_blocks(b)
    assert manager.allocate_slots(b, 29, hits) is None
    assert (free_ids(manager), named(manager), [block.ref_cnt for block in manager.pool.blocks]) == before
    assert "b" not in manager.tables

    start(manager, make_request("c", range(700, 724)))  # the other six
    a.all_token_ids += [7, 7, 7]
    assert manager.allocate_slots(a, 3) is None  # two fit into block 4, the third does not
    assert table(manager, a) == [1, 2, 3, 4] and named(manager) == [1, 2, 3, 5, 6, 7, 8, 9, 10]
    assert ids(manager.allocate_slots(a, 2)) == []
    manager.check_integrity()


def test_reviving_a_hit_uses_up_a_free_block():
    """Three hits in the free queue and nothing else free: taking them leaves no block for the tail. Counting only the
    new blocks, the request would be let in and then ask an empty queue."""
    manager = make_manager()
    a = make_request("a", A)
    start(manager, a)
    manager.free(a)
    start(manager, make_request("filler", range(500, 528)))  # the seven blocks without a name
    assert free_ids(manager) == [3, 2, 1]
    b = make_request("b", [*PREFIX, 1])
    assert manager.num_blocks_for_whole(b, manager.get_computed_blocks(b)) == 4
    assert start(manager, b) is None
    assert free_ids(manager) == [3, 2, 1]

    holder = make_request("holder", A[:9])
    assert start(manager, holder) == [1, 2]  # two revived, and 3 is evicted for the last token
    assert table(manager, holder) == [1, 2, 3]
    c = make_request("c", A[:9])
    assert manager.num_blocks_for_whole(c, manager.get_computed_blocks(c)) == 1  # hits that are held cost nothing
    assert start(manager, c) is None
    manager.check_integrity()


def test_blocks_for_the_whole_request_and_not_for_its_first_chunk():
    manager = make_manager()
    a = make_request("a", A)
    assert manager.num_blocks_for_whole(a, []) == 4
    start(manager, a)
    longer = make_request("longer", [*PREFIX, *range(8)])  # 20 tokens, 12 of them in a's blocks
    assert manager.num_blocks_for_whole(longer, manager.get_computed_blocks(longer)) == 2


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_blocks_are_counted_upwards(num_tokens: int, num_blocks: int):
    assert make_manager().num_blocks_for(num_tokens) == num_blocks


def test_the_pool_holds_what_the_blocks_beside_the_null_block_hold():
    assert make_manager().num_usable_tokens == 40


def test_a_table_knows_the_slot_of_every_token():
    manager = make_manager()
    start(manager, make_request("other", range(500, 505)))  # takes 1 and 2
    a = make_request("a", A)
    start(manager, a)
    blocks: BlockTable = manager.tables["a"]
    assert blocks.block_ids == [3, 4, 5, 6] and len(blocks) == 4 and blocks.num_slots == 16
    assert [blocks.slot(position) for position in (0, 3, 4, 13)] == [12, 15, 16, 25]


# ------------------------------------------------------------------ release
def test_names_of_a_step_that_was_never_computed_are_forgotten():
    """A block is named when the step that fills it is scheduled. If the step fails, or the request leaves before it
    ran, the name would stand for slots that nobody wrote."""
    manager = make_manager()
    a = make_request("a", A)
    start(manager, a, num_tokens=6)
    manager.allocate_slots(a, 8)  # scheduled, and never computed: num_computed_tokens stays 6
    assert named(manager) == [1, 2, 3]
    manager.free(a)
    assert named(manager) == [1]  # 2 was half computed, 3 not at all
    assert free_ids(manager) == [2, 3, 4, 5, 6, 7, 8, 9, 10, 1]
    manager.check_integrity()


def test_the_name_that_a_failed_step_gave_is_taken_from_a_sharer_too():
    """In the step that computes a's prefix, b already shares it. Then a's part of the step fails."""
    manager = make_manager()
    a, b = make_request("a", A), make_request("b", [*PREFIX, 5])
    manager.allocate_slots(a, 14, [])
    hits = manager.get_computed_blocks(b)
    assert ids(hits) == [1, 2, 3]  # every layer writes all keys before anybody reads
    manager.allocate_slots(b, 1, hits)
    manager.free(a)
    assert named(manager) == []
    assert manager.get_computed_blocks(make_request("c", A)) == []
    manager.free(b)
    assert free_ids(manager) == [1, 2, 3, 5, 4, 6, 7, 8, 9, 10]  # none has a name: each to the front
    manager.check_integrity()


def test_freeing_twice_or_a_stranger_does_nothing():
    manager = make_manager()
    a, b = make_request("a", A), make_request("b", A)
    start(manager, a)
    start(manager, b)
    manager.free(a)
    before = free_ids(manager)
    manager.free(a)
    manager.free(make_request("stranger", A))
    assert free_ids(manager) == before and table(manager, b) == [1, 2, 3, 5]
    manager.check_integrity()


# ------------------------------------------------------------------ contradictions
def held_but_uncounted(manager: KVCacheManager) -> None:
    manager.tables["a"].blocks.append(manager.pool.blocks[2])  # a second table without a second ref_cnt


def counted_but_not_held(manager: KVCacheManager) -> None:
    manager.pool.touch([manager.pool.blocks[2]])


def table_lost(manager: KVCacheManager) -> None:
    del manager.tables["a"]


def pool_broken(manager: KVCacheManager) -> None:
    manager.pool.blocks[2].block_hash = None


CONTRADICTIONS: dict[Callable[[KVCacheManager], None], str] = {
    held_but_uncounted: r"KVCacheBlock\(2, ref_cnt=1, .*\) is in 2 block tables",
    counted_but_not_held: r"KVCacheBlock\(2, ref_cnt=2, .*\) is in 1 block tables",
    table_lost: r"KVCacheBlock\(1, ref_cnt=1, .*\) is in 0 block tables",
    pool_broken: "2 blocks have a hash, the cache knows 3",
}


@pytest.mark.parametrize("plant", CONTRADICTIONS, ids=lambda plant: plant.__name__)
def test_check_integrity_names_the_contradiction(plant: Callable[[KVCacheManager], None]):
    manager = make_manager()
    start(manager, make_request("a", A))
    manager.check_integrity()
    plant(manager)
    with pytest.raises(RuntimeError, match=CONTRADICTIONS[plant]):
        manager.check_integrity()


# ------------------------------------------------------------------ cost
def whole_life(manager: KVCacheManager) -> list[KVCacheBlock]:
    """Admit, grow, share, free and find again."""
    a, b = make_request("a", A), make_request("b", A)
    start(manager, a)
    for _ in range(5):
        decode(manager, a)
    start(manager, b)
    manager.free(a)
    manager.free(b)
    return manager.get_computed_blocks(make_request("c", A))


def test_the_cost_of_a_life_does_not_depend_on_the_size_of_the_pool():
    counts = []
    for num_blocks in (11, 1_000, 100_000):
        manager = make_manager(num_blocks)
        manager.pool._free = queue = CountingQueue(manager.pool._free)
        lines = lines_executed(lambda manager=manager: whole_life(manager))
        counts.append((lines, queue.num_calls - (num_blocks - 1)))  # the copy above counted its entries
        assert queue.num_entries_walked == 0
    assert counts[0] == counts[1] == counts[2]


def test_a_decode_step_inside_a_block_touches_no_block():
    manager = make_manager()
    a = make_request("a", range(100, 105))
    start(manager, a)
    manager.pool._free = queue = CountingQueue(manager.pool._free)
    queue.num_calls = 0
    assert [decode(manager, a) for _ in range(2)] == [[], []]
    assert queue.num_calls == 0


def test_the_cost_of_a_decode_step_does_not_grow_with_the_context():
    """Whatever is already hashed and held is not looked at again."""
    costs = []
    for num_prompt_tokens in (9, 4_001):
        manager = make_manager(num_blocks=2_000)
        a = make_request("a", range(num_prompt_tokens))
        start(manager, a)
        costs.append(lines_executed(lambda manager=manager, a=a: [decode(manager, a) for _ in range(8)]))
    assert costs[0] == costs[1]
