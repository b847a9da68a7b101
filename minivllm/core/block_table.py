"""BlockTable: the blocks of one request, in token order.

    tokens   0 .. 15 | 16 .. 31 | 32 .. 36        block_size 16
    blocks     [ 4 ,      9 ,        2 ]
    slot of token 33  =  2 * 16 + 1

Append-only while the request runs, so the worker only ever hears of new ids.
Knows no pool and no hash. Owned by kv_cache_manager.py.
Twin in vLLM: req_to_blocks of vllm/v1/core/single_type_kv_cache_manager.py.
"""

from __future__ import annotations

from minivllm.core.block_pool import KVCacheBlock


class BlockTable:
    __slots__ = ("block_size", "blocks", "num_cached_blocks")

    def __init__(self, block_size: int):
        self.block_size = block_size
        self.blocks: list[KVCacheBlock] = []
        self.num_cached_blocks = 0  # the leading blocks that carry their hash

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def num_slots(self) -> int:
        return len(self.blocks) * self.block_size

    @property
    def block_ids(self) -> list[int]:
        return [block.block_id for block in self.blocks]

    def slot(self, position: int) -> int:
        """Where the token at `position` keeps its key and value."""
        return self.blocks[position // self.block_size].block_id * self.block_size + position % self.block_size
