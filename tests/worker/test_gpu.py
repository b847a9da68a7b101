"""The GPU path without a GPU: buffers, keys and graphs against the plain path, memory and devices by their arithmetic.

Graphs are stand-ins that call again (graphs.Repeats). They see what a real one sees: the numbers of their capture, and
tensors where they lay then. The network of most tests reads nothing but those, as the kernels do.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm import LLM
from minivllm.config import CacheConfig, DeviceConfig
from minivllm.errors import ConfigError
from minivllm.kernels.paged_attention import validate_metadata
from minivllm.kernels.paged_attention.split import choose_launch
from minivllm.models.layers import KVCacheSpec, ModelOptions
from minivllm.worker import gpu
from minivllm.worker.cpu import CPUPath
from minivllm.worker.gpu import GPUPath, Limits, MemorySnapshot, choose_device, graph_key
from minivllm.worker.kv_cache import GPUMemory, allocate_kv_caches, plan_kv_cache
from tests.models.tiny import tiny_config, tiny_hf, weights_of
from tests.worker.graphs import CPU, Reads, Repeats, Toy, put_on_gpu_path
from tests.worker.test_model_runner import Loop

LLAMA_3_8B = KVCacheSpec(8, 128)


def loop_of(capture: gpu.Capture | None, max_num_seqs: int = 8, **limits: int) -> Loop:
    """A scheduler and a runner on the GPU path, over a poisoned cache."""
    loop = Loop(Toy(), max_num_seqs=max_num_seqs, **limits)
    put_on_gpu_path(loop.runner, capture, max_num_seqs)
    return loop


def path_of(loop: Loop) -> GPUPath:
    assert isinstance(loop.runner.path, GPUPath)
    return loop.runner.path


# ------------------------------------------------------------------ buckets and keys
@pytest.mark.parametrize(
    ("max_num_seqs", "expected"),
    [
        (1, [1]),
        (2, [1, 2]),
        (3, [1, 2, 3]),
        (8, [1, 2, 4, 8]),
        (9, [1, 2, 4, 8, 9]),
        (24, [1, 2, 4, 8, 16, 24]),
        (30, [1, 2, 4, 8, 16, 24, 30]),
        (4000, [1, 2, 4, *range(8, 513, 8)]),
    ],
)
def test_buckets_of_rows(max_num_seqs: int, expected: list[int]):
    assert gpu.row_buckets(max_num_seqs) == expected


@pytest.mark.parametrize(
    ("max_model_len", "expected"),
    [(1, [1]), (256, [256]), (257, [256, 257]), (1024, [256, 512, 1024]), (5000, [256, 512, 1024, 2048, 4096, 5000])],
)
def test_buckets_of_contexts(max_model_len: int, expected: list[int]):
    assert gpu.context_buckets(max_model_len) == expected


def test_a_key_is_what_attention_makes_of_rows_and_context():
    """Few rows: contexts are cut, and the cut is in the key. Many: nothing is cut, whatever the context."""
    few = {graph_key(1, context, [LLAMA_3_8B], multiprocessors=132) for context in gpu.context_buckets(32768)}
    many = {graph_key(64, context, [LLAMA_3_8B], multiprocessors=132) for context in gpu.context_buckets(32768)}
    assert len(few) == len(gpu.context_buckets(32768)) and len(many) == 1
    assert {key.cuts for key in many} == {((1, 0),)}
    assert graph_key(1, 32768, [LLAMA_3_8B], multiprocessors=132).cuts == ((64, 512),)


def test_layers_of_two_kinds_are_both_in_the_key():
    mixed = graph_key(4, 16384, [KVCacheSpec(1, 256), LLAMA_3_8B, LLAMA_3_8B], multiprocessors=132)
    assert len(mixed.cuts) == 2 and mixed.cuts[0] != mixed.cuts[1]


def test_batch_invariant_contexts_are_never_cut():
    for context in gpu.context_buckets(131072):
        assert graph_key(1, context, [LLAMA_3_8B], multiprocessors=132, batch_invariant=True).cuts == ((1, 0),)


@given(
    num_rows=st.integers(1, 80),
    seq_len=st.integers(1, 131072),
    kv_heads=st.sampled_from([1, 2, 8]),
    head_size=st.sampled_from([64, 128, 256]),
    multiprocessors=st.sampled_from([1, 108, 132, 304]),
)
@settings(max_examples=200, deadline=None)
def test_a_keys_cut_covers_every_context_of_its_bucket(
    num_rows: int, seq_len: int, kv_heads: int, head_size: int, multiprocessors: int
):
    """A key that is cut too short would leave keys unread; and its cut is the launch's, whatever the query heads."""
    bucket = next(tokens for tokens in gpu.context_buckets(131072) if tokens >= seq_len)
    [(num_splits, split_len)] = graph_key(
        num_rows, bucket, [KVCacheSpec(kv_heads, head_size)], multiprocessors=multiprocessors
    ).cuts
    assert num_splits == 1 or num_splits * split_len >= seq_len
    for group in (1, 4, 7):
        launch = choose_launch(num_rows, num_rows, bucket, kv_heads, group, head_size, multiprocessors=multiprocessors)
        assert launch.num_splits == num_splits and (num_splits == 1 or launch.split_len == split_len)


# ------------------------------------------------------------------ graphs
def test_every_key_is_captured_at_the_start_the_largest_first_and_none_later():
    capture = Repeats()
    loop = loop_of(capture, max_num_seqs=9)
    path = path_of(loop)
    assert [key.num_rows for key in path.graphs] == [9, 8, 4, 2, 1]
    assert capture.num_captures == 5 and capture.replayed == []
    for index in range(9):
        loop.add(str(index), [3] * (index + 1), max_tokens=3 + index)
    loop.run()
    assert capture.num_captures == 5 and set(capture.replayed) == {0, 1, 2, 3, 4}


def test_a_decode_only_step_replays_the_smallest_graph_that_holds_it_and_no_other_step_does():
    capture = Repeats()
    loop = loop_of(capture)
    path, model = path_of(loop), loop.runner.model
    graph_of = {key.num_rows: number for number, key in enumerate(path.graphs)}
    for name in "abc":
        loop.add(name, [5, 6, 7, 8], max_tokens=6)
    model.steps.clear()
    loop.step()  # three prompts
    assert model.steps == [12] and capture.replayed == []
    loop.step()
    assert model.steps == [12, 4] and capture.replayed == [graph_of[4]]
    loop.add("d", [9] * 5, max_tokens=6)
    loop.step()  # three rows and a prompt
    assert model.steps == [12, 4, 8] and capture.replayed == [graph_of[4]]
    loop.step()
    assert capture.replayed == [graph_of[4]] * 2


def test_more_rows_than_the_largest_bucket_are_computed_eagerly(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu, "MAX_GRAPH_ROWS", 2)
    capture = Repeats()
    loop = loop_of(capture)
    assert [key.num_rows for key in path_of(loop).graphs] == [2, 1]
    for name in "abc":
        loop.add(name, [5, 6], max_tokens=4)
    loop.runner.model.steps.clear()
    loop.step()
    loop.step()
    assert loop.runner.model.steps == [6, 3] and capture.replayed == []


@pytest.mark.parametrize("why", ["enforce_eager", "a network that looks at values", "impl reference"])
def test_without_graphs_all_is_eager(why: str):
    model = Toy()
    model.can_be_captured = why != "a network that looks at values"  # type: ignore[assignment]
    loop = Loop(model, max_num_seqs=8)
    capture = None if why == "enforce_eager" else Repeats()
    path = put_on_gpu_path(loop.runner, capture, impl="reference" if why == "impl reference" else "auto")
    assert path.graphs == {} and model.steps == []
    loop.add("a", [4, 5], max_tokens=4)
    assert len(loop.run()["a"].token_ids) == 4 == len(model.steps)


def test_a_replay_reads_the_buffers_and_nothing_of_its_step():
    """All that a repeated call is given lies where it lay at the capture: buffers, cache, weights, the result."""
    capture = Repeats()
    loop = loop_of(capture)
    path = path_of(loop)
    captured = list(capture.addresses)
    for name in "abc":
        loop.add(name, [5, 6, 7], max_tokens=9)
    loop.run()
    replays = list(zip(capture.replayed, capture.addresses[len(captured) :], strict=True))
    assert len(replays) > 5
    buffers = [buffer.device for buffer in vars(path.buffers).values() if isinstance(buffer, gpu.Buffer)]
    lasting = [*buffers, *loop.runner.kv_caches[0], loop.runner.model.table, path.hidden_states]
    allowed = {tensor.untyped_storage().data_ptr() for tensor in lasting}
    for number, addresses in replays:
        assert captured[number] <= addresses <= allowed


def test_the_recorder_sees_a_tensor_that_is_not_a_buffer():
    """Or the test above could not fail."""
    known, stray = torch.ones(3), torch.ones(3)
    with Reads() as reads:
        (known + 1) * stray
    assert reads.addresses == {tensor.untyped_storage().data_ptr() for tensor in (known, stray)}


def test_padding_rows_write_nowhere():
    """Five rows in a graph of eight: all that changes in the cache is five slots."""
    loop = loop_of(Repeats())
    for index in range(5):
        loop.add(str(index), [index + 2] * 3, max_tokens=6)
    loop.step()
    cache = loop.runner.kv_caches[0][0]
    loop.runner.poison = False  # else new blocks change, too
    before = cache.clone()
    step = loop.step()
    assert list(step.num_scheduled_tokens.values()) == [1] * 5
    changed = ~torch.eq(before.nan_to_num(-1.0), cache.nan_to_num(-1.0)).all(dim=-1)
    assert int(changed.sum()) == 5


def test_what_a_larger_step_left_in_the_buffers_is_padding_for_a_smaller_one():
    loop = loop_of(Repeats())
    buffers = path_of(loop).buffers
    for index in range(7):
        loop.add(str(index), [index + 2] * 3, max_tokens=2 if index else 5)
    loop.run()  # the last steps have one row, in the graph of one
    loop.add("a", [3, 4], max_tokens=3)
    loop.add("b", [3, 4, 5], max_tokens=3)
    loop.add("c", [3, 4, 5], max_tokens=3)
    loop.step()
    loop.step()  # three rows in the graph of four
    assert buffers.slot_mapping.device[3] == -1 and (buffers.slot_mapping.device[:3] >= 0).all()
    assert buffers.query_start_loc.device[:5].tolist() == [0, 1, 2, 3, 4]
    assert buffers.seq_lens.device[:4].tolist() == [3, 4, 4, 0]
    assert buffers.block_table.device[3].tolist() == [0] * buffers.block_table.device.shape[1]


def test_a_block_that_the_cache_does_not_have_is_found_before_the_device_reads_it():
    loop = loop_of(Repeats())
    loop.add("a", [4, 5], max_tokens=4)
    loop.step()
    loop.runner.states["a"].block_ids[0] = 4000
    with pytest.raises(ValueError, match=r"expected block ids in \[0, 96\)"):
        loop.step()


def test_embedding_models_are_computed_eagerly_and_pooled_the_same():
    plain, loop = Loop(Toy(), runner={"pooling_type": "MEAN"}), Loop(Toy(), runner={"pooling_type": "MEAN"})
    capture = Repeats()
    put_on_gpu_path(loop.runner, capture)
    for one in (plain, loop):
        one.add_pooling("a", [3, 4, 5, 6, 7])
        one.add_pooling("b", [8])
    assert loop.run()["a"].pooled == plain.run()["a"].pooled is not None
    assert loop.got["b"].pooled == plain.got["b"].pooled


# ------------------------------------------------------------------ the same tokens
REQUESTS = st.lists(
    st.fixed_dictionaries(
        {
            "token_ids": st.lists(st.integers(0, 96), min_size=1, max_size=20),
            "max_tokens": st.integers(1, 12),
            "temperature": st.sampled_from([0.0, 0.0, 1.0]),
            "repetition_penalty": st.sampled_from([1.0, 1.0, 1.3]),
            "after": st.integers(0, 4),  # steps before it comes
        }
    ),
    min_size=1,
    max_size=9,
)


def answers(path: str, requests: list[dict[str, Any]], limits: dict[str, int]) -> dict[str, tuple[list[int], Any]]:
    loop = Loop(Toy(), **limits)
    if path != "plain":
        capture = Repeats() if path == "graphs" else None
        put_on_gpu_path(
            loop.runner, capture, limits["max_num_seqs"], max_num_batched_tokens=limits["max_num_batched_tokens"]
        )
    for index, request in enumerate(sorted(requests, key=lambda request: request["after"])):
        while loop.scheduler.has_work and len(loop.runner.model.steps) < request["after"]:
            loop.step()
        fields = {name: value for name, value in request.items() if name != "after"}
        loop.add(str(index), logprobs=2, **fields)
    got = loop.run()
    return {
        name: (one.token_ids, [(entry.token_ids, entry.rank) for entry in one.logprobs]) for name, one in got.items()
    }


@given(
    requests=REQUESTS,
    max_num_seqs=st.integers(1, 9),
    budget=st.integers(9, 64),
    num_blocks=st.sampled_from([12, 96]),
)
@settings(max_examples=60, deadline=None)
def test_graphs_change_no_token(requests: list[dict[str, Any]], max_num_seqs: int, budget: int, num_blocks: int):
    """Whoever is in the step, however prompts are cut and requests preempted."""
    limits = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": budget, "num_blocks": num_blocks}
    expected = answers("plain", requests, limits)
    assert answers("graphs", requests, limits) == expected
    assert answers("eager", requests, limits) == expected


# ------------------------------------------------------------------ buffers
def test_a_buffer_takes_narrow_rows_and_pads_behind_and_beside():
    buffer = gpu.Buffer([4, 3], torch.int32, CPU, padding=-1)
    address = buffer.device.data_ptr()
    buffer.device.fill_(9)
    rows = buffer.put(torch.tensor([[1, 2], [3, 4]]), 3)
    assert rows.tolist() == [[1, 2, -1], [3, 4, -1]] and rows.data_ptr() == address
    assert buffer.device.tolist() == [[1, 2, -1], [3, 4, -1], [-1, -1, -1], [9, 9, 9]]


def test_a_prepared_batch_is_the_batch():
    loop = loop_of(None)
    loop.add("a", [4, 5, 6], max_tokens=2)
    seen = []
    prepare = loop.runner.path.prepare
    loop.runner.path.prepare = lambda batch: seen.append((batch, prepare(batch))) or seen[-1][1]  # type: ignore
    loop.step()
    [(batch, prepared)] = seen
    for name in ("input_ids", "positions", "logits_indices"):
        assert getattr(prepared, name).tolist() == getattr(batch, name).tolist()
    assert prepared.attention.slot_mapping.tolist() == batch.attention.slot_mapping.tolist()
    width = batch.attention.block_table.shape[1]
    assert prepared.attention.block_table[:, :width].tolist() == batch.attention.block_table.tolist()
    assert prepared.attention.query_start_loc == batch.attention.query_start_loc


# ------------------------------------------------------------------ memory
GIB = 2**30


def test_what_a_step_takes_is_told_apart():
    before = MemorySnapshot(total=80 * GIB, free=79 * GIB, reserved=0)
    after = MemorySnapshot(total=80 * GIB, free=60 * GIB, reserved=17 * GIB)
    found = gpu.gpu_memory(before, after, peak_bytes=2 * GIB, graph_share=0.25)
    assert found == GPUMemory(80 * GIB, 79 * GIB, 2 * GIB, GIB // 2, 2 * GIB)
    assert gpu.gpu_memory(before, after, 2 * GIB, 3.0).graph_bytes == 2 * GIB
    others_left = dataclasses.replace(after, free=63 * GIB)
    assert gpu.gpu_memory(before, others_left, 2 * GIB, 0.0).other_bytes == 0


MEASURED = GPUMemory(total_bytes=1_000_000, free_bytes=950_000, activation_bytes=100, graph_bytes=20, other_bytes=3)
ONE_LAYER = [KVCacheSpec(1, 16)]
BLOCK_BYTES = 2 * 16 * 4 * 16


def plan(share: float, weights: int = 0, measured: GPUMemory = MEASURED, **settings_: int) -> Any:
    config = CacheConfig(gpu_memory_utilization=share, **settings_)  # type: ignore[arg-type]
    return plan_kv_cache(config, ONE_LAYER, torch.float32, weights, 1000, measured)


def test_the_cache_gets_the_share_minus_weights_step_graphs_and_others():
    found = plan(0.9, weights=100_000)
    assert found.pool_budget_bytes == 900_000 - 100_000 - 100 - 20 - 3
    assert found.num_blocks == found.pool_budget_bytes // BLOCK_BYTES and found.device_bytes == 1_000_000
    assert "90% of the GPU minus the weights, 100 bytes of one step, 20 bytes of CUDA graphs" in found.rule
    assert plan(0.9, weights=100_000, reserved_memory_bytes=5000).pool_budget_bytes == found.pool_budget_bytes - 5000


def test_two_blocks_are_enough_and_a_byte_less_is_not():
    rest = 900_000 - 123 - 2 * BLOCK_BYTES
    assert plan(0.9, weights=rest).num_blocks == 2
    with pytest.raises(ConfigError, match=f"leaves {2 * BLOCK_BYTES - 1:,} bytes, two blocks need") as caught:
        plan(0.9, weights=rest + 1)
    assert caught.value.parameter == "gpu_memory_utilization"


def test_a_share_that_others_have_is_refused_with_what_is_free():
    assert plan(0.95).num_blocks > 2
    with pytest.raises(ConfigError, match="only 950,000 were free at the start. Lower it to at most 0.95") as caught:
        plan(0.96)
    assert caught.value.parameter == "gpu_memory_utilization"
    assert plan(0.96, reserved_memory_bytes=10_000).num_blocks > 2  # others of this process have their part already
    assert plan(0.96, num_gpu_blocks_override=7).num_blocks == 7
    assert plan(0.96, kv_cache_memory_bytes=10 * BLOCK_BYTES).num_blocks == 10


@pytest.mark.parametrize(("num_reqs", "budget"), [(1, 1), (1, 64), (3, 64), (64, 64), (7, 1000)])
def test_the_step_that_is_measured_has_the_full_budget(num_reqs: int, budget: int):
    batch = gpu.dummy_batch(num_reqs, Limits(64, budget, 2048, 16))
    validate_metadata(batch.attention, num_blocks=1)
    assert batch.attention.num_tokens == len(batch.input_ids) == budget
    assert batch.attention.num_reqs == num_reqs and set(batch.attention.slot_mapping.tolist()) == {-1}


@pytest.mark.parametrize(
    ("max_num_seqs", "budget", "num_reqs", "lengths"),
    [(1, 1024, 1, [128]), (3, 1024, 3, [128, 128, 128]), (64, 300, 1, [100, 100, 100]), (64, 256, 2, [128, 128])],
)
def test_no_request_of_the_measured_step_is_longer_than_the_model_allows(
    max_num_seqs: int, budget: int, num_reqs: int, lengths: list[int]
):
    """An H100 showed it: its buffer of block ids is as wide as max_model_len."""
    limits = Limits(max_num_seqs, budget, 128, 16)
    batch = gpu.dummy_batch(num_reqs, limits)
    assert batch.attention.seq_lens == lengths
    gpu.InputBuffers(limits, CPU).put(batch, 0)


def test_measuring_computes_a_full_step_with_logits_and_sampler(monkeypatch: pytest.MonkeyPatch):
    model, taken = Toy(), {"max_memory_allocated": 700, "memory_allocated": 300, "memory_reserved": 500}
    for name, value in taken.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    for name in ("reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (9000, 10_000))
    sampled = []
    caches = allocate_kv_caches(model.kv_cache_specs, 1, 4, torch.float32)
    path = GPUPath(model, caches, CPU, Limits(5, 40, 64, 4), None)
    monkeypatch.setattr(path, "sample", lambda logits, metadata: sampled.append((logits.shape, len(metadata.seeds))))
    found = gpu.measure_memory(path, MemorySnapshot(10_000, 9800, 0), num_graph_rows=4)
    assert model.steps == [40] and sampled == [((5, 97), 5)]
    assert found == GPUMemory(10_000, 9800, 400, 40, 300)
    sampled.clear()
    model.has_head = False  # type: ignore[assignment]
    gpu.measure_memory(path, MemorySnapshot(10_000, 9800, 0), num_graph_rows=0)
    assert sampled == []


def test_the_dummy_requests_can_be_sampled():
    path = GPUPath(Toy(), [], CPU, Limits(5, 40, 64, 4), None)
    drawn = path.sample(torch.randn(5, 97), gpu.dummy_sampling(5))
    assert drawn.errors == {} and all(entry is not None and len(entry.token_ids) == 2 for entry in drawn.logprobs)


# ------------------------------------------------------------------ devices
def with_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("count", "name", "impl", "expected"),
    [
        (0, "auto", "auto", "cpu"),
        (2, "auto", "auto", "cuda:0"),
        (2, "auto", "cpu", "cpu"),
        (2, "cpu", "auto", "cpu"),
        (2, "cuda", "triton", "cuda:0"),
        (2, "cuda:1", "reference", "cuda:1"),
    ],
)
def test_devices(monkeypatch: pytest.MonkeyPatch, count: int, name: str, impl: str, expected: str):
    with_gpus(monkeypatch, count)
    assert choose_device(name, impl) == torch.device(expected)


@pytest.mark.parametrize(
    ("count", "name", "impl", "message", "parameter"),
    [
        (0, "cuda", "auto", "device cuda is not here: this machine has no GPU that torch can use", "device"),
        (2, "cuda:2", "auto", "device cuda:2 is not here: this machine has cuda:0 to cuda:1", "device"),
        (1, "cuda", "cpu", "impl cpu computes on the CPU, got device cuda", "impl"),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, count: int, name: str, impl: str, message: str, parameter: str
):
    with_gpus(monkeypatch, count)
    with pytest.raises(ConfigError, match=message) as caught:
        choose_device(name, impl)
    assert caught.value.parameter == parameter


def test_a_missing_gpu_is_said_before_a_model_is_looked_for(monkeypatch: pytest.MonkeyPatch):
    with_gpus(monkeypatch, 0)
    with pytest.raises(ConfigError, match="device cuda:1 is not here"):
        LLM("/nowhere/at/all", device="cuda:1")


def test_on_a_cpu_the_path_is_the_plain_one(tiny_model: Any):
    llm = LLM(str(tiny_model("llama")), device="cpu", num_gpu_blocks_override=8)
    runner = llm.llm_engine._executor._runner
    assert runner is not None and type(runner.path) is CPUPath
    assert llm.llm_engine.config.device == DeviceConfig("cpu")


@pytest.mark.parametrize("config_class", ["LlamaConfig", "Gemma3TextConfig"])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_go_to_the_device_each_as_it_is_read(
    config_class: str, tied: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """The meta device stands for a GPU: what lies there is nowhere else."""
    from minivllm.models import loader
    from minivllm.models.registry import model_class

    network = tiny_hf(tiny_config(config_class, tie_word_embeddings=tied))
    on_host: list[int] = []
    options = ModelOptions(dtype=torch.float32, device=torch.device("meta"))
    model = model_class(network.config)(network.config, options)

    def weights() -> Any:
        for name, tensor in weights_of(network).items():
            on_host.append(sum(t.numel() for t in (*model.buffers(), *model.parameters()) if t.device.type == "cpu"))
            yield name, tensor

    monkeypatch.setattr(loader, "check_shapes", lambda *_: None)
    monkeypatch.setattr(loader, "weight_shapes", lambda *_: {})
    monkeypatch.setattr(loader, "iterate_weights", lambda *_, **__: weights())
    monkeypatch.setattr("minivllm.models.registry.model_class", lambda config: lambda *_: model)
    loaded = loader.load_model(None, network.config, options)  # type: ignore[arg-type]
    assert {tensor.device.type for tensor in (*loaded.buffers(), *loaded.parameters())} == {"meta"}
    assert max(on_host) == on_host[0]  # no matrix waits on the host: only what was there before
