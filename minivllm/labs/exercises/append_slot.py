"""Lab: append_slot. Find the place where the next token keeps its key and value.

A request holds a list of blocks, its block table, and its tokens fill them in order. Block ids need not be consecutive.
A slot is a number in the whole cache: block_id * block_size + offset in the block.

    tokens   0 1 2 3 | 4 5 6 7 | 8             block_size 4
    blocks   [  4    ,    9    , 2 ]           token 8 is at slot 2 * 4 + 0 = 8, token 5 at 9 * 4 + 1 = 37

The engine does this in minivllm/core/block_table.py (slot) and minivllm/core/kv_cache_manager.py (allocate_slots).
Twin in vLLM: vllm/v1/core/single_type_kv_cache_manager.py.
"""


def append_slot(block_table: list[int], num_tokens: int, block_size: int, free_queue: list[int]) -> int | None:
    """The slot of the next token, whose position is `num_tokens`; the ones before it have their slots.

    A new block is taken from the left of free_queue, and put at the end of block_table, only when the blocks that the
    request has are full. When it needs one and none is free: None, and nothing is changed.

    block_table, free_queue: block ids; changed in place.
    num_tokens: tokens that the request has so far, in tokens.

        append_slot([4, 9], 6, 4, [2])  ->  38        position 6 is offset 2 of block 9
        append_slot([4, 9], 8, 4, [2])  ->   8        both are full; the table becomes [4, 9, 2]
    """
    # --- your code
    if num_tokens == len(block_table) * block_size:
        if not free_queue:
            return None
        block_table.append(free_queue.pop(0))
    block_id = block_table[num_tokens // block_size]
    return block_id * block_size + num_tokens % block_size
    # --- end
