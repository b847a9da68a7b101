"""A paged cache for tests, as hostile as allowed: scattered block ids, and NaN wherever nothing was written."""

from __future__ import annotations

from typing import Any

import torch

from minivllm.kernels.paged_attention import AttentionMetadata


class PagedRun:
    """Drives a model step by step over its own cache. Requests are known by name and own blocks in random order."""

    def __init__(self, model: Any, *, block_size: int = 4, num_blocks: int = 96, seed: int = 0):
        self.model, self.block_size = model, block_size
        self.batch_invariant = False
        generator = torch.Generator().manual_seed(seed)
        self.free_blocks = (1 + torch.randperm(num_blocks - 1, generator=generator)).tolist()  # 0 is the null block
        self.blocks: dict[str, list[int]] = {}
        self.num_computed: dict[str, int] = {}
        self.kv_caches = []
        for spec in model.kv_cache_specs:
            shape = (spec.num_kv_heads, num_blocks, block_size, spec.head_size)
            self.kv_caches.append(tuple(torch.full(shape, torch.nan, dtype=model_dtype(model)) for _ in "kv"))

    def step(self, scheduled: dict[str, list[int]]) -> dict[str, torch.Tensor]:
        """Compute these new tokens of these requests in one step. Returns hidden states [new tokens, hidden_size]."""
        token_ids, positions, slots, starts, seq_lens = [], [], [], [0], []
        for name, ids in scheduled.items():
            start = self.num_computed.get(name, 0)
            stop = start + len(ids)
            blocks = self.blocks.setdefault(name, [])
            while len(blocks) * self.block_size < stop:
                blocks.append(self.free_blocks.pop())
            token_ids += ids
            positions += range(start, stop)
            slots += [blocks[p // self.block_size] * self.block_size + p % self.block_size for p in range(start, stop)]
            starts.append(starts[-1] + len(ids))
            seq_lens.append(stop)
            self.num_computed[name] = stop
        metadata = AttentionMetadata(
            query_start_loc=starts,
            seq_lens=seq_lens,
            block_table=self._block_table(list(scheduled)),
            slot_mapping=torch.tensor(slots),
            block_size=self.block_size,
            batch_invariant=self.batch_invariant,
        )
        with torch.inference_mode():
            hidden = self.model(torch.tensor(token_ids), torch.tensor(positions), self.kv_caches, metadata)
        return dict(zip(scheduled, hidden.split([len(ids) for ids in scheduled.values()]), strict=True))

    def logits(self, scheduled: dict[str, list[int]]) -> dict[str, torch.Tensor]:
        """As `step`, but logits [new tokens, vocab_size]."""
        with torch.inference_mode():
            return {name: self.model.compute_logits(rows) for name, rows in self.step(scheduled).items()}

    def _block_table(self, names: list[str]) -> torch.Tensor:
        width = max(len(self.blocks[name]) for name in names) + 1  # one column of padding more than needed
        rows = [self.blocks[name] + [0] * (width - len(self.blocks[name])) for name in names]
        return torch.tensor(rows, dtype=torch.int32)


def model_dtype(model: Any) -> torch.dtype:
    return next(module.options.dtype for module in model.modules() if hasattr(module, "options"))
