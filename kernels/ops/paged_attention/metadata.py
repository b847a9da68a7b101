"""AttentionMetadata: who owns which rows of a step and where each request's keys and values lie.

An argument of every attention call, never a global. Knows no scheduler and no model. Built by worker/input_batch once
per step; read by paged_attention and its implementations. On a GPU its lists are StepTensors as well, which
worker/gpu.py keeps at fixed addresses. Twin in vLLM: CommonAttentionMetadata in v1/attention/backend.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

HeadShares = tuple[tuple[float, float], ...]  # of each KV head: from where to where of a step's work, within 0 and 1


@dataclass
class AttentionMetadata:
    """One step, as attention sees it. Requests are concatenated; request r owns rows [q[r], q[r+1]) of the query.

    The last of them is the token at position seq_lens[r] - 1, so a row's position follows from these two lists.
    Decode, prefill, chunk and draft verification differ only in these numbers.
    """

    query_start_loc: list[int]  # [num_reqs + 1], host
    seq_lens: list[int]  # [num_reqs], host: context length after this step, in tokens
    block_table: torch.Tensor  # [num_reqs, max_blocks_per_req] int32, padded with block 0
    slot_mapping: torch.Tensor  # [num_tokens] int64, block_id * block_size + offset; -1 = do not write
    block_size: int
    batch_invariant: bool = False
    causal: bool = True
    plan: object | None = None  # what an implementation derived once per step, shared by all layers

    @property
    def num_reqs(self) -> int:
        """Requests in this step."""
        return len(self.seq_lens)

    @property
    def num_tokens(self) -> int:
        """Query rows in this step, over all requests."""
        return self.query_start_loc[-1]


@dataclass(frozen=True)
class StepTensors:
    """A step's lists where a GPU reads them, shared by all layers: what `AttentionMetadata.plan` is there.

    A request may have no context (seq_len 0, slot -1): nothing is read for it, and its row becomes 0.
    """

    query_start_loc: torch.Tensor  # [num_reqs + 1] int32
    seq_lens: torch.Tensor  # [num_reqs] int32
    block_table: torch.Tensor  # [num_reqs, max_blocks_per_req] int32
    max_seq_len: int  # the launch is cut for it: no context of the step is longer, in tokens

    @classmethod
    def of(cls, metadata: AttentionMetadata, device: torch.device) -> "StepTensors":
        """Copies the lists to the device."""
        return cls(
            torch.tensor(metadata.query_start_loc, dtype=torch.int32, device=device),
            torch.tensor(metadata.seq_lens, dtype=torch.int32, device=device),
            metadata.block_table.to(device=device, dtype=torch.int32).contiguous(),
            max(metadata.seq_lens),
        )


def heads_of_requests(
    query_start_loc: Sequence[int],  # [num_reqs + 1]
    seq_lens: Sequence[int],  # [num_reqs]
    num_kv_heads: int,
    shares: HeadShares | None,
) -> np.ndarray:  # [num_reqs, 2] int64
    """Of each request the KV heads whose attention is computed here: the first, and the end.

    Several ranks may keep the same head and share its work by requests. A request stands in the middle of its own part
    of the step's work, and whose share of a head that point lies in computes the head for it. A rank shares its first
    head and its last at most, so its heads of a request are neighbours.
    """
    heads = np.empty((len(seq_lens), 2), np.int64)
    heads[:] = 0, num_kv_heads
    if shares is not None:
        work = np.diff(query_start_loc) * np.asarray(seq_lens, np.float64)  # scores
        points = (np.cumsum(work) - work / 2) / work.sum()
        own = [(start <= points) & (points < end) for start, end in shares]  # of each head [num_reqs]
        heads[:, 0] += ~own[0]
        heads[:, 1] -= ~own[-1]
        heads[:, 1] = np.maximum(heads[:, 0], heads[:, 1])  # one head only, and it is another's
    return heads


def validate_metadata(metadata: AttentionMetadata, num_blocks: int) -> None:
    """Checks one step's metadata against a cache of `num_blocks` blocks. Raises ValueError naming both sides.

    Costs tens of microseconds, so it runs once per step (paged_attention calls it while `metadata.plan` is None)
    and not once per layer: all layers of a step read the same metadata.
    """
    starts, seq_lens = metadata.query_start_loc, metadata.seq_lens
    if len(starts) != len(seq_lens) + 1 or starts[0] != 0:
        raise ValueError(
            f"query_start_loc: expected {len(seq_lens) + 1} entries starting at 0 for {len(seq_lens)} seq_lens, "
            f"got {len(starts)} entries starting at {starts[0] if starts else 'nothing'}"
        )
    for r, seq_len in enumerate(seq_lens):
        num_rows = starts[r + 1] - starts[r]
        if num_rows < 1 or seq_len < num_rows:
            raise ValueError(
                f"request {r}: expected 1 <= query rows <= seq_len, got {num_rows} query rows "
                f"(query_start_loc {starts[r]}..{starts[r + 1]}) and seq_len {seq_len}"
            )
    if metadata.slot_mapping.shape != (metadata.num_tokens,):
        raise ValueError(
            f"slot_mapping: expected [{metadata.num_tokens}] as query_start_loc says, "
            f"got {list(metadata.slot_mapping.shape)}"
        )
    _validate_block_table(metadata, num_blocks)


def _validate_block_table(metadata: AttentionMetadata, num_blocks: int) -> None:
    table = metadata.block_table
    needed_blocks = -(-max(metadata.seq_lens) // metadata.block_size)
    if table.ndim != 2 or table.shape[0] != metadata.num_reqs or table.shape[1] < needed_blocks:
        raise ValueError(
            f"block_table: expected [{metadata.num_reqs}, >= {needed_blocks}] for {metadata.num_reqs} requests of at "
            f"most {max(metadata.seq_lens)} tokens in blocks of {metadata.block_size}, got {list(table.shape)}"
        )
    lowest, highest = (int(bound) for bound in torch.aminmax(table))
    if lowest < 0 or highest >= num_blocks:
        raise ValueError(
            f"block_table: expected block ids in [0, {num_blocks}), the cache's blocks, got {lowest}..{highest}"
        )
