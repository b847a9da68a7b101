"""Lab: prefix_hash. Find the part of a prompt that is already in the cache.

The key and value of a token depend on all tokens before it, so a block may be shared only by requests that agree on
everything up to its end. A hash says that in 32 bytes: the hash of a block is made of its tokens and of the hash of the
block before it. Only full blocks have one.

    hash(block 0) = hash_block(ROOT_HASH, tokens of block 0, salt)      the salt keeps tenants apart
    hash(block i) = hash_block(hash(block i-1), tokens of block i)      the chain spreads it

The engine does this in minivllm/core/block_hash.py and minivllm/core/kv_cache_manager.py (get_computed_blocks).
Twin in vLLM: hash_block_tokens in vllm/v1/core/kv_cache_utils.py.
"""

from minivllm.core.block_hash import ROOT_HASH, hash_block


def find_prefix(token_ids: list[int], block_size: int, salt: str | None, cached: dict[bytes, int]) -> list[int]:
    """Ids of the blocks that hold the longest cached beginning of `token_ids`.

    At least one token must be left to compute, because only computing it gives logits to draw from.

    cached: hash -> block id, of all full blocks that are in the cache now. Blocks are evicted one by one, so it may
        hold a block whose predecessor is gone.
    salt: None, or a text that only requests of the same tenant share.

        find_prefix([1, 2, 3, 4, 5], 2, None, cached)  ->  [8, 6]     when [1, 2] is block 8 and [3, 4] behind it is 6
        find_prefix([1, 2, 3, 4], 2, None, cached)     ->  [8]        token 4 must be computed, so its block is not used
    """
    # --- your code
    blocks = []
    parent = ROOT_HASH
    for index in range((len(token_ids) - 1) // block_size):
        tokens = token_ids[index * block_size : (index + 1) * block_size]
        parent = hash_block(parent, tokens, salt if index == 0 else None)
        if parent not in cached:
            break
        blocks.append(cached[parent])
    return blocks
    # --- end
