"""Lab: allocate. Hand out blocks of the key/value cache.

The cache is cut into blocks of equal size, and a block is known by its number. Blocks that nobody holds wait in the
free queue. A block may wait there and still hold the keys and values of a prompt that others begin with too: it has a
hash in `block_hash`, and a later request may find it by that. The queue is in the order of use: what lies longest
without being used is at its left end, and is given away first.

The engine does this in minivllm/core/block_pool.py (get_new_blocks) and minivllm/core/kv_cache_manager.py
(allocate_slots). Twin in vLLM: vllm/v1/core/block_pool.py.
"""


def allocate(free_queue: list[int], ref_cnt: list[int], block_hash: dict[int, str], count: int) -> list[int] | None:
    """Take `count` blocks from the left of the free queue.

    Returns their ids in the order in which they were taken, or None when fewer are free; then nothing is changed.

    free_queue: ids of the free blocks; changed in place.
    ref_cnt: ref_cnt[block_id] says how many requests hold the block: 0 while it is free, 1 for its new holder.
    block_hash: block_id -> name of what it holds, for the blocks that can be found. What was in a block is lost when it
        gets a new holder, so nobody may find it any more.

        free_queue = [3, 7, 5]   block_hash = {5: "a", 7: "b"}   ref_cnt = [1, 0, 0, 0, 0, 0, 0, 0]
        allocate(..., count=2)  ->  [3, 7]
        free_queue = [5]         block_hash = {5: "a"}           ref_cnt = [1, 0, 0, 1, 0, 0, 0, 1]
    """
    # --- your code
    if count > len(free_queue):
        return None
    taken = []
    for _ in range(count):
        block_id = free_queue.pop(0)
        block_hash.pop(block_id, None)
        ref_cnt[block_id] = 1
        taken.append(block_id)
    return taken
    # --- end
