"""What the tests of worker/gpu.py need of a GPU: graphs that are no graphs, and a network that reads buffers only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minivllm.kernels.paged_attention import AttentionMetadata, StepTensors
from minivllm.models.layers import KVCacheSpec
from minivllm.worker.gpu import Capture, GPUPath, Limits
from minivllm.worker.model_runner import ModelRunner

CPU = torch.device("cpu")
SIZE = 8


class Repeats:
    """A capture whose graphs call again. As a graph does, a repeated call sees what it was captured with: Python's
    numbers stay as they were then, tensors are read where they lay then. `addresses` has what each call read."""

    def __init__(self) -> None:
        self.num_captures = 0
        self.replayed: list[int] = []  # numbers of the graphs, in the order of their replays
        self.addresses: list[set[int]] = []  # of each capture and replay

    def __call__(self, call: Callable[[], None]) -> Callable[[], None]:
        number, self.num_captures = self.num_captures, self.num_captures + 1

        def run() -> None:
            with Reads() as reads:
                call()
            self.addresses.append(reads.addresses)

        def replay() -> None:
            self.replayed.append(number)
            run()

        run()
        return replay


class Reads(TorchDispatchMode):
    """Addresses of the memory that operations are given from outside; packed weights have none."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: set[int] = set()
        self._made: dict[int, torch.Tensor] = {}  # kept alive: a freed address comes again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in self._tensors((args, kwargs)):
            self.addresses |= {tensor.untyped_storage().data_ptr()} - self._made.keys()
        result = func(*args, **(kwargs or {}))
        for tensor in self._tensors(result):
            address = tensor.untyped_storage().data_ptr()
            if address not in self.addresses:
                self._made[address] = tensor
        return result

    @staticmethod
    def _tensors(tree: Any) -> list[torch.Tensor]:
        return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and not leaf.is_mkldnn]


class Toy(torch.nn.Module):
    """A row's hidden state is the sum of all cached rows of its request, up to itself. Small whole numbers: sums are
    exact in every order. It reads StepTensors, never the host's lists, as a kernel does."""

    vocab_size, hidden_size = 97, SIZE
    table: torch.Tensor  # [vocab_size, hidden_size]

    def __init__(self, num_kv_heads: int = 1):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("table", torch.randint(0, 9, (self.vocab_size, SIZE), generator=generator).float())
        self.kv_cache_specs = [KVCacheSpec(num_kv_heads, SIZE)]
        self.steps: list[int] = []  # rows of every call

    def forward(
        self,
        input_ids: torch.Tensor,  # [num_tokens]
        positions: torch.Tensor,  # [num_tokens]
        kv_caches: list[Any],
        metadata: AttentionMetadata,
    ) -> torch.Tensor:  # [num_tokens, hidden_size]
        self.steps.append(len(input_ids))
        step = metadata.plan if metadata.plan is not None else StepTensors.of(metadata, CPU)
        assert isinstance(step, StepTensors)
        rows = self.table[input_ids] + positions[:, None] % 5
        cache = kv_caches[0][0][0].view(-1, SIZE)  # [num_slots, hidden_size]
        is_written = metadata.slot_mapping >= 0
        cache[metadata.slot_mapping[is_written]] = rows[is_written]
        hidden = torch.full_like(rows, torch.nan)  # what belongs to nobody
        starts = step.query_start_loc.tolist()
        for request, seq_len in enumerate(step.seq_lens.tolist()):
            for row in range(starts[request], starts[request + 1]):
                past = torch.arange(seq_len - (starts[request + 1] - row) + 1)
                blocks = step.block_table[request][past // metadata.block_size]
                hidden[row] = cache[blocks * metadata.block_size + past % metadata.block_size].sum(dim=0)
        return hidden % 61

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:  # [num_rows, hidden_size] -> logits
        return hidden_states @ self.table.T % 89


def limits_of(runner: ModelRunner, max_num_seqs: int, max_num_batched_tokens: int = 64) -> Limits:
    return Limits(max_num_seqs, max_num_batched_tokens, runner.max_model_len, runner.block_size, runner.batch_invariant)


def put_on_gpu_path(
    runner: ModelRunner, capture: Capture | None, max_num_seqs: int = 8, impl: str = "auto", **limits: int
) -> GPUPath:
    """The runner computes as on a GPU from now on."""
    path = GPUPath(runner.model, runner.kv_caches, CPU, limits_of(runner, max_num_seqs, **limits), capture, impl=impl)
    runner.path = path
    return path
