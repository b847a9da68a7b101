"""What the CPU path derives from a step's metadata, once, for all layers.

A plan sorts the requests of a step:

    rows          one query row (decode) or a few (draft verification, the last tokens of a prompt): cpu_rows.py
    prompts       many query rows, in bfloat16 on a CPU with AMX: cpu_prompts_amx.py
    prefill       many query rows elsewhere: torch's flash kernel, one request at a time
    tile          many query rows that need a mask of their own: long prompts under a sliding window, soft caps, ALiBi

Batch-invariant steps are all rows. Knows the metadata and a layer's options, not the values in tensors. Called by
cpu.py. Twin in vLLM: the metadata builder in v1/attention/backends/cpu_attn.py.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from minivllm.kernels.paged_attention.cpu_rows_amx import can_use_amx
from minivllm.kernels.paged_attention.metadata import AttentionMetadata, HeadShares, heads_of_requests

# Up to so many rows the compiled loop wins: it reads a block of keys once for all of them. From here on flash
# attention's matrix products do.
SHORT_QUERY_TOKENS = 16
# The compiled loop's items: at most so many rows, and so many keys.
ROWS_PER_ITEM = 16
KEYS_PER_ITEM = 256
NO_WINDOW = 1 << 60
# Query rows per masked tile: a window's mask then stays small, and little of it is computed in vain.
TILE_TOKENS = 128
# With AMX: query rows that one thread takes at a time, and keys that are laid out together.
PROMPT_ROWS = 32
TILE_PAIR = 32


class LayerShape(NamedTuple):
    """Everything about a layer that its plan depends on."""

    num_kv_heads: int
    group: int  # query heads per KV head
    head_size: int
    dtype: torch.dtype
    sliding_window: int | None
    all_tiles: bool  # soft cap or ALiBi: no long query can take a faster way
    all_rows: bool  # batch-invariant
    head_shares: HeadShares | None = None  # of each KV head; None: all of each


@dataclass
class Context:
    """One request of the step and where its blocks are."""

    request: int  # its row in the block table
    first_row: int
    num_rows: int
    seq_len: int
    block_size: int
    block_ids: np.ndarray  # [blocks of this request] int64

    def slots(self, positions: np.ndarray) -> np.ndarray:
        """Cache slots of `positions` [num_keys]."""
        return self.block_ids[positions // self.block_size] * self.block_size + positions % self.block_size


@dataclass
class Keys:
    """Some keys of one request: a slice of the cache, or slots to gather."""

    num_keys: int
    start_slot: int | None = None
    slots: torch.Tensor | None = None  # [num_keys] int64
    cache_rows: torch.Tensor | None = None  # [num_kv_heads * num_keys] int64, the slots of every head; shared by layers

    def rows_of(self, cache: torch.Tensor) -> torch.Tensor:
        """The slots as rows of `cache` [num_kv_heads, num_slots, head_size] seen as one flat table.

        Whole rows of a flat table are copied five times as fast as an index along a middle dimension.
        """
        if self.cache_rows is None:
            assert self.slots is not None
            num_kv_heads, num_slots, _ = cache.shape
            first_rows = torch.arange(0, num_kv_heads * num_slots, num_slots)  # [num_kv_heads]
            self.cache_rows = (first_rows.unsqueeze(1) + self.slots).flatten()
        return self.cache_rows


@dataclass
class PrefillPart:
    """One request with many rows and all of its keys; the last num_rows keys are the rows' own."""

    first_row: int
    num_rows: int
    heads: slice  # KV heads; those of the others become 0
    keys: Keys


@dataclass
class Tile:
    """Consecutive rows of one request against every key that any of them may see."""

    first_row: int
    num_rows: int
    heads: slice  # as PrefillPart's
    offset: int  # positions from the first key to the first row
    keys: Keys
    mask: torch.Tensor  # [num_rows, num_keys] 0 or -inf


@dataclass
class RowPlan:
    """The items of cpu_rows.py."""

    block_table: np.ndarray  # [num_reqs, max_blocks_per_req] int32
    # of each item: its request, first row of the query, rows, position of its first row, first key, end of its keys,
    # whether no other item is about these rows, and the first and the end of its KV heads; those of others become 0
    items: np.ndarray  # [num_items, 9] int64
    chunks: np.ndarray  # [num_chunks + 1] int64: items chunks[c] .. chunks[c + 1] are about the same rows
    window: int
    has_shared_rows: bool  # whether any rows are the work of several items
    # what the items leave behind, overwritten by every layer
    attended: np.ndarray  # [num_items, num_kv_heads, rows * group, head_size] float32
    totals: np.ndarray  # [num_items, num_kv_heads, rows * group, 2] float32
    no_slopes: np.ndarray  # [num_heads] float32 zeros


@dataclass
class PromptPlan:
    """The prompts of a step, or none."""

    # of each prompt: its request, first row of the query, rows, position of its first row, first key that is laid out,
    # end of its keys, how many keys are laid out before its own, and KV heads as an item's
    prompts: np.ndarray  # [num_prompts, 9] int64
    works: np.ndarray  # [num_works, 2] int64: a prompt, the first of its rows
    tiles: np.ndarray  # [num_prompt_tiles, 2] int64: a prompt, the first of 32 keys
    num_keys: int  # that are laid out, of all prompts: multiples of 32
    block_table: np.ndarray  # [num_reqs, max_blocks_per_req] int32
    window: int
    memory: torch.Tensor  # [2, num_kv_heads * num_keys * head_size] bfloat16, overwritten by every layer

    @property
    def laid_out(self) -> tuple[int, int, int]:
        """As the kernels take it: where keys and values lie, and how many."""
        return self.memory[0].data_ptr(), self.memory[1].data_ptr(), self.num_keys


@dataclass
class LayerPlan:
    """The parts of a step for all layers of one shape."""

    rows: RowPlan
    prompts: PromptPlan
    prefills: list[PrefillPart]
    tiles: list[Tile]


Plan = TypeVar("Plan")


class StepPlan:
    """Stored in metadata.plan. Layers of one shape share what was derived for it; alternating windows need two."""

    def __init__(self, metadata: AttentionMetadata):
        self.contexts = contexts_of(metadata)
        self._derived: dict[tuple[Any, ...], Any] = {}

    def derive(self, make_plan: Callable[..., Plan], *arguments: object) -> Plan:
        """make_plan(contexts, *arguments), made once for equal arguments (which are hashable)."""
        key = (make_plan, *arguments)
        if key not in self._derived:
            self._derived[key] = make_plan(self.contexts, *arguments)
        return self._derived[key]

    def ways(self) -> dict[int, str]:
        """{first row of a request: which of the module's ways its rows went}, for people who look on."""
        found = {context.first_row: "rows" for context in self.contexts}
        for plan in self._derived.values():
            if isinstance(plan, LayerPlan):
                found |= {prefill.first_row: "prefill" for prefill in plan.prefills}
                found |= {int(first_row): "prompt" for first_row in plan.prompts.prompts[:, 1]}
                found |= {tile.first_row: "tile" for tile in plan.tiles if tile.first_row in found}
        return found


def contexts_of(metadata: AttentionMetadata) -> list[Context]:
    """The requests of a step, with their own part of the block table."""
    table = metadata.block_table.numpy().astype(np.int64)
    starts, size = metadata.query_start_loc, metadata.block_size
    return [
        Context(r, starts[r], starts[r + 1] - starts[r], seq_len, size, table[r, : -(-seq_len // size)])
        for r, seq_len in enumerate(metadata.seq_lens)
    ]


def causal_mask(num_rows: int, num_keys: int, offset: int, window: int | None) -> np.ndarray:
    """Additive mask [num_rows, num_keys] fp32: 0 where row i sees key j, -inf elsewhere.

    Row i stands `offset` + i positions after key 0.
    """
    distance = offset + np.arange(num_rows)[:, None] - np.arange(num_keys)
    visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return np.where(visible, np.float32(0), np.float32(-np.inf))


def plan_layer(
    contexts: list[Context],
    shape: LayerShape,
    block_table: torch.Tensor,  # [num_reqs, max_blocks_per_req] int32
) -> LayerPlan:
    """Sorts the requests of a step into parts; see the module's docstring."""
    rows: list[Context] = []
    prompts: list[Context] = []
    prefills: list[PrefillPart] = []
    tiles: list[Tile] = []
    heads = _heads_of(contexts, shape)
    for context in contexts:
        window = shape.sliding_window
        if shape.all_rows or context.num_rows <= SHORT_QUERY_TOKENS:
            rows.append(context)
        elif shape.all_tiles:
            tiles.extend(_tiles(context, heads[context.request], shape))
        elif can_use_amx(shape.dtype, shape.head_size):
            prompts.append(context)
        elif window is not None and context.seq_len > window:
            tiles.extend(_tiles(context, heads[context.request], shape))
        else:
            keys = _keys(context, np.arange(context.seq_len))
            own = slice(*heads[context.request])
            prefills.append(PrefillPart(context.first_row, context.num_rows, own, keys))
    table = block_table.numpy()
    parts = _plan_rows(rows, heads, table, shape), _plan_prompts(prompts, heads, table, shape)
    return LayerPlan(*parts, prefills, tiles)


def _heads_of(contexts: Sequence[Context], shape: LayerShape) -> list[tuple[int, int]]:
    """First and end of each request's KV heads."""
    starts = [0, *(context.first_row + context.num_rows for context in contexts)]
    seq_lens = [context.seq_len for context in contexts]
    found = heads_of_requests(starts, seq_lens, shape.num_kv_heads, shape.head_shares)
    return [(first, end) for first, end in found.tolist()]


def _plan_rows(
    contexts: Sequence[Context],
    heads: Sequence[tuple[int, int]],  # of every request
    block_table: np.ndarray,  # [num_reqs, max_blocks_per_req] int32
    shape: LayerShape,
) -> RowPlan:
    """Cuts the requests' rows and keys into items. Where an item begins depends on its own request alone."""
    window = shape.sliding_window
    items, chunks = [], [0]
    for context in contexts:
        start = context.seq_len - context.num_rows  # position of the request's first row in this step
        for row in range(0, context.num_rows, ROWS_PER_ITEM):
            num_rows = min(ROWS_PER_ITEM, context.num_rows - row)
            first, end = start + row, start + row + num_rows
            first_key = 0 if window is None else max(0, first + 1 - window)
            keys = range(first_key - first_key % KEYS_PER_ITEM, end, KEYS_PER_ITEM)
            about = (context.request, context.first_row + row, num_rows, first)
            own = heads[context.request]
            items += [(*about, key, min(end, key + KEYS_PER_ITEM), len(keys) == 1, *own) for key in keys]
            chunks.append(len(items))
    most_rows = max((num_rows for _, _, num_rows, *_ in items), default=0)
    outputs = (len(items), shape.num_kv_heads, most_rows * shape.group)
    return RowPlan(
        block_table,
        np.array(items, np.int64).reshape(-1, 9),
        np.asarray(chunks),
        NO_WINDOW if window is None else window,
        has_shared_rows=len(items) >= len(chunks),
        attended=np.empty((*outputs, shape.head_size), np.float32),
        totals=np.empty((*outputs, 2), np.float32),
        no_slopes=np.zeros(shape.num_kv_heads * shape.group, np.float32),
    )


def _plan_prompts(
    contexts: Sequence[Context],
    heads: Sequence[tuple[int, int]],  # of every request
    block_table: np.ndarray,  # [num_reqs, max_blocks_per_req] int32
    shape: LayerShape,
) -> PromptPlan:
    """Cuts the prompts' rows and keys into works."""
    window = shape.sliding_window
    prompts: list[tuple[int, ...]] = []
    works: list[tuple[int, int]] = []
    tiles: list[tuple[int, int]] = []
    num_keys = 0
    for context in contexts:
        position = context.seq_len - context.num_rows
        first_key = 0 if window is None else max(0, position + 1 - window) // TILE_PAIR * TILE_PAIR
        about = (context.request, context.first_row, context.num_rows, position, first_key, context.seq_len, num_keys)
        works += [(len(prompts), row) for row in range(0, context.num_rows, PROMPT_ROWS)]
        tiles += [(len(prompts), key) for key in range(first_key, context.seq_len, TILE_PAIR)]
        prompts.append((*about, *heads[context.request]))
        num_keys += -(-(context.seq_len - first_key) // TILE_PAIR) * TILE_PAIR
    # Later rows see more keys. Numba gives each thread one run of the works: every run gets some of all.
    threads = torch.get_num_threads()
    works = [work for thread in range(threads) for work in works[thread::threads]]
    return PromptPlan(
        np.array(prompts, np.int64).reshape(-1, 9),
        np.array(works, np.int64).reshape(-1, 2),
        np.array(tiles, np.int64).reshape(-1, 2),
        num_keys,
        block_table,
        NO_WINDOW if window is None else window,
        torch.empty(2, shape.num_kv_heads * num_keys * shape.head_size, dtype=shape.dtype),
    )


def _tiles(context: Context, heads: tuple[int, int], shape: LayerShape) -> Iterator[Tile]:
    """Cuts a request's rows into tiles, each with just the keys that its rows may see."""
    window = shape.sliding_window
    masks: dict[tuple[int, int, int], torch.Tensor] = {}  # the tiles inside a long prompt share one mask
    for start in range(0, context.num_rows, TILE_TOKENS):
        num_rows = min(TILE_TOKENS, context.num_rows - start)
        position = context.seq_len - context.num_rows + start
        first_key = 0 if window is None else max(0, position + 1 - window)
        num_keys = position + num_rows - first_key
        key = (num_rows, num_keys, position - first_key)
        if key not in masks:
            masks[key] = torch.from_numpy(causal_mask(*key, window)).to(shape.dtype)
        keys = _keys(context, np.arange(first_key, first_key + num_keys))
        yield Tile(context.first_row + start, num_rows, slice(*heads), position - first_key, keys, masks[key])


def _keys(context: Context, positions: np.ndarray) -> Keys:  # [num_keys]
    """A slice of the cache where the slots are consecutive, else the slots themselves."""
    slots = context.slots(positions)
    if slots[-1] - slots[0] == len(slots) - 1 and (np.diff(slots) == 1).all():
        return Keys(len(slots), start_slot=int(slots[0]))
    return Keys(len(slots), slots=torch.from_numpy(slots))
