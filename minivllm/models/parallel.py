"""Tensor parallelism: which part of a model one rank holds. The one place that decides where weights are cut.

    cut by rows        q_proj k_proj v_proj      whole heads                    column-parallel: no rank needs another's
                       gate_proj up_proj         a part of the MLP's width
    cut by columns     o_proj down_proj          the same heads and width       row-parallel: results are summed
    cut by rows        embed_tokens lm_head      a part of the vocabulary       vocabulary-parallel: summed, gathered
    whole              norms, and whatever is not named here

So a rank's network is the model with fewer heads and a narrower MLP (`TensorParallel.narrow`), and the classes of
models/llama.py build it as they build any other. What it lacks of the others comes from two sums in every layer, one
behind the embedding, and the gathered logits: the row- and vocabulary-parallel classes of models/linear.py.

Key/value heads are dealt out with their queries. Where that leaves some ranks more than others, on a CPU, the two ranks
on either side of the cut both keep the head, write its keys and values, and take turns by requests (`head_shares`): an
attention that waits for the slower rank costs more than the projections computed twice. Elsewhere as evenly as whole
heads go. Where there are more ranks than key/value heads, several ranks have the same one, and share its queries; so
every rank needs at least one query head. The MLP is cut evenly: ranks meet behind attention and behind it, and wait for
the slowest both times.

Knows no file, no process and no network. Called by: engine/llm_engine.py (through worker/parallel_executor.py),
models/loader.py, models/linear.py. Twin in vLLM: vllm/model_executor/layers/linear.py (its weight loaders) and
vllm/distributed/utils.py.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import torch

from minivllm.errors import ConfigError
from minivllm.kernels.decoder_step import Meeting
from minivllm.kernels.paged_attention import HeadShares

# The last module in a tensor's Hugging Face name -> (dimension that is cut, which range of TensorParallel).
CUTS: Mapping[str, tuple[int, str]] = MappingProxyType(
    {
        "q_proj": (0, "queries"),
        "k_proj": (0, "keys"),
        "v_proj": (0, "keys"),
        "o_proj": (1, "queries"),
        "gate_proj": (0, "mlp"),
        "up_proj": (0, "mlp"),
        "down_proj": (1, "mlp"),
        "embed_tokens": (0, "vocab"),
        "lm_head": (0, "vocab"),
    }
)
MLP_UNIT = 64  # columns; packed weights are stored in tiles of so many


class Collectives(Protocol):
    """What the ranks do together: every rank calls the same in the same order. worker/collectives.py has two."""

    @property
    def meeting(self) -> Meeting | None:
        """For sums inside a compiled step; None: there are only calls."""
        ...

    def all_reduce(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's part, on every rank. part: any shape, spent."""
        ...

    def gather(self, part: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        """part: [num_rows, widths[rank]] -> on rank 0 [num_rows, sum(widths)], elsewhere the part itself."""
        ...


@dataclass(frozen=True)
class TensorParallel:
    """The part of one rank. Ranges are of what the whole model numbers: rows of a weight, token ids."""

    rank: int
    size: int
    collectives: Collectives = field(compare=False, repr=False)
    heads: tuple[range, ...]  # query heads, of every rank
    kv_heads: tuple[range, ...]  # of every rank; two may have the same one
    queries: range  # rows of q_proj
    keys: range  # rows of k_proj and v_proj
    mlp: range  # of intermediate_size
    vocab: range  # token ids
    vocab_widths: tuple[int, ...]  # of every rank
    head_shares: HeadShares | None = None  # of this rank's key/value heads; None: all of each

    @classmethod
    def of(
        cls, hf_config: Any, rank: int, size: int, collectives: Collectives, *, share_heads: bool = False
    ) -> TensorParallel:
        """The part of `rank`. share_heads: a head may be two ranks'. Raises ConfigError where one has none."""
        check_size(hf_config, size)
        head_size, num_kv_heads = _head_size(hf_config), hf_config.num_key_value_heads
        is_shared = share_heads and size < num_kv_heads and num_kv_heads % size > 0
        cut = _shared_heads_of if is_shared else _heads_of
        heads, kv_heads = zip(*(cut(hf_config, number, size) for number in range(size)), strict=True)
        ends = [number * hf_config.vocab_size // size for number in range(size + 1)]
        mlp_ends = _mlp_ends(hf_config.intermediate_size, size)
        return cls(
            rank=rank,
            size=size,
            collectives=collectives,
            heads=heads,
            kv_heads=kv_heads,
            queries=range(heads[rank].start * head_size, heads[rank].stop * head_size),
            keys=range(kv_heads[rank].start * head_size, kv_heads[rank].stop * head_size),
            mlp=range(mlp_ends[rank], mlp_ends[rank + 1]),
            vocab=range(ends[rank], ends[rank + 1]),
            vocab_widths=tuple(end - start for start, end in itertools.pairwise(ends)),
            head_shares=_shares_of(kv_heads[rank], num_kv_heads, rank, size) if is_shared else None,
        )

    def narrow(self, hf_config: Any) -> Any:
        """The configuration of this rank's network: its own heads, its own width of the MLP."""
        config = copy.deepcopy(hf_config)
        config.head_dim = _head_size(hf_config)  # no longer hidden_size / num_attention_heads
        config.num_attention_heads = len(self.heads[self.rank])
        config.num_key_value_heads = len(self.kv_heads[self.rank])
        config.intermediate_size = len(self.mlp)
        return config

    def part_of(self, name: str) -> tuple[slice, ...] | None:
        """The index of this rank's part in the tensor of a Hugging Face name; None: all of it.

        The bias of a row-parallel product is whole; models/linear.py adds it on one rank only.
        """
        module, _, kind = name.rpartition(".")
        dimension, what = CUTS.get(module.rpartition(".")[2], (0, ""))
        if not what or (kind == "bias" and dimension == 1):
            return None
        found: range = getattr(self, what)
        return (*[slice(None)] * dimension, slice(found.start, found.stop))


def check_size(hf_config: Any, size: int) -> None:
    """Raise ConfigError naming the numbers where a model cannot be cut into `size` parts."""
    limits = {
        "attention heads": hf_config.num_attention_heads,
        "columns of the MLP": hf_config.intermediate_size,
        "tokens in the vocabulary": hf_config.vocab_size,
    }
    for what, limit in limits.items():
        if size > limit:
            raise ConfigError(
                f"tensor_parallel_size must be at most {limit} for this model, got {size}: it has {limit} {what}, and "
                "every rank needs one of its own. Lower it, or start several servers behind a load balancer.",
                parameter="tensor_parallel_size",
            )


def bytes_per_token(hf_config: Any, size: int, itemsize: int) -> tuple[int, int]:
    """What one token costs: bytes that every rank brings to the sums, and bytes of logits that rank 0 receives.

    The sums: attention and MLP of every layer, and the embedding; hidden_size values each. The logits, for a token that
    is drawn: the vocabulary of the other ranks.
    """
    own = hf_config.vocab_size // size  # rank 0's
    sums = (2 * hf_config.num_hidden_layers + 1) * hf_config.hidden_size * itemsize
    return sums, (hf_config.vocab_size - own) * itemsize


def _head_size(hf_config: Any) -> int:
    return getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads


def _heads_of(hf_config: Any, rank: int, size: int) -> tuple[range, range]:
    """Query heads and key/value heads of a rank. All of its key/value heads have as many queries."""
    num_kv_heads = hf_config.num_key_value_heads
    group = hf_config.num_attention_heads // num_kv_heads  # queries of a key/value head
    first = rank * num_kv_heads // size
    if size <= num_kv_heads:
        kv_heads = range(first, (rank + 1) * num_kv_heads // size)
        return range(kv_heads.start * group, kv_heads.stop * group), kv_heads
    sharing = [other for other in range(size) if other * num_kv_heads // size == first]  # this key/value head
    place = sharing.index(rank)
    ends = [first * group + number * group // len(sharing) for number in (place, place + 1)]
    return range(*ends), range(first, first + 1)


def _shared_heads_of(hf_config: Any, rank: int, size: int) -> tuple[range, range]:
    """As _heads_of, with every head of which the rank has any part."""
    num_kv_heads = hf_config.num_key_value_heads
    group = hf_config.num_attention_heads // num_kv_heads
    kv_heads = range(rank * num_kv_heads // size, -(-(rank + 1) * num_kv_heads // size))
    return range(kv_heads.start * group, kv_heads.stop * group), kv_heads


def _shares_of(kv_heads: range, num_kv_heads: int, rank: int, size: int) -> HeadShares:
    """Equal parts of all heads, side by side: what of each head is the rank's."""
    start, end = rank * num_kv_heads / size, (rank + 1) * num_kv_heads / size
    return tuple((max(start, head) - head, min(end, head + 1) - head) for head in kv_heads)


def _mlp_ends(width: int, size: int) -> list[int]:
    """Where the MLP's parts end, all as wide as whole tiles allow; the first one begins at 0."""
    unit = MLP_UNIT if width >= 2 * size * MLP_UNIT else 1
    return [*(unit * (rank * width // size // unit) for rank in range(size)), width]
