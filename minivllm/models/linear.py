"""Matrix products over stored weights: Linear, Embedding, and the table that is both.

A weight comes in as a plain [out_features, in_features] tensor and is kept in a *format*: a way to store it and a way
to multiply with it (`FORMATS`). The plain copy is dropped as soon as the stored one exists: weights are resident once.

    plain    the tensor itself, torch.nn.functional.linear
    packed   oneDNN's tiled layout: one repack at load, every product after that is faster

Packed against plain, float32 on an AVX2 CPU, one thread, microseconds (minimum of 40, weights not in cache):

    out x in        1 row         4 rows        16 rows        32 rows        128 rows
    576 x 1536    340 |  424     663 | 546    1235 | 1158    2012 |  1875    6761 |  6340
    1536 x 576    408 |  379     745 | 503    1311 | 1082    2087 |  1787    7237 |  6242
    896 x 4864   1136 | 1562    3277 | 2072   6081 | 5178   10034 |  8429   33357 | 30477
    49152 x 576  13.7 |  9.3 ms 39.5 | 12.8   61.4 | 31.5    91.4 |  53.9

Only narrow weights at a single row lose, up to 1.4x; from two rows on packed always wins, 1.1x to 3x. Hence the rule:
pack whatever oneDNN can multiply at full speed in that dtype, else keep it plain.

Batch invariance: `in_row_tiles` multiplies `ROW_TILE` rows at a time, the last tile filled with zeros. Every call then
has one shape, so a row's sums are formed in one order whoever its neighbours are.

Knows no architecture. Called by: models/*.py. Twin in vLLM: vllm/model_executor/layers/linear.py and
vocab_parallel_embedding.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

from minivllm.models import onednn
from minivllm.models.weights import WeightSlot
from minivllm.models.widening import WIDEN_FROM_ROWS, Widening, WideWeight

# Rows per call when batch-invariant. Time of the layers' products against one free call, AVX2 float32:
# 1 row 1.7x, 32 rows 1.5x. Tiles of 16 give 2.7x and 1.2x: worse for the single stream.
ROW_TILE = 8

Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class ModelOptions:
    """What the user decides about a model's arithmetic; the checkpoint decides the rest."""

    dtype: torch.dtype
    batch_invariant: bool = False  # each row's bits do not depend on what else is in the batch
    impl: str = "auto"  # which implementation of the kernels: minivllm.kernels.dispatch
    device: torch.device = torch.device("cpu")  # where the weights go, each as soon as it is read
    widening: Widening = field(default_factory=Widening, compare=False)  # shared by the layers of one model


# ------------------------------------------------------------------ formats
@dataclass(frozen=True)
class WeightFormat:
    """How a weight is stored and used. A new format (int8, int4) is one more row in FORMATS."""

    store: Callable[[torch.Tensor], torch.Tensor]  # [out_features, in_features] plain -> stored
    product: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]  # rows, stored, bias -> rows


FORMATS: Mapping[str, WeightFormat] = {
    "plain": WeightFormat(store=lambda weight: weight, product=F.linear),
    "packed": WeightFormat(store=onednn.pack, product=onednn.product),
}


def choose_format(weight: torch.Tensor) -> WeightFormat:
    """The fastest format that gives the weight's own results. weight: [out_features, in_features]."""
    checks: dict[torch.dtype, Callable[[], bool]] = {
        torch.float32: torch.backends.mkldnn.is_available,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    can_pack = checks.get(weight.dtype, lambda: False)
    return FORMATS["packed" if weight.device.type == "cpu" and can_pack() else "plain"]


def in_row_tiles(product: Product, rows: torch.Tensor) -> torch.Tensor:
    """product(rows), computed so that each row's bits do not depend on the other rows nor on their number.

    rows: [num_rows, in_features] -> [num_rows, out_features]
    """
    num_rows = rows.shape[0]
    tiles = F.pad(rows, (0, 0, 0, -num_rows % ROW_TILE)).split(ROW_TILE)
    return torch.cat([product(tile) for tile in tiles])[:num_rows]


def weight_bytes(model: nn.Module) -> int:
    """Bytes that the model's weights occupy: packed ones included, a shared table counted once."""
    sizes = {}  # address -> bytes
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.is_mkldnn:
            sizes[torch.ops.mkldnn.data_ptr(tensor)] = int(torch.ops.mkldnn._nbytes(tensor))
        else:
            sizes[tensor.data_ptr()] = tensor.nbytes
    return sum(sizes.values())


# ------------------------------------------------------------------ modules
class Linear(nn.Module):
    """rows @ weight.T + bias, over one weight or over several that share their input.

    out_features: the width, or for a fused weight the widths by the Hugging Face names of its shards:
    {"gate_proj": 1536, "up_proj": 1536} is stored as one [3072, in_features] weight, the shards' rows in that order.
    """

    weight: torch.Tensor  # [out_features, in_features], as the format stores it
    bias: torch.Tensor | None  # [out_features]

    def __init__(
        self,
        in_features: int,
        out_features: int | Mapping[str, int],
        options: ModelOptions,
        *,
        bias: bool = False,
    ):
        super().__init__()
        self.in_features = in_features
        self.shards = {"": out_features} if isinstance(out_features, int) else dict(out_features)
        self.out_features = sum(self.shards.values())
        self.options = options
        self.has_bias = bias
        self._loading: dict[str, torch.Tensor] = {}  # "weight" and "bias" while shards are still missing
        self._missing = {kind: set(self.shards) for kind in ("weight", "bias")}
        self.register_buffer("weight", None)  # as the format stores it
        self.register_buffer("bias", None)  # [out_features]
        self._wide: WideWeight | None = None  # for products of many rows

    @classmethod
    def from_plain(
        cls, weight: torch.Tensor, bias: torch.Tensor | None, options: ModelOptions, *, keep_plain: bool = False
    ) -> Linear:
        """Around existing tensors: weight [out_features, in_features], bias [out_features] or None.

        keep_plain: the weight is somebody else's too, use it as it is.
        """
        linear = cls(weight.shape[1], weight.shape[0], options, bias=bias is not None)
        linear._set_weight(weight, FORMATS["plain"] if keep_plain else choose_format(weight))
        linear.bias = bias
        return linear

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """rows: [..., in_features] -> [..., out_features]"""
        if not self.options.batch_invariant:
            return self._product(rows)
        flat = in_row_tiles(self._product, rows.reshape(-1, self.in_features))
        return flat.view(*rows.shape[:-1], self.out_features)

    def _product(self, rows: torch.Tensor) -> torch.Tensor:  # [..., in_features] -> [..., out_features]
        if self._wide is not None and rows.numel() >= WIDEN_FROM_ROWS * self.in_features:
            return self._wide.product(rows, self.bias)
        return self._format.product(rows, self.weight, self.bias)

    def weight_slots(self, path: str) -> dict[str, WeightSlot]:
        parent = path.rpartition(".")[0]
        slots = {}
        for shard, width in self.shards.items():
            name = f"{parent}.{shard}" if shard else path
            slots[f"{name}.weight"] = WeightSlot((width, self.in_features), self._putter("weight", shard))
            if self.has_bias:
                slots[f"{name}.bias"] = WeightSlot((width,), self._putter("bias", shard))
        return slots

    def _putter(self, kind: str, shard: str) -> Callable[[torch.Tensor], None]:
        return lambda tensor: self._put(kind, shard, tensor)

    def _put(self, kind: str, shard: str, tensor: torch.Tensor) -> None:  # [shard width, in_features] or [shard width]
        if kind not in self._loading:
            self._loading[kind] = torch.empty(
                self.out_features, *tensor.shape[1:], dtype=self.options.dtype, device=self.options.device
            )
        starts = dict(zip(self.shards, itertools.accumulate(self.shards.values(), initial=0), strict=False))
        self._loading[kind][starts[shard] : starts[shard] + self.shards[shard]].copy_(tensor)
        self._missing[kind].discard(shard)
        if self._missing[kind]:
            return
        whole = self._loading.pop(kind)  # the last shard is in
        self._missing[kind] = set(self.shards)  # ready for other weights
        if kind == "weight":
            self._set_weight(whole, choose_format(whole))
        else:
            self.bias = whole

    def _set_weight(self, weight: torch.Tensor, weight_format: WeightFormat) -> None:  # [out_features, in_features]
        self._format = weight_format
        self.weight = weight_format.store(weight)
        if self.weight.is_mkldnn and not self.options.batch_invariant:
            self._wide = self.options.widening.prepare(self.weight, weight)


class Embedding(nn.Module):
    """A table of rows, picked by id. Weights: `weight`."""

    def __init__(self, num_embeddings: int, hidden_size: int, options: ModelOptions):
        super().__init__()
        self.shape = (num_embeddings, hidden_size)
        self.options = options
        self.register_buffer("weight", None)  # [num_embeddings, hidden_size]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: [num_tokens] int64 -> [num_tokens, hidden_size]"""
        return F.embedding(ids, self.weight)

    def weight_slots(self, path: str) -> dict[str, WeightSlot]:
        return {f"{path}.weight": WeightSlot(self.shape, self._put)}

    def _put(self, tensor: torch.Tensor) -> None:  # [num_embeddings, hidden_size]
        self.weight = torch.empty(self.shape, dtype=self.options.dtype, device=self.options.device).copy_(tensor)


class TiedEmbedding(Embedding):
    """One table that is both the embedding and the LM head (tie_word_embeddings), resident once.

    The head wants the packed layout (LM head of 49152 x 576 at 4 rows: 12.8 ms against 39.5 plain), the embedding
    wants rows. oneDNN's layout is opaque but regular: tiles of rows x columns. So the table is packed, its tiles are
    found by comparing with the plain copy, and only when every row read back through the tiles is bit-equal is the
    plain copy dropped. A row costs 3 us instead of 0.7. Where the tiles are not found, the plain table serves both.
    """

    def __init__(self, num_embeddings: int, hidden_size: int, options: ModelOptions):
        super().__init__(num_embeddings, hidden_size, options)
        self._tiles: torch.Tensor | None = None  # a view of the memory of self.weight; None: that is plain

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: [num_tokens] int64 -> [num_tokens, hidden_size]"""
        if self._tiles is None:
            return super().forward(ids)
        return read_rows(self._tiles, ids)[:, : self.shape[1]]

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states: [num_rows, hidden_size] -> [num_rows, num_embeddings]"""
        if self.options.batch_invariant:
            return in_row_tiles(self._product, hidden_states)
        return self._product(hidden_states)

    def _product(self, rows: torch.Tensor) -> torch.Tensor:  # [num_rows, hidden_size] -> [num_rows, num_embeddings]
        return self._format.product(rows, self.weight, None)

    def _put(self, tensor: torch.Tensor) -> None:  # [num_embeddings, hidden_size]
        super()._put(tensor)
        table = self.weight
        self._format = choose_format(table)
        stored = self._format.store(table)
        self._tiles = find_tiles(stored, table) if stored.is_mkldnn else None
        if self._tiles is not None:
            self.weight = stored
        else:
            self._format = FORMATS["plain"]


# ------------------------------------------------------------------ reading rows of a packed weight
def read_rows(tiles: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Rows of a packed weight, columns padded to whole tiles.

    tiles: [row_tiles, column_tiles, columns / group, rows, group] as `find_tiles` returns it; ids: [num_rows].
    """
    rows_per_tile = tiles.shape[3]
    return tiles[ids // rows_per_tile, :, :, ids % rows_per_tile].flatten(1)


def find_tiles(packed: torch.Tensor, plain: torch.Tensor) -> torch.Tensor | None:
    """A view of a packed weight's memory through which `read_rows` gives the rows of `plain`, or None.

    Valid as long as `packed` lives. packed: opaque; plain: [out_features, in_features], the same weight.
    oneDNN's inner-product layouts are tiles [columns / group, rows, group]; group is 2 or 4 where the CPU multiplies
    pairs of bfloat16. The tile's size differs by CPU and dtype, so it is searched for: 0.5 ms, plus a whole check.
    """
    values = onednn.memory(packed, packed.dtype)  # [num_values], padding included
    num_rows, num_columns = plain.shape
    sizes = (64, 48, 32, 24, 16, 8, 4, 2, 1)
    for rows, columns, group in itertools.product(sizes, (*sizes, num_columns), (1, 2, 4)):
        row_tiles, column_tiles = -(-num_rows // rows), -(-num_columns // columns)
        if columns % group or row_tiles * rows * column_tiles * columns != values.numel():
            continue
        tiles = values.view(row_tiles, column_tiles, columns // group, rows, group)
        if _reads_back(tiles, plain, rows=3) and _reads_back(tiles, plain, rows=num_rows):
            return tiles
    return None


def _reads_back(tiles: torch.Tensor, plain: torch.Tensor, *, rows: int) -> bool:
    """Whether the first `rows` rows, read through the tiles, are bit-equal to the plain ones. As in find_tiles:
    tiles: five dimensions [row_tiles, ...], plain: [out_features, in_features]."""
    ids = torch.arange(min(rows, plain.shape[0]))
    return all(
        torch.equal(read_rows(tiles, some)[:, : plain.shape[1]], plain[some])
        for some in ids.split(4096)  # bounds the temporary copy
    )
