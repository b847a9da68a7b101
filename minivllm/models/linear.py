"""Matrix products over stored weights: Linear, Embedding, and the table that is both.

A weight comes in as a plain [out_features, in_features] tensor and is kept in a *format*: a way to store it and a way
to multiply with it (`FORMATS`). The plain copy is dropped as soon as the stored one exists: weights are resident once.

    plain    the tensor itself, torch.nn.functional.linear
    packed   oneDNN's tiled layout: one repack at load, every product after that is faster in 16 bits
    int8     a byte per weight, where the user asks for quantised weights: models/quantised.py
    int4     groups of 4-bit codes, as a GGUF file has them or rounded at load, and a form for more rows; with AMX in
             strips, which serve any number of rows

Plain against packed on an Intel Xeon with AMX, one thread, microseconds (`python benchmarks/weight_formats.py`, in
float32 with `--dtype float32`). The products of a layer of SmolLM2-135M, and its head:

    rows                       1       2       4       8      16      32      64     256
    layer  float32 plain    1284    1242    2014    2573    2579    3283    4116   11476
                   packed   1478    1456    1554    1730    2058    2653    3863   10916
           bfloat16 plain   1321    1261    1279    1264    1309    1410    1743    2757
                   packed    922     881     860     900     928    1027    1236    1944
    head   float32 plain    8302    8499   16799   26594   25538   28418   34082   92432
                   packed   8343    8459    8748   10875   13388   18870   28730   92402

So 16 bits are packed. In float32 the layers stay plain: there oneDNN's sums are off by half as much again (5.2e-7 of
the result's size against 3.5e-7, 1,536 terms), which the layers behind can make a log-probability of 1e-4 of; a single
stream is faster that way, and 16 at once lose nothing that could be measured. What the head rounds goes nowhere else,
so its table is packed.

Batch invariance: `in_row_tiles` multiplies `ROW_TILE` rows at a time, the last tile filled with zeros. Every call then
has one shape, so a row's sums are formed in one order whoever its neighbours are. Such tiles are packed in float32 too:
for eight rows that is a third faster, and torch's own product does not promise the same bits at every address.

Knows no architecture. Called by: models/*.py. Twin in vLLM: vllm/model_executor/layers/linear.py and
vocab_parallel_embedding.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from minivllm.kernels.packed_matmul import MAX_ROWS, packed_matmul
from minivllm.models import onednn, quantised
from minivllm.models.grouped import GroupedWeight, join
from minivllm.models.onednn import as_strips, find_tiles, read_rows
from minivllm.models.parallel import TensorParallel
from minivllm.models.quantised import IN_STRIPS, Int4Strips, Int4Weight, Int8Weight
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
    quantization: str | None = None  # None: weights in `dtype`; or a name of config.QUANTIZATIONS
    widening: Widening = field(default_factory=Widening, compare=False)  # shared by the layers of one model
    parallel: TensorParallel | None = None  # None: this rank has all of the model


# ------------------------------------------------------------------ formats
@dataclass(frozen=True)
class WeightFormat:
    """How a weight is stored and used. A new format is one more row in FORMATS."""

    store: Callable[[Any], Any]  # [out_features, in_features] plain (or grouped) -> stored: a tensor or a module
    product: Callable[[torch.Tensor, Any, torch.Tensor | None], torch.Tensor]  # rows, stored, bias -> rows


FORMATS: Mapping[str, WeightFormat] = {
    "plain": WeightFormat(store=lambda weight: weight, product=F.linear),
    "packed": WeightFormat(store=onednn.pack, product=onednn.product),
    "int8": WeightFormat(store=Int8Weight, product=lambda rows, stored, bias: stored.product(rows, bias)),
    "int4": WeightFormat(store=Int4Weight, product=lambda rows, stored, bias: stored.product(rows, bias)),
    IN_STRIPS: WeightFormat(store=Int4Strips, product=lambda rows, stored, bias: stored.product(rows, bias)),
    "int4+bf16": WeightFormat(
        store=partial(Int4Weight, keep_bfloat16=True), product=lambda rows, stored, bias: stored.product(rows, bias)
    ),
}


def choose_format(weight: torch.Tensor, *, exact: bool) -> WeightFormat:
    """How a weight is kept that is not quantised. weight: [out_features, in_features].

    exact: float32 is multiplied as torch does it, which rounds less. Without: as fast as many rows can be.
    """
    if exact and weight.dtype == torch.float32:
        return FORMATS["plain"]
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

    weight: Any  # [out_features, in_features], as the format stores it
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
        self.stays_plain = ""  # why the weight is not quantised although it was to be
        self._loading: dict[str, torch.Tensor] = {}  # "weight" and "bias" while shards are still missing
        self._grouped: dict[str, GroupedWeight] = {}  # the same for shards that come in their file's own bits
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
        exact = not options.batch_invariant
        linear._set_weight(weight, FORMATS["plain"] if keep_plain else choose_format(weight, exact=exact))
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

    def planned_bytes(self, bits: Mapping[str, int], path: str) -> int:
        """What the weight will take. bits: of the stored tensors that are groups of codes, by Hugging Face name."""
        stored = {bits.get(name) for name in self.weight_slots(path) if name.endswith(".weight")}
        shape = (self.out_features, self.in_features)
        kind = self._choose_kind(stored)[0]
        if kind is None:
            return self.out_features * self.in_features * self.options.dtype.itemsize
        return quantised.planned_bytes(kind, shape)

    def _choose_kind(self, bits: Set[int | None]) -> tuple[str | None, str]:
        if self.options.quantization is None:
            return None, ""
        shape = (self.out_features, self.in_features)
        return quantised.choose_kind(
            self.options.quantization, bits, shape, self.options.dtype, batch_invariant=self.options.batch_invariant
        )

    def weight_slots(self, path: str) -> dict[str, WeightSlot]:
        parent = path.rpartition(".")[0]
        slots = {}
        for shard, width in self.shards.items():
            name = f"{parent}.{shard}" if shard else path
            slots[f"{name}.weight"] = WeightSlot((width, self.in_features), self._putter("weight", shard))
            if self.has_bias:
                slots[f"{name}.bias"] = WeightSlot((width,), self._putter("bias", shard))
        return slots

    def _putter(self, kind: str, shard: str) -> Callable[[torch.Tensor | GroupedWeight], None]:
        return lambda tensor: self._put(kind, shard, tensor)

    def _put(
        self,
        kind: str,
        shard: str,
        tensor: torch.Tensor | GroupedWeight,  # [shard width, in_features] or [shard width]
    ) -> None:
        if isinstance(tensor, GroupedWeight):
            self._grouped[shard] = tensor
        else:
            self._copy(kind, shard, tensor)
        self._missing[kind].discard(shard)
        if self._missing[kind]:
            return
        self._missing[kind] = set(self.shards)  # the last shard is in; ready for other weights
        if kind == "weight":
            self._finish_weight()
        else:
            self.bias = self._loading.pop("bias")

    def _copy(self, kind: str, shard: str, tensor: torch.Tensor) -> None:  # [shard width, in_features] or [shard width]
        if kind not in self._loading:
            self._loading[kind] = torch.empty(
                self.out_features, *tensor.shape[1:], dtype=self.options.dtype, device=self.options.device
            )
        starts = dict(zip(self.shards, itertools.accumulate(self.shards.values(), initial=0), strict=False))
        self._loading[kind][starts[shard] : starts[shard] + self.shards[shard]].copy_(tensor)

    def _finish_weight(self) -> None:
        grouped, self._grouped = self._grouped, {}
        kind, self.stays_plain = self._choose_kind(
            {grouped[shard].bits if shard in grouped else None for shard in self.shards}
        )
        if kind is not None and len(grouped) == len(self.shards):
            self._set_weight(join([grouped[shard] for shard in self.shards]), FORMATS[kind])
            return
        for shard, weight in grouped.items():
            self._copy("weight", shard, weight.dequantise())
        plain = self._loading.pop("weight")
        exact = not self.options.batch_invariant
        self._set_weight(plain, choose_format(plain, exact=exact) if kind is None else FORMATS[kind])

    def _set_weight(
        self,
        weight: torch.Tensor | GroupedWeight,  # [out_features, in_features]
        weight_format: WeightFormat,
    ) -> None:
        self._format = weight_format
        self.weight = weight_format.store(weight)
        if weight_format is FORMATS["packed"] and isinstance(weight, torch.Tensor) and not self.options.batch_invariant:
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

    def _put(self, tensor: torch.Tensor | GroupedWeight) -> None:  # [num_embeddings, hidden_size]
        plain = tensor.dequantise() if isinstance(tensor, GroupedWeight) else tensor
        self.weight = torch.empty(self.shape, dtype=self.options.dtype, device=self.options.device).copy_(plain)


class TiedEmbedding(Embedding):
    """One table that is both the embedding and the LM head (tie_word_embeddings), resident once.

    The head wants the packed layout (49152 x 576 at 4 rows in float32: 8.7 ms against 16.8 plain), the embedding wants
    rows. oneDNN's layout is opaque but regular: tiles of rows x columns. So the table is packed, its tiles are
    found by comparing with the plain copy, and only when every row read back through the tiles is bit-equal is the
    plain copy dropped. A row costs 3 us instead of 0.7. Where the tiles are not found, the plain table serves both.

    Any quantization stores the table in 8 bits: at one row the head is a fifth of a step, and 4 bits gain nothing more.
    """

    weight: Any  # [num_embeddings, hidden_size], as the format stores it

    def __init__(self, num_embeddings: int, hidden_size: int, options: ModelOptions):
        super().__init__(num_embeddings, hidden_size, options)
        self._tiles: torch.Tensor | None = None  # a view of the memory of self.weight; None: that is plain
        self._strips: torch.Tensor | None = None  # the same as packed_matmul takes it; None: it is in another layout

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: [num_tokens] int64 -> [num_tokens, hidden_size]"""
        if isinstance(self.weight, Int8Weight):
            return self.weight.rows(ids, self.options.dtype)
        if self._tiles is None:
            return super().forward(ids)
        return read_rows(self._tiles, ids)[:, : self.shape[1]]

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states: [num_rows, hidden_size] -> [num_rows, num_embeddings]"""
        if self.options.batch_invariant:
            return in_row_tiles(self._product, hidden_states)
        return self._product(hidden_states)

    def _product(self, rows: torch.Tensor) -> torch.Tensor:  # [num_rows, hidden_size] -> [num_rows, num_embeddings]
        if self._strips is not None and len(rows) <= MAX_ROWS:
            return packed_matmul(rows, self._strips, self.shape[0])
        return self._format.product(rows, self.weight, None)

    def planned_bytes(self, bits: Mapping[str, int], path: str) -> int:
        """What the table will take."""
        if self._is_int8:
            return quantised.planned_bytes("int8", self.shape)
        return self.shape[0] * self.shape[1] * self.options.dtype.itemsize

    @property
    def _is_int8(self) -> bool:
        return self.options.quantization is not None and not quantised.why_not("int8", self.shape, self.options.dtype)

    def _put(self, tensor: torch.Tensor | GroupedWeight) -> None:  # [num_embeddings, hidden_size]
        if self._is_int8:
            int8 = Int8Weight(tensor)
            if int8.tiles is not None:  # else its rows could not be read
                self._format, self.weight = FORMATS["int8"], int8
                return
        super()._put(tensor)
        table = self.weight
        self._format = choose_format(table, exact=False)
        stored = self._format.store(table)
        self._tiles = find_tiles(stored, table) if stored.is_mkldnn else None
        if self._tiles is not None:
            self.weight = stored
            self._strips = as_strips(self._tiles, self.shape[1]) if not self.options.batch_invariant else None
        else:
            self._format = FORMATS["plain"]


# ------------------------------------------------------------------ one model on several ranks
# Where each is cut: models/parallel.py. On one rank these functions return the plain classes: nothing is in the way.
# A column-parallel product is a Linear with fewer rows, and needs no class.
def row_parallel(in_features: int, out_features: int, options: ModelOptions, *, bias: bool = False) -> Linear:
    """The product behind a column-parallel one. in_features: of this rank."""
    return (Linear if options.parallel is None else RowParallelLinear)(in_features, out_features, options, bias=bias)


def lm_head(hidden_size: int, vocab_size: int, options: ModelOptions) -> Linear:
    """Logits of the whole vocabulary."""
    if options.parallel is None:
        return Linear(hidden_size, vocab_size, options)
    return VocabParallelHead(hidden_size, len(options.parallel.vocab), options)


def embedding(vocab_size: int, hidden_size: int, options: ModelOptions, *, tied: bool) -> Embedding:
    """tied: it is the LM head as well."""
    if options.parallel is None:
        return (TiedEmbedding if tied else Embedding)(vocab_size, hidden_size, options)
    cls = VocabParallelTiedEmbedding if tied else VocabParallelEmbedding
    return cls(len(options.parallel.vocab), hidden_size, options)


def _parallel(options: ModelOptions) -> TensorParallel:
    assert options.parallel is not None
    return options.parallel


class RowParallelLinear(Linear):
    """Each rank has some columns, and the rows' values for them; the sum over the ranks is the product."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """rows: [..., in_features of this rank] -> [..., out_features]"""
        return _parallel(self.options).collectives.all_reduce(super().forward(rows))

    def _put(self, kind: str, shard: str, tensor: torch.Tensor | GroupedWeight) -> None:  # as Linear's
        if kind == "bias" and _parallel(self.options).rank > 0:  # it must be in the sum once
            assert isinstance(tensor, torch.Tensor)
            tensor = torch.zeros_like(tensor)
        super()._put(kind, shard, tensor)


class VocabParallelHead(Linear):
    """Each rank has the rows of some tokens. All logits are on rank 0, which draws; others see their own."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """rows: [num_rows, in_features] -> [num_rows, vocab_size]"""
        parallel = _parallel(self.options)
        return parallel.collectives.gather(super().forward(rows), parallel.vocab_widths)


class VocabParallelEmbedding(Embedding):
    """Each rank has the rows of some tokens, and zeros for the others: the sum is the row."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: [num_tokens] int64 -> [num_tokens, hidden_size]"""
        parallel = _parallel(self.options)
        own_ids = ids - parallel.vocab.start
        is_own = (own_ids >= 0) & (own_ids < len(parallel.vocab))  # [num_tokens]
        rows = super().forward(own_ids.where(is_own, 0)).masked_fill(~is_own[:, None], 0)
        return parallel.collectives.all_reduce(rows)


class VocabParallelTiedEmbedding(VocabParallelEmbedding, TiedEmbedding):
    """Both: rows are summed, logits gathered."""

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states: [num_rows, hidden_size] -> [num_rows, vocab_size]; not on rank 0: the own tokens only"""
        parallel = _parallel(self.options)
        return parallel.collectives.gather(super().logits(hidden_states), parallel.vocab_widths)
