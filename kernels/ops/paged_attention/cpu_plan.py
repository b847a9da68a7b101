"""What the CPU path derives from a step's metadata, once, for all layers.

A plan sorts the requests of a step into few, wide tensor operations:

    prefill       many query rows: one request at a time
    short query   one query row (decode) or a few (draft verification, the last tokens of a prompt)
        slice     the keys lie in consecutive slots: the cache itself is the operand, nothing is copied
        run       a long stretch of consecutive slots in a scattered context is sliced, the other keys are gathered,
                  and the two results are merged by their log-sum-exp
        gather    all others: batches of similar length, their keys copied side by side
    tile          whatever needs a mask of its own: long prompts under a sliding window, soft caps, ALiBi

Knows the metadata and a layer's shapes, not the values in tensors. Called by cpu.py. Twin in vLLM: the metadata
builder in v1/attention/backends/cpu_attn.py. The constants were measured.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from minivllm.kernels.paged_attention.metadata import AttentionMetadata

# A request with earlier context and at most this many rows is a short query: rows and heads share one small matmul.
SHORT_QUERY_TOKENS = 16
# From this context on, a call for one request costs less than copying its keys into a batch; in bf16 the bytes are
# half. Microseconds in place and copied, 8 requests, 3 heads of 64: fp32 256 keys 243 and 290, 512 keys 398 and 567;
# bf16 256 keys 252 and 199, 512 keys 371 and 405.
SLICE_TOKENS = {torch.float32: 256, torch.bfloat16: 512}
# Keys and values of one gathered batch, in bytes: small enough to be still in the last cache when a matmul reads them.
GATHER_BYTES = 1 << 22
# Requests share a batch if this pads the shorter one by at most so many keys, or so large a share of the longer one.
PADDING_TOKENS = 64
PADDING_SHARE = 0.25
# Query rows per masked tile: a window's mask then stays small, and little of it is computed in vain.
TILE_TOKENS = 128


class LayerShape(NamedTuple):
    """Everything about a layer that its plan depends on."""

    num_kv_heads: int
    group: int  # query heads per KV head
    head_size: int
    dtype: torch.dtype
    sliding_window: int | None
    all_tiles: bool  # soft cap or ALiBi: no request can take a faster way

    @property
    def slice_tokens(self) -> int:
        """Shortest context worth a call of its own."""
        return SLICE_TOKENS.get(self.dtype, SLICE_TOKENS[torch.float32])

    @property
    def gather_tokens(self) -> int:
        """Keys that one gathered batch may hold."""
        return GATHER_BYTES // (2 * self.num_kv_heads * self.head_size * self.dtype.itemsize)


@dataclass
class Context:
    """One request of the step and where its blocks are."""

    first_row: int
    num_rows: int
    seq_len: int
    block_size: int
    block_ids: np.ndarray  # [blocks of this request] int64

    @property
    def is_short(self) -> bool:
        """One row, or a few rows that follow earlier context."""
        return self.num_rows == 1 or self.num_rows <= min(SHORT_QUERY_TOKENS, self.seq_len - 1)

    def first_key(self, window: int | None) -> int:
        """Position of the first key that any row of this step may see."""
        return 0 if window is None else max(0, self.seq_len - self.num_rows + 1 - window)

    def slots(self, positions: np.ndarray) -> np.ndarray:
        """Cache slots of `positions` [num_keys]."""
        return self.block_ids[positions // self.block_size] * self.block_size + positions % self.block_size

    def longest_run(self, first_key: int) -> tuple[int, int]:
        """The longest stretch of positions [start, end) from first_key on whose slots are consecutive."""
        first_block = first_key // self.block_size
        breaks = np.flatnonzero(np.diff(self.block_ids[first_block:]) != 1) + 1 + first_block
        edges = np.concatenate(([first_block], breaks, [len(self.block_ids)]))
        longest = int(np.argmax(np.diff(edges)))
        start, end = (int(edge) * self.block_size for edge in edges[longest : longest + 2])
        return max(start, first_key), min(end, self.seq_len)


@dataclass
class Keys:
    """Some keys of one request: a slice of the cache, or slots to gather."""

    num_keys: int
    start_slot: int | None = None
    slots: torch.Tensor | None = None  # [num_keys] int64
    cache_rows: torch.Tensor | None = None  # [num_kv_heads * num_keys] int64, the slots of every head; shared by layers

    def rows_of(self, cache: torch.Tensor) -> torch.Tensor:
        """The slots as rows of `cache` [1, num_kv_heads, num_slots, head_size] seen as one flat table.

        Whole rows of a flat table are copied five times as fast as an index along the middle of four dimensions
        (32 requests x 176 keys x 3 heads in bf16: 83 against 441 microseconds).
        """
        if self.cache_rows is None:
            assert self.slots is not None
            _, num_kv_heads, num_slots, _ = cache.shape
            first_rows = torch.arange(0, num_kv_heads * num_slots, num_slots)  # [num_kv_heads]
            self.cache_rows = (first_rows.unsqueeze(1) + self.slots).flatten()
        return self.cache_rows


@dataclass
class ShortPart:
    """Requests with equally many rows against equally many keys; the shorter contexts are padded and masked."""

    num_reqs: int
    num_rows: int  # per request
    keys: Keys  # [num_reqs * num_keys] of them; padding repeats a request's first key, so no unused slot is read
    mask: torch.Tensor | None  # [num_reqs, 1, 1 or num_rows * group, num_keys] 0 or -inf
    # gathered key and value, shared by layers
    buffers: tuple[torch.Tensor, torch.Tensor] | None = None  # two of [num_kv_heads * num_keys, head_size]


@dataclass
class PrefillPart:
    """One request with many rows and all of its keys; the last num_rows keys are the rows' own."""

    first_row: int
    num_rows: int
    keys: Keys


@dataclass
class Tile:
    """Consecutive rows of one request against every key that any of them may see."""

    first_row: int
    num_rows: int
    offset: int  # positions from the first key to the first row
    keys: Keys
    mask: torch.Tensor  # [num_rows, num_keys] 0 or -inf


@dataclass
class LayerPlan:
    """The parts of a step for all layers of one shape."""

    short_rows: torch.Tensor | None = None  # [num_short_rows] int64; None = every row of the query, in order
    part_rows: list[int] = field(default_factory=list)  # rows of each part
    parts: list[ShortPart] = field(default_factory=list)
    runs: list[ShortPart] = field(default_factory=list)  # one per row: more keys of the first len(runs) short rows
    prefills: list[PrefillPart] = field(default_factory=list)
    tiles: list[Tile] = field(default_factory=list)


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


def contexts_of(metadata: AttentionMetadata) -> list[Context]:
    """The requests of a step, with their own part of the block table."""
    table = metadata.block_table.numpy().astype(np.int64)
    starts, size = metadata.query_start_loc, metadata.block_size
    return [
        Context(starts[r], starts[r + 1] - starts[r], seq_len, size, table[r, : -(-seq_len // size)])
        for r, seq_len in enumerate(metadata.seq_lens)
    ]


def causal_mask(num_rows: int, num_keys: int, offset: int, window: int | None) -> np.ndarray:
    """Additive mask [num_rows, num_keys] fp32: 0 where row i sees key j, -inf elsewhere.

    Row i stands `offset` + i positions after key 0.
    """
    distance = offset + np.arange(num_rows)[:, None] - np.arange(num_keys)
    visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return np.where(visible, np.float32(0), np.float32(-np.inf))


# One request and the positions [num_keys] of some of its keys.
Stretch = tuple[Context, np.ndarray]


def plan_layer(contexts: list[Context], shape: LayerShape) -> LayerPlan:
    """Sorts the requests of a step into parts; see the module's docstring."""
    plan = LayerPlan()
    split: list[tuple[Stretch, Stretch]] = []  # the keys to gather, and a run worth a call
    sliced: list[Stretch] = []
    gathered: list[Stretch] = []
    for context in contexts:
        window = shape.sliding_window
        first_key = context.first_key(window)
        everything = (context, np.arange(first_key, context.seq_len))
        start, end = context.longest_run(first_key)
        whole = end - start == context.seq_len - first_key
        if shape.all_tiles or (not context.is_short and window is not None and context.seq_len > window):
            plan.tiles.extend(_tiles(context, shape))
        elif not context.is_short:
            plan.prefills.append(PrefillPart(context.first_row, context.num_rows, _keys(everything)))
        elif whole and (len(contexts) == 1 or end - start >= shape.slice_tokens):
            sliced.append(everything)
        elif context.num_rows == 1 and not whole and end - start >= shape.slice_tokens:
            rest = np.r_[first_key:start, end : context.seq_len]
            split.append(((context, rest), (context, np.arange(start, end))))
        else:
            gathered.append(everything)
    _add_short_parts(plan, split, sliced, gathered, shape)
    return plan


def _add_short_parts(
    plan: LayerPlan,
    split: list[tuple[Stretch, Stretch]],
    sliced: list[Stretch],
    gathered: list[Stretch],
    shape: LayerShape,
) -> None:
    """Fills the short-query fields. Split requests come first, so that their runs belong to the first rows."""
    runs = {context.first_row: run for (context, _), run in split}
    batches = _batches([rest for rest, _ in split], shape)
    plan.runs = [_short_part([runs[context.first_row]], shape) for batch in batches for context, _ in batch]
    batches += [[stretch] for stretch in sliced]
    batches += _batches(gathered, shape)
    plan.parts = [_short_part(batch, shape) for batch in batches]
    plan.part_rows = [part.num_reqs * part.num_rows for part in plan.parts]
    rows = [c.first_row + i for batch in batches for c, _ in batch for i in range(c.num_rows)]
    in_order = rows == list(range(len(rows))) and not plan.prefills and not plan.tiles
    plan.short_rows = None if in_order else torch.tensor(rows)


def _batches(stretches: list[Stretch], shape: LayerShape) -> list[list[Stretch]]:
    """Groups stretches of similar length, each group's copy within GATHER_BYTES, in row order inside a group."""
    batches: list[list[Stretch]] = []
    num_rows = num_keys = 0  # of the open batch
    for stretch in sorted(stretches, key=lambda s: (s[0].num_rows, len(s[1])), reverse=True):
        context, positions = stretch
        padding = num_keys - len(positions)
        fits = batches and (len(batches[-1]) + 1) * num_keys <= shape.gather_tokens
        similar = context.num_rows == num_rows and padding <= max(PADDING_TOKENS, PADDING_SHARE * num_keys)
        if not (fits and similar):
            batches.append([])
            num_rows, num_keys = context.num_rows, len(positions)
        batches[-1].append(stretch)
    for batch in batches:
        batch.sort(key=lambda s: s[0].first_row)
    return batches


def _short_part(batch: list[Stretch], shape: LayerShape) -> ShortPart:
    """Operands of requests with equally many rows. Only a single request can be a slice."""
    num_reqs, num_rows = len(batch), batch[0][0].num_rows
    num_keys = max(len(positions) for _, positions in batch)
    if num_reqs == 1:
        keys = _keys(batch[0])
    else:
        slots = np.empty((num_reqs, num_keys), np.int64)
        for i, (context, positions) in enumerate(batch):
            slots[i, : len(positions)] = context.slots(positions)
            slots[i, len(positions) :] = slots[i, 0]
        keys = Keys(num_reqs * num_keys, slots=torch.from_numpy(slots.reshape(-1)))
    return ShortPart(num_reqs, num_rows, keys, _short_mask(batch, num_keys, shape))


def _short_mask(batch: list[Stretch], num_keys: int, shape: LayerShape) -> torch.Tensor | None:
    """Mask [num_reqs, 1, 1 or num_rows * group, num_keys], or None where every row sees every key."""
    num_rows = batch[0][0].num_rows
    if num_rows == 1 and all(len(positions) == num_keys for _, positions in batch):
        return None
    # A single row sees all of its keys, wherever they lie, but no padding; several rows also hide later keys, and
    # their keys are one unbroken stretch that ends with the last row's own.
    window = shape.sliding_window if num_rows > 1 else None
    mask = np.stack([causal_mask(num_rows, num_keys, len(keys) - num_rows, window) for _, keys in batch])
    if num_rows > 1:
        mask = mask.repeat(shape.group, axis=1)
    return torch.from_numpy(mask).to(shape.dtype).unsqueeze(1)


def _tiles(context: Context, shape: LayerShape) -> Iterator[Tile]:
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
        keys = _keys((context, np.arange(first_key, first_key + num_keys)))
        yield Tile(context.first_row + start, num_rows, position - first_key, keys, masks[key])


def _keys(stretch: Stretch) -> Keys:
    """A slice of the cache where the slots are consecutive, else the slots themselves."""
    context, positions = stretch
    slots = context.slots(positions)
    if slots[-1] - slots[0] == len(slots) - 1 and (np.diff(slots) == 1).all():
        return Keys(len(slots), start_slot=int(slots[0]))
    return Keys(len(slots), slots=torch.from_numpy(slots))
