"""GPUPath: everything that is different on a GPU. Compare it with cpu.py: the same three methods.

    choose_device     --device auto | cpu | cuda | cuda:1, or an error that says what is there
    measure_memory    one step of full budget; what it takes, the key/value cache cannot have (kv_cache.py subtracts)
    prepare           the step's lists go to buffers that never move: a pinned mirror each, one copy each, no waiting
    forward           a decode-only step replays a CUDA graph, every other step calls the model (eagerly)
    sample            on the device (gpu_sampler.py); logits never leave it

A graph repeats a step's kernels with the arguments they had when it was captured. So it may depend on nothing but
    - the buffers, whose addresses it holds and whose content is each step's own, and
    - its KEY: the integers that shape a launch. These are the rows, rounded up to a bucket, and how attention cuts its
      contexts (split.py), which follows from the rows and the longest context, rounded up to a power of two.
Rows that fill a bucket belong to requests without context: slot -1, so they write nowhere; seq_len 0, so they attend to
nothing and become 0. Many contexts share one cut, so there are far fewer keys than pairs of buckets.

Every key is captured at start-up, largest first into one pool. None is captured later: that would stop all requests,
and take memory that the cache has by then. More rows than the largest bucket, or a request with several rows (a prompt,
a chunk, drafts to verify), are computed eagerly.

Without a GPU the tests give `capture` a stand-in that calls again, which reads the same buffers as a replay.
Knows no scheduler and no sampling parameters. Called by executor.py, model_runner.py and engine/llm_engine.py. Twins in
vLLM: vllm/v1/worker/gpu_worker.py (determine_available_memory), gpu_model_runner.py (buffers, capture_model) and
v1/cudagraph_dispatcher.py (CudagraphDispatcher: the key).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from minivllm.errors import ConfigError
from minivllm.kernels.paged_attention import AttentionMetadata, StepTensors, validate_metadata
from minivllm.kernels.paged_attention.split import choose_launch, num_multiprocessors
from minivllm.models.layers import KVCacheSpec
from minivllm.sample.metadata import SamplingMetadata
from minivllm.sample.sampler import SamplerOutput
from minivllm.worker.cpu import CPUPath
from minivllm.worker.gpu_sampler import sample_on_device
from minivllm.worker.input_batch import InputBatch
from minivllm.worker.kv_cache import GPUMemory, KVCache

MAX_GRAPH_ROWS = 512  # of more rows the kernels take long enough to hide the launches
MIN_CONTEXT_BUCKET = 256  # tokens: two splits of the shortest length

Capture = Callable[[Callable[[], None]], Callable[[], None]]  # takes a call, returns what repeats it


# ------------------------------------------------------------------ which device
def choose_device(name: str, impl: str = "auto") -> torch.device:
    """config.DeviceConfig's name as a device; "auto" is the first GPU, where there is one that `impl` can use.

    Raises ConfigError naming what is there.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if count and impl != "cpu" else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    index = int(name.partition(":")[2] or 0)
    if index >= count:
        there = f"cuda:0 to cuda:{count - 1}" if count else "no GPU that torch can use"
        raise ConfigError(
            f"device {name} is not here: this machine has {there}. Leave device out or set it to auto or cpu"
            + (", or install a torch that was built for your GPU." if not count else "."),
            parameter="device",
        )
    if impl == "cpu":
        raise ConfigError(f"impl cpu computes on the CPU, got device {name}. Leave impl out.", parameter="impl")
    return torch.device("cuda", index)


# ------------------------------------------------------------------ memory
@dataclasses.dataclass(frozen=True, slots=True)
class MemorySnapshot:
    """One moment, in bytes: of the whole device, and of torch's allocator in this process."""

    total: int
    free: int
    reserved: int  # by torch, free pieces of its own included

    @classmethod
    def of(cls, device: torch.device) -> MemorySnapshot:
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        return cls(total, free, torch.cuda.memory_reserved(device))

    @property
    def not_torchs(self) -> int:
        """Taken by others, and by this process beside torch's allocator: context, modules, cuBLAS."""
        return self.total - self.free - self.reserved


def gpu_memory(before: MemorySnapshot, after: MemorySnapshot, peak_bytes: int, graph_share: float) -> GPUMemory:
    """The arithmetic of `measure_memory`.

    Args:
        before, after: nothing of this engine was there, and the profiled step was computed.
        peak_bytes: the most that the profiled step had at once, beside the weights.
        graph_share: rows of the largest graph over tokens of the profiled step, 0 without graphs. They have a pool of
            their own, in which the largest graph's step must fit; the smaller ones use it again.
    """
    return GPUMemory(
        total_bytes=before.total,
        free_bytes=before.free,
        activation_bytes=peak_bytes,
        graph_bytes=int(min(1.0, graph_share) * peak_bytes),
        other_bytes=max(0, after.not_torchs - before.not_torchs),
    )


@torch.inference_mode()
def measure_memory(path: GPUPath, before: MemorySnapshot, num_graph_rows: int) -> GPUMemory:
    """Computes a step of full budget, logits and sampler included. path: one with a cache of a single block.

    before: nothing of this engine was there. num_graph_rows: of the largest graph there will be, 0: none.
    """
    limits, device = path.limits, path.device
    num_reqs = min(limits.max_num_seqs, limits.max_num_batched_tokens) if path.kv_caches else 1
    torch.cuda.reset_peak_memory_stats(device)
    resident = torch.cuda.memory_allocated(device)
    batch = path.prepare(dummy_batch(num_reqs, limits))
    hidden_states = path.forward(batch)
    if path.kv_caches and getattr(path.model, "has_head", True):
        logits = path.model.compute_logits(hidden_states[:num_reqs])
        path.sample(logits, dummy_sampling(num_reqs))
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - resident
    del hidden_states
    return gpu_memory(before, MemorySnapshot.of(device), peak, num_graph_rows / len(batch.input_ids))


def dummy_batch(num_reqs: int, limits: Limits) -> InputBatch:
    """The largest step there is: max_num_batched_tokens new tokens of so many requests, or of more where these would be
    longer than max_model_len, or fewer tokens if all requests there may be have no more. Written nowhere, read from
    block 0."""
    num_tokens = min(limits.max_num_batched_tokens, limits.max_num_seqs * limits.max_model_len)
    num_reqs = max(num_reqs, -(-num_tokens // limits.max_model_len))
    edges = torch.linspace(0, num_tokens, num_reqs + 1).long().tolist()
    lengths = [stop - start for start, stop in itertools.pairwise(edges)]
    num_blocks = -(-max(lengths) // limits.block_size)
    zeros = torch.zeros(edges[-1], dtype=torch.int64)
    return InputBatch(
        states=[],
        input_ids=zeros,
        positions=zeros,
        logits_indices=zeros[:num_reqs],
        sampling_states=[],
        attention=AttentionMetadata(
            query_start_loc=edges,
            seq_lens=lengths,
            block_table=torch.zeros(num_reqs, num_blocks, dtype=torch.int32),
            slot_mapping=torch.full_like(zeros, -1),
            block_size=limits.block_size,
            batch_invariant=limits.batch_invariant,
        ),
    )


def dummy_sampling(num_reqs: int) -> SamplingMetadata:
    """Requests that take the sampler's longest way: bias, top_p, log-probabilities."""
    bias = (torch.zeros(1, dtype=torch.int64).numpy(), torch.zeros(1).numpy())
    return SamplingMetadata(
        temperature=[1.0] * num_reqs,
        top_k=[0] * num_reqs,
        top_p=[0.9] * num_reqs,
        min_p=[0.0] * num_reqs,
        seeds=[0] * num_reqs,
        positions=[0] * num_reqs,
        num_logprobs=[1] * num_reqs,
        logit_bias={0: bias},
    )


# ------------------------------------------------------------------ what a graph depends on
@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What no step exceeds."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    batch_invariant: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class GraphKey:
    """The integers that shape the launches of a decode-only step."""

    num_rows: int  # a bucket
    cuts: tuple[tuple[int, int], ...]  # of each kind of layer: splits of a context, and their length in tokens


def row_buckets(max_num_seqs: int) -> list[int]:
    """1, 2, 4, 8, 16, 24, ... and max_num_seqs itself, up to MAX_GRAPH_ROWS."""
    largest = min(max_num_seqs, MAX_GRAPH_ROWS)
    return sorted({rows for rows in (1, 2, 4, *range(8, largest, 8)) if rows < largest} | {largest})


def context_buckets(max_model_len: int) -> list[int]:
    """256, 512, 1024, ... and max_model_len itself, in tokens."""
    powers = itertools.takewhile(lambda n: n < max_model_len, (MIN_CONTEXT_BUCKET << i for i in itertools.count()))
    return [*powers, max_model_len]


def graph_key(
    num_rows: int,
    max_seq_len: int,
    specs: Sequence[KVCacheSpec],
    *,
    multiprocessors: int,
    batch_invariant: bool = False,
) -> GraphKey:
    """The key of a decode-only step of so many rows whose longest context is max_seq_len tokens."""
    cuts = []
    for num_kv_heads, head_size in sorted({(spec.num_kv_heads, spec.head_size) for spec in specs}):
        launch = choose_launch(
            num_rows,
            num_rows,
            max_seq_len,
            num_kv_heads,
            1,  # the group shapes a tile, not the cut
            head_size,
            multiprocessors=multiprocessors,
            batch_invariant=batch_invariant,
        )
        cuts.append((launch.num_splits, launch.split_len) if launch.num_splits > 1 else (1, 0))  # 0: never read
    return GraphKey(num_rows, tuple(cuts))


def cuda_capture() -> Capture:
    """CUDA's graphs, all in one pool of memory."""
    pool = torch.cuda.graph_pool_handle()

    def capture(call: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            call()
        replay: Callable[[], None] = graph.replay
        return replay

    return capture


# ------------------------------------------------------------------ buffers
class Buffer:
    """A tensor that never moves, with a pinned mirror on the host."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, padding: int = 0):
        self.padding = padding
        self.host = torch.full(shape, padding, dtype=dtype, pin_memory=device.type == "cuda")  # shape
        self.device = torch.full(shape, padding, dtype=dtype, device=device)  # shape

    def put(self, values: torch.Tensor, length: int) -> torch.Tensor:
        """Fills the first `length` rows: values in front, padding behind and beside. Does not wait for the device.

        values: [num_rows, ...] -> the device's [num_rows, ...], as wide as the buffer
        """
        host = self.host[:length]
        host.fill_(self.padding)
        host[tuple(slice(size) for size in values.shape)] = values
        return self.device[:length].copy_(host, non_blocking=True)[: len(values)]


class InputBuffers:
    """One Buffer for each list of a step; the shape dictionary is in input_batch.py."""

    def __init__(self, limits: Limits, device: torch.device):
        num_tokens, num_reqs = max(limits.max_num_batched_tokens, limits.max_num_seqs), limits.max_num_seqs
        max_blocks = -(-limits.max_model_len // limits.block_size)
        self.input_ids = Buffer([num_tokens], torch.int64, device)
        self.positions = Buffer([num_tokens], torch.int64, device)
        self.slot_mapping = Buffer([num_tokens], torch.int64, device, padding=-1)
        self.logits_indices = Buffer([num_tokens], torch.int64, device)
        self.query_start_loc = Buffer([num_reqs + 1], torch.int32, device)
        self.seq_lens = Buffer([num_reqs], torch.int32, device)
        self.block_table = Buffer([num_reqs, max_blocks], torch.int32, device)
        self.query_start_loc.device.copy_(torch.arange(num_reqs + 1))  # at first all is padding
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def put(self, batch: InputBatch, num_rows: int) -> InputBatch:
        """The batch on the device; behind it the buffers are padding, as far as a step of num_rows rows looks.

        num_rows: 0 for a step that looks at nothing but its own rows
        """
        metadata = batch.attention
        num_tokens, num_reqs = max(num_rows, metadata.num_tokens), max(num_rows, metadata.num_reqs)
        if self._copied is not None:
            self._copied.synchronize()  # the last step's copies still read the mirrors
        starts = [*metadata.query_start_loc, *range(metadata.num_reqs + 1, num_reqs + 1)]  # padding: a row each
        step = StepTensors(
            self.query_start_loc.put(torch.tensor(starts), num_reqs + 1)[: metadata.num_reqs + 1],
            self.seq_lens.put(torch.tensor(metadata.seq_lens), num_reqs),
            self.block_table.put(metadata.block_table, num_reqs),
            max(metadata.seq_lens),
        )
        prepared = dataclasses.replace(
            batch,
            input_ids=self.input_ids.put(batch.input_ids, num_tokens),
            positions=self.positions.put(batch.positions, num_tokens),
            logits_indices=self.logits_indices.put(batch.logits_indices, len(batch.logits_indices)),
            attention=dataclasses.replace(
                metadata,
                block_table=step.block_table,
                slot_mapping=self.slot_mapping.put(metadata.slot_mapping, num_tokens),
                plan=step,
            ),
        )
        if self._copied is not None:
            self._copied.record()
        return prepared

    def padded(self, num_rows: int, max_seq_len: int, limits: Limits) -> InputBatch:
        """Views of num_rows requests with a row each, for a graph. The host's lists in it mean nothing later."""
        step = StepTensors(
            self.query_start_loc.device[: num_rows + 1],
            self.seq_lens.device[:num_rows],
            self.block_table.device[:num_rows],
            max_seq_len,
        )
        return InputBatch(
            states=[],
            input_ids=self.input_ids.device[:num_rows],
            positions=self.positions.device[:num_rows],
            logits_indices=self.logits_indices.device[:num_rows],
            sampling_states=[],
            attention=AttentionMetadata(
                query_start_loc=list(range(num_rows + 1)),
                seq_lens=[max_seq_len] * num_rows,
                block_table=step.block_table,
                slot_mapping=self.slot_mapping.device[:num_rows],
                block_size=limits.block_size,
                batch_invariant=limits.batch_invariant,
                plan=step,
            ),
        )


# ------------------------------------------------------------------ the path
def can_be_captured(model: Any, impl: str) -> bool:
    """Only what reads its step from tensors: not an encoder's attention nor the reference's, which read the host's
    lists, nor transformers' own networks (models/hf_backend.py), which may look at values."""
    return impl != "reference" and bool(model.kv_cache_specs) and getattr(model, "can_be_captured", True)


class GPUPath(CPUPath):
    """Args:
    model: its weights on `device`, as the caches are. An encoder has no caches.
    capture: what makes graphs; None: every step is computed eagerly.
    impl: of the kernels, the sampler's too.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        kv_caches: KVCache,
        device: torch.device,
        limits: Limits,
        capture: Capture | None,
        *,
        impl: str = "auto",
        show_progress: bool = False,
    ):
        super().__init__(model, kv_caches)
        self.device, self.limits, self.impl = device, limits, impl
        self._make_current()
        self.buffers = InputBuffers(limits, device)
        self.graphs: dict[GraphKey, Callable[[], None]] = {}
        self.keys: dict[tuple[int, int], GraphKey] = {}  # (bucket of rows, bucket of contexts) -> graph
        self.row_buckets: list[int] = []
        self.context_buckets = context_buckets(limits.max_model_len)
        if capture is not None and can_be_captured(model, impl):
            self.row_buckets = row_buckets(limits.max_num_seqs)
            dtype = kv_caches[0][0].dtype
            self.hidden_states = torch.zeros(  # [max rows, hidden_size], where every graph leaves its result
                self.row_buckets[-1], self.model.hidden_size, dtype=dtype, device=device
            )
            self._capture_all(capture, show_progress)

    def prepare(self, batch: InputBatch) -> InputBatch:
        """The batch in the buffers. Raises ValueError for a block that the caches do not have: the device would not."""
        self._make_current()
        if self.kv_caches:
            validate_metadata(batch.attention, num_blocks=self.kv_caches[0][0].shape[1])
        key = self.key_of(batch.attention)
        return self.buffers.put(batch, key.num_rows if key else 0)

    def forward(self, batch: InputBatch) -> torch.Tensor:  # [num_tokens, hidden_size]
        """Replays the step's graph, or calls the model."""
        key = self.key_of(batch.attention)
        if key is None:
            return super().forward(batch)
        self.graphs[key]()
        return self.hidden_states[: batch.attention.num_tokens]

    def sample(self, logits: torch.Tensor, metadata: SamplingMetadata) -> SamplerOutput:
        """logits: [num_logits, vocab_size] fp32, spent afterwards"""
        return sample_on_device(logits, metadata, impl=self.impl)

    def _make_current(self) -> None:
        """Triton launches on the current device, and every thread has its own."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def key_of(self, metadata: AttentionMetadata) -> GraphKey | None:
        """The graph that computes this step, None: none does."""
        is_decode_only = metadata.num_tokens == metadata.num_reqs
        if not is_decode_only or metadata.num_reqs > max(self.row_buckets, default=0):
            return None
        longest = max(metadata.seq_lens)
        num_rows = next(rows for rows in self.row_buckets if rows >= metadata.num_reqs)
        return self.keys[num_rows, next(tokens for tokens in self.context_buckets if tokens >= longest)]

    @torch.inference_mode()
    def _capture_all(self, capture: Capture, show_progress: bool) -> None:
        """A graph for every key, the largest first: the pool is then as large as it ever gets."""
        contexts: dict[GraphKey, int] = {}
        for num_rows, max_seq_len in itertools.product(reversed(self.row_buckets), self.context_buckets):
            key = graph_key(
                num_rows,
                max_seq_len,
                self.model.kv_cache_specs,
                multiprocessors=num_multiprocessors(self.device),
                batch_invariant=self.limits.batch_invariant,
            )
            self.keys[num_rows, max_seq_len] = key
            contexts[key] = max_seq_len
        for key, max_seq_len in tqdm(contexts.items(), "Capturing CUDA graphs", leave=False, disable=not show_progress):
            call = self._call(key.num_rows, max_seq_len)
            call()  # compiles and loads what a capture cannot
            self.graphs[key] = capture(call)

    def _call(self, num_rows: int, max_seq_len: int) -> Callable[[], None]:
        batch = self.buffers.padded(num_rows, max_seq_len, self.limits)

        def call() -> None:
            self.hidden_states[:num_rows].copy_(super(GPUPath, self).forward(batch))

        return call
