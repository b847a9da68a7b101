"""The labs about blocks: allocate, append_slot, prefix_hash; their examples, and what the engine makes of them.

Knows no tensor. Listed in catalog.py. Twin in vLLM: none.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from minivllm.core.block_hash import extend_block_hashes
from minivllm.core.block_pool import BlockPool
from minivllm.core.block_table import BlockTable
from minivllm.core.kv_cache_manager import KVCacheManager
from minivllm.core.request import Request
from minivllm.labs.lab import Example, Lab, Mistake, Outcome, small_ones_first

SEED = 20250611  # of every random example of this file
NUM_RANDOM = 40


# ------------------------------------------------------------------ allocate
def pool_with(free_queue: list[int], ref_cnt: list[int], block_hash: dict[int, str]) -> BlockPool:
    """The engine's pool in this state. The queue must be one that the pool could have: blocks with a hash at its right
    end."""
    pool = BlockPool(len(ref_cnt))
    blocks = {block.block_id: block for block in pool.get_new_blocks(len(ref_cnt) - 1)}
    for block_id, name in block_hash.items():
        pool.cache(blocks[block_id], name.encode())
    unhashed = [block_id for block_id in free_queue if block_id not in block_hash]
    hashed = [block_id for block_id in free_queue if block_id in block_hash]
    pool.free(blocks[block_id] for block_id in [*reversed(unhashed), *hashed])
    for block_id, block in blocks.items():
        block.ref_cnt = ref_cnt[block_id]
    return pool


def allocate_in_engine(free_queue: list[int], ref_cnt: list[int], block_hash: dict[int, str], count: int) -> Outcome:
    """As core/kv_cache_manager.py does: look whether there are enough, then take them."""
    pool = pool_with(free_queue, ref_cnt, block_hash)
    enough = count <= pool.num_free_blocks
    blocks = pool.get_new_blocks(count) if enough else []
    return {
        "returns": [block.block_id for block in blocks] if enough else None,
        "free_queue": pool.free_block_ids(),
        "ref_cnt": [block.ref_cnt for block in pool.blocks],
        "block_hash": {block.block_id: block.block_hash.decode() for block in pool.blocks if block.block_hash},
    }


def allocate_examples() -> Iterator[Example]:
    """By hand, then random states of the pool."""

    def state(free_queue: list[int], block_hash: dict[int, str], count: int) -> dict[str, object]:
        ref_cnt = [1] + [int(block_id not in free_queue) for block_id in range(1, 8)]
        return {"free_queue": free_queue, "ref_cnt": ref_cnt, "block_hash": block_hash, "count": count}

    yield Example("Blocks are taken from the left end, and each has one holder now.", state([3, 7, 5], {}, 2))
    yield Example("All that are free may be taken; only more than that is too many.", state([3, 7, 5], {}, 3))
    yield Example("Too few are free: the caller must find everything as it was.", state([3, 7, 5], {}, 4))
    yield Example("Nothing is asked for, nothing is taken; that is an empty list and not None.", state([], {}, 0))
    yield Example(
        "Block 4 held the keys and values of a prefix. Who gets it will overwrite them: its hash must go. The hash of "
        "block 6 stays, because block 6 is not taken.",
        state([2, 4, 6], {4: "a", 6: "b"}, 2),
    )
    yield from small_ones_first(random_pools(random.Random(SEED)))


def random_pools(chance: random.Random) -> Iterator[Example]:
    """States that a pool can be in: what has a hash lies at the right end of the free queue."""
    for _ in range(NUM_RANDOM):
        num_blocks = chance.randint(2, 12)
        ids = chance.sample(range(1, num_blocks), num_blocks - 1)
        hashed = {block_id: f"h{block_id}" for block_id in ids if chance.random() < 0.5}
        free = [block_id for block_id in ids if chance.random() < 0.6]
        free.sort(key=lambda block_id: block_id in hashed)
        ref_cnt = [1] + [0 if block_id in free else chance.randint(1, 3) for block_id in range(1, num_blocks)]
        arguments = {"free_queue": free, "ref_cnt": ref_cnt, "block_hash": hashed, "count": chance.randint(0, 5)}
        yield Example("A random state of the pool: compare what you leave with what is expected.", arguments)


ALLOCATE = Lab(
    name="allocate",
    function="allocate",
    title="hand out free blocks, all or none, the least recently used first",
    engine="minivllm/core/block_pool.py, get_new_blocks",
    examples=allocate_examples,
    expected=allocate_in_engine,
    changes=("free_queue", "ref_cnt", "block_hash"),
    mistakes=(
        Mistake(
            "free_queue.pop(0)",
            "free_queue.pop()",
            "It takes blocks from the right end. What was used last lies there: you give away the prefixes that are "
            "most likely to be asked for again, and keep the old ones.",
        ),
        Mistake(
            "        block_hash.pop(block_id, None)\n",
            "",
            "It leaves the hashes of the blocks that it gives away. A later request would find such a hash, read the "
            "new holder's keys and values as its own prefix, and answer nonsense without any error.",
        ),
        Mistake(
            "    if count > len(free_queue):\n        return None\n    taken = []\n    for _ in range(count):",
            "    taken = []\n    for _ in range(min(count, len(free_queue))):",
            "When too few are free it hands out what there is. The caller cannot go on with a part, and the rest is "
            "lost to everybody: all or none. Look before you take.",
        ),
        Mistake(
            "    if count > len(free_queue):\n        return None\n    taken = []\n    for _ in range(count):",
            "    taken = []\n    for _ in range(count):\n        if not free_queue:\n            return None",
            "It says None when too few are free, but has already taken some: these blocks are held by nobody and free "
            "for nobody, a leak. Look before you take.",
        ),
        Mistake(
            "count > len(free_queue)",
            "count >= len(free_queue)",
            "It refuses when exactly as many blocks are free as are asked for. One block would never be used, and a "
            "request that needs the whole pool would wait for ever.",
        ),
        Mistake(
            "        ref_cnt[block_id] = 1\n",
            "",
            "It does not count the new holder. With ref_cnt 0 a block that is in use looks free, and freeing it would "
            "bring the count below zero.",
        ),
    ),
)


# ------------------------------------------------------------------ append_slot
def append_slot_in_engine(block_table: list[int], num_tokens: int, block_size: int, free_queue: list[int]) -> Outcome:
    """allocate_slots for one more token, and the slot that the table then says."""
    highest = max([*block_table, *free_queue, 1])
    manager = KVCacheManager(highest + 1, block_size, enable_prefix_caching=False)
    blocks = {block.block_id: block for block in manager.pool.get_new_blocks(highest)}
    request = Request("r", [0] * (num_tokens + 1), None)
    request.num_computed_tokens = num_tokens
    table = manager.tables["r"] = BlockTable(block_size)
    table.blocks = [blocks[block_id] for block_id in block_table]
    manager.pool.free(blocks[block_id] for block_id in reversed(free_queue))
    has_room = manager.allocate_slots(request, 1) is not None
    return {
        "returns": table.slot(num_tokens) if has_room else None,
        "block_table": table.block_ids,
        "free_queue": manager.pool.free_block_ids(),
    }


def append_slot_examples() -> Iterator[Example]:
    """By hand, then random tables."""

    def case(about: str, block_table: list[int], num_tokens: int, block_size: int, free_queue: list[int]) -> Example:
        arguments = {"block_table": block_table, "num_tokens": num_tokens, "block_size": block_size}
        return Example(about, {**arguments, "free_queue": free_queue})

    yield case("Position 6 is the third place of the second block of four, and that is block 9.", [4, 9], 6, 4, [2])
    yield case("Position 7 is the last place of block 9: it fits, no new block yet.", [4, 9], 7, 4, [2])
    yield case("Eight tokens fill both blocks: the ninth needs a block of its own.", [4, 9], 8, 4, [2, 5])
    yield case("The first token of a request: it has no block at all.", [], 0, 4, [3])
    yield case("It needs a block and none is free: None, and the table stays.", [4, 9], 8, 4, [])
    yield case("No block is free, but none is needed either.", [4, 9], 5, 4, [])
    chance = random.Random(SEED)
    found = []
    for _ in range(NUM_RANDOM):
        block_size = chance.choice((1, 2, 3, 4, 16))
        ids = chance.sample(range(1, 30), chance.randint(1, 8))
        num_blocks = chance.randint(0, len(ids))
        low = max(0, (num_blocks - 1) * block_size + 1)
        num_tokens = chance.randint(low, num_blocks * block_size) if num_blocks else 0
        found.append(case("A random table.", ids[:num_blocks], num_tokens, block_size, ids[num_blocks:]))
    yield from small_ones_first(found)


APPEND_SLOT = Lab(
    name="append_slot",
    function="append_slot",
    title="the place of the next token: block table, offset, a new block in time",
    engine="minivllm/core/block_table.py, slot; minivllm/core/kv_cache_manager.py, allocate_slots",
    examples=append_slot_examples,
    expected=append_slot_in_engine,
    changes=("block_table", "free_queue"),
    mistakes=(
        Mistake(
            "if num_tokens == len(block_table) * block_size:",
            "if num_tokens + 1 >= len(block_table) * block_size:",
            "It takes a new block one token too early, while the last block still has a free place. The request holds"
            " a block that it may never use, and another one may have to give way for it.",
        ),
        Mistake(
            "block_id * block_size + num_tokens % block_size",
            "num_tokens",
            "It gives the position, not the slot, as if blocks lay one behind the other from 0 on. They lie anywhere: "
            "that is what the block table is for. Two requests would write over each other.",
        ),
        Mistake(
            "block_id * block_size + num_tokens % block_size",
            "block_id + num_tokens % block_size",
            "It adds the block's id to the offset. Block b begins at slot b * block_size.",
        ),
        Mistake(
            "block_id = block_table[num_tokens // block_size]",
            "block_id = block_table[(num_tokens - 1) // block_size]",
            "It looks up the block of the token before. At the first place of a new block that is the wrong one: the "
            "newest token would overwrite the key of the one block_size places earlier.",
        ),
        Mistake(
            "        if not free_queue:\n            return None\n",
            "",
            "It does not ask whether a block is free. When the cache is full that is no error: the caller hears None, "
            "and makes room (lab preempt).",
        ),
        Mistake(
            "free_queue.pop(0)",
            "free_queue.pop()",
            "It takes the new block from the right end of the queue, where the most useful ones lie (lab allocate).",
        ),
    ),
)


# ------------------------------------------------------------------ prefix_hash
def names_of(token_ids: list[int], block_size: int, salt: str | None = None) -> list[bytes]:
    """The engine's hashes of the full blocks."""
    request = Request("r", token_ids, None, cache_salt=salt)
    extend_block_hashes(request, block_size)
    return request.block_hashes


def find_prefix_in_engine(token_ids: list[int], block_size: int, salt: str | None, cached: dict[bytes, int]) -> Outcome:
    """get_computed_blocks of a manager whose pool knows these hashes."""
    manager = KVCacheManager(max([*cached.values(), 1]) + 1, block_size)
    for name, block_id in cached.items():
        manager.pool.cache(manager.pool.blocks[block_id], name)
    found = manager.get_computed_blocks(Request("r", token_ids, None, cache_salt=salt))
    return {"returns": [block.block_id for block in found]}


def find_prefix_examples() -> Iterator[Example]:
    """By hand, then prompts that share beginnings with cached ones."""

    def case(about: str, token_ids: list[int], cached: dict[bytes, int], salt: str | None = None) -> Example:
        return Example(about, {"token_ids": token_ids, "block_size": 2, "salt": salt, "cached": cached})

    first, second, third = names_of([1, 2, 3, 4, 5, 6], 2)
    everything = {first: 8, second: 6, third: 3}
    yield case("Two full blocks are known, and token 5 is left to compute.", [1, 2, 3, 4, 5], everything)
    yield case("Nothing of this prompt is known.", [7, 8, 9], everything)
    yield case(
        "All of the prompt is cached. The last token must be computed all the same, or there are no logits to draw "
        "from; so the block that it is in cannot be used.",
        [1, 2, 3, 4],
        everything,
    )
    yield case(
        "[3, 4] stands at the beginning here, and behind [1, 2] in the cache. Keys and values differ: a block depends "
        "on all that is before it.",
        [3, 4, 5],
        everything,
    )
    yield case(
        "The middle block was evicted. What is behind a gap cannot be used: the prefix ends there.",
        [1, 2, 3, 4, 5, 6, 7],
        {first: 8, third: 3},
    )
    yield case("Another tenant's salt: the same tokens, and yet not the same block.", [1, 2, 3], everything, salt="x")
    salted = dict(zip(names_of([1, 2, 3, 4], 2, "x"), (8, 6), strict=True))
    yield case("The salt goes into the first block; the chain carries it on.", [1, 2, 3, 4, 5], salted, salt="x")
    yield from small_ones_first(random_prompts(random.Random(SEED)))


def random_prompts(chance: random.Random) -> Iterator[Example]:
    """Three prompts of two different tokens, so that they begin alike; most of their blocks are cached."""
    for _ in range(NUM_RANDOM):
        block_size = chance.randint(1, 4)
        prompts = [[chance.randint(0, 1) for _ in range(chance.randint(1, 16))] for _ in range(3)]
        salts = [chance.choice((None, "x")) for _ in prompts]
        names = {
            name for prompt, salt in zip(prompts, salts, strict=True) for name in names_of(prompt, block_size, salt)
        }
        kept = [name for name in sorted(names) if chance.random() < 0.8]
        cached = {name: block_id for block_id, name in enumerate(kept, 1)}
        arguments = {"token_ids": prompts[0], "block_size": block_size, "salt": salts[0], "cached": cached}
        yield Example("A random prompt and a random cache.", arguments)


PREFIX_HASH = Lab(
    name="prefix_hash",
    function="find_prefix",
    title="chained hashes: the longest beginning of a prompt that is in the cache",
    engine="minivllm/core/block_hash.py; minivllm/core/kv_cache_manager.py, get_computed_blocks",
    examples=find_prefix_examples,
    expected=find_prefix_in_engine,
    mistakes=(
        Mistake(
            "parent = hash_block(parent, tokens, salt if index == 0 else None)",
            "parent = hash_block(ROOT_HASH, tokens, salt if index == 0 else None)",
            "It hashes the tokens of each block alone. The key of a token depends on everything before it, so the hash "
            "must too: give each block the hash of the one before it as parent.",
        ),
        Mistake(
            "(len(token_ids) - 1) // block_size",
            "len(token_ids) // block_size",
            "When the whole prompt is cached it uses all of it. Then nothing is left to compute, no logits come out, "
            "and there is nothing to draw the first token from: leave the last token.",
        ),
        Mistake(
            "        if parent not in cached:\n            break\n        blocks.append(cached[parent])",
            "        if parent in cached:\n            blocks.append(cached[parent])",
            "It goes on behind a block that is missing. A prefix has no gaps: the tokens of the missing block would "
            "have no keys, and the request would put the later blocks in their place.",
        ),
        Mistake(
            "salt if index == 0 else None",
            "salt",
            "It puts the salt into every block. The engine puts it into the first only, and the chain of hashes "
            "carries it on; with another rule you look for names that nobody has written.",
        ),
        Mistake(
            "salt if index == 0 else None",
            "None",
            "It ignores the salt. Tenants with different salts would find each other's blocks, and could measure by "
            "the time of an answer what others have asked.",
        ),
    ),
)
