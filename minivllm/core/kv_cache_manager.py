"""KVCacheManager: gives requests their blocks, and finds prefixes that are already computed.

    get_computed_blocks   the longest known prefix of a waiting request
    allocate_slots        blocks for the tokens of this step, or None when the pool is short
    cache_blocks          names for what accepted drafts have filled
    free                  the one way back, for finished, aborted, failed and preempted requests

A block gets its hash when the step that fills it is scheduled, so that two requests with one prompt share it
even in the same step (every layer writes all keys before anybody reads). Should that step never be computed,
free() forgets the hashes beyond num_computed_tokens: a hash only outlives its request on computed content.
Drafts get room but no hash: a block that holds some is named once they are tokens of the request.

Knows no queue, no budget and no tensor. Called by scheduler.py.
Twin in vLLM: vllm/v1/core/kv_cache_manager.py.
"""

from __future__ import annotations

from minivllm.core.block_hash import extend_block_hashes
from minivllm.core.block_pool import BlockPool, KVCacheBlock
from minivllm.core.block_table import BlockTable
from minivllm.core.request import Request


class KVCacheManager:
    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True):
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.pool = BlockPool(num_blocks)
        self.tables: dict[str, BlockTable] = {}

    @property
    def num_usable_tokens(self) -> int:
        """What the whole pool can hold."""
        return (self.pool.num_blocks - 1) * self.block_size

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def get_computed_blocks(self, request: Request) -> list[KVCacheBlock]:
        """Blocks of the request's longest cached prefix.

        At most (num_tokens - 1) // block_size of them: the last token is always computed, because its logits are
        needed. Empty when the request must see every position. Changes nothing but the request's hashes.
        """
        if not self.enable_prefix_caching or request.skip_prefix_cache:
            return []
        extend_block_hashes(request, self.block_size)
        blocks = []
        for block_hash in request.block_hashes[: (request.num_tokens - 1) // self.block_size]:
            block = self.pool.find(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def allocate_slots(
        self,
        request: Request,
        num_new_tokens: int,
        computed_blocks: list[KVCacheBlock] | None = None,
        num_draft_tokens: int = 0,
    ) -> list[KVCacheBlock] | None:
        """Make room for the next `num_new_tokens` tokens and the drafts behind them; returns the added blocks.

        `computed_blocks` come from get_computed_blocks and are held from here on. None, and nothing changed,
        when the pool is short.
        """
        table = self.tables.get(request.request_id)
        num_computed = request.num_computed_tokens
        if computed_blocks:
            num_computed = len(computed_blocks) * self.block_size
        num_needed = self.num_blocks_for(num_computed + num_new_tokens + num_draft_tokens)
        num_owned = len(table.blocks) if table else 0
        num_missing = num_needed - num_owned
        if num_missing <= 0:
            self._cache_full_blocks(request, table, num_computed + num_new_tokens)
            return []
        computed_blocks = computed_blocks or []
        # Reviving a hit that lies in the free queue uses up a free block as well.
        num_revived = sum(block.ref_cnt == 0 for block in computed_blocks)
        if num_missing - len(computed_blocks) + num_revived > self.pool.num_free_blocks:
            return None
        if table is None:
            table = self.tables[request.request_id] = BlockTable(self.block_size)
        self.pool.touch(computed_blocks)
        new_blocks = computed_blocks + self.pool.get_new_blocks(num_missing - len(computed_blocks))
        table.num_cached_blocks += len(computed_blocks)
        table.blocks += new_blocks
        self._cache_full_blocks(request, table, num_computed + num_new_tokens)
        return new_blocks

    def cache_blocks(self, request: Request) -> None:
        """Name the blocks that accepted drafts have filled."""
        self._cache_full_blocks(request, self.tables[request.request_id], request.num_computed_tokens)

    def num_blocks_for_whole(self, request: Request, computed_blocks: list[KVCacheBlock]) -> int:
        """Free blocks that all the tokens the request has now would take, not only this step's chunk: new ones, and
        hits that lie in the free queue."""
        num_missing = self.num_blocks_for(request.num_tokens) - len(computed_blocks)
        return num_missing + sum(block.ref_cnt == 0 for block in computed_blocks)

    def free(self, request: Request) -> None:
        """Give all blocks of the request back, last one first, so that a prefix's tail is lost before its head."""
        table = self.tables.pop(request.request_id, None)
        if table is None:
            return
        num_computed_blocks = request.num_computed_tokens // self.block_size
        for block in table.blocks[num_computed_blocks : table.num_cached_blocks]:
            self.pool.evict(block)
        self.pool.free(reversed(table.blocks))

    def check_integrity(self) -> None:
        """The pool's own check, and: a block's ref_cnt is the number of tables that hold it."""
        self.pool.check_integrity()
        counts = [0] * self.pool.num_blocks
        for table in self.tables.values():
            for block in table.blocks:
                counts[block.block_id] += 1
        for block in self.pool.blocks[1:]:
            if block.ref_cnt != counts[block.block_id]:
                raise RuntimeError(f"{block} is in {counts[block.block_id]} block tables")

    def _cache_full_blocks(self, request: Request, table: BlockTable | None, num_tokens: int) -> None:
        """Name the blocks that the first `num_tokens` tokens fill."""
        if not self.enable_prefix_caching or table is None:
            return
        num_full_blocks = num_tokens // self.block_size
        if num_full_blocks <= table.num_cached_blocks:
            return
        extend_block_hashes(request, self.block_size)
        for index in range(table.num_cached_blocks, num_full_blocks):
            self.pool.cache(table.blocks[index], request.block_hashes[index])
        table.num_cached_blocks = num_full_blocks
