"""The tracer: what it says of a kernel is what the kernel did, told from the reference's side."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

from minivllm.kernels import rms_norm as rms_norm_package
from minivllm.kernels.logprobs import logprobs
from minivllm.kernels.paged_attention import kernel, paged_attention
from minivllm.kernels.paged_attention.split import Launch as Cut
from minivllm.kernels.paged_attention.split import choose_launch
from minivllm.kernels.penalties import penalties
from minivllm.kernels.quant_matmul import quant_matmul
from minivllm.kernels.reshape_and_cache import reshape_and_cache
from minivllm.kernels.rms_norm import rms_norm
from minivllm.kernels.rotary_embedding import rotary_embedding
from minivllm.kernels.silu_and_mul import silu_and_mul
from minivllm.kernels.token_bitmask import token_bitmask
from minivllm.kernels.top_k_top_p import top_k_top_p_sample
from minivllm.kernels.trace import SCHEMA_VERSION, Launch, Program, Trace, trace
from minivllm.kernels.trace.recorder import numbers_at
from tests.kernels.helpers import Batch, Request, Shape, make_batch, random_values
from tests.tolerances import LOG_SUM_EXP_ATOL

SHAPE = Shape(2, 3, 64, 16)
REQUESTS = [Request(1), Request(40, seed=1), Request(17, 17, seed=2), Request(200, 5, seed=3), Request(70, 33, seed=4)]
LONG = [Request(1), Request(40, seed=1), Request(200, 5, seed=3)]
CUTS = pytest.mark.parametrize(("requests", "split_len"), [(REQUESTS, None), (LONG, 128)], ids=["whole", "split"])
NUM_KEPT_BLOCKS = 8
FP32 = torch.float32


# ------------------------------------------------------------------ attention: which keys
def traced(batch: Batch, split_len: int | None, **options: Any) -> tuple[Trace, Cut]:
    """The trace of one call, and how it was cut. split_len: None leaves contexts whole."""
    num_tokens, num_heads, head_size = batch.query.shape
    num_kv_heads, longest = batch.k_cache.shape[0], max(batch.metadata.seq_lens)
    cut = choose_launch(
        num_tokens, batch.metadata.num_reqs, longest, num_kv_heads, num_heads // num_kv_heads, head_size,
        multiprocessors=1,
    )  # fmt: skip
    if split_len is not None:
        cut = replace(cut, split_len=split_len, num_splits=-(-longest // split_len))
    inputs = {
        **{name: getattr(batch, name) for name in ("query", "k_cache", "v_cache", "metadata")},
        "scale": head_size**-0.5,
        **dict.fromkeys(("sliding_window", "soft_cap", "alibi_slopes")),
        "launch": cut,
    }
    batch.metadata.plan = None
    return trace(kernel.paged_attention, {**inputs, **options}), cut


def positions_of(batch: Batch, cut: Cut, program: Program) -> tuple[int, list[int]] | None:
    """The request of a program and its query rows' positions; None past the request's end."""
    tile = program.index[0]
    starts, seq_lens = batch.metadata.query_start_loc, batch.metadata.seq_lens
    firsts = [start // cut.block_q + r for r, start in enumerate(starts[:-1])]
    request = max(r for r, first in enumerate(firsts) if first <= tile)
    num_rows = starts[request + 1] - starts[request]
    rows = range((tile - firsts[request]) * cut.block_q, num_rows)[: cut.block_q]
    return (request, [seq_lens[request] - num_rows + row for row in rows]) if rows else None


def slots_loaded(program: Program, tensor: str, head_size: int) -> set[int]:
    """Slots of all heads, numbered as the cache's memory is."""
    loads = [access for access in program.accesses if access.tensor == tensor and access.kind == "load"]
    return {number // head_size for access in loads for number in access.numbers()}


def slots_needed(
    batch: Batch, cut: Cut, window: int | None, request: int, positions: list[int], head: int, split: int
) -> set[int]:
    """Slots of the whole tiles of keys in which some row sees some key of this split."""
    block_size, seq_len = batch.metadata.block_size, batch.metadata.seq_lens[request]
    num_slots = batch.k_cache.shape[1] * block_size
    lowest = min(positions) - (window or 10**9) + 1
    seen = [
        key
        for first in range(0, seq_len, cut.tile)
        for key in range(first, min(first + cut.tile, seq_len))
        if first <= max(positions) and first + cut.tile > lowest
        if split * cut.split_len <= first < (split + 1) * cut.split_len
    ]
    table = batch.metadata.block_table[request].tolist()
    return {head * num_slots + table[key // block_size] * block_size + key % block_size for key in seen}


@CUTS
@pytest.mark.parametrize("window", [None, 7, 100])
def test_attention_loads_the_slots_that_causality_and_window_need(
    window: int | None, requests: list[Request], split_len: int | None
):
    batch = make_batch(requests, SHAPE)
    found, cut = traced(batch, split_len, sliding_window=window)
    num_busy = 0
    for program in found.launches[0].programs:
        owner = positions_of(batch, cut, program)
        expected = set()
        if owner is not None:
            _, head, split = program.index
            expected = slots_needed(batch, cut, window, *owner, head, split)
            num_busy += bool(expected)
        for cache in ("k_cache", "v_cache"):
            assert slots_loaded(program, cache, SHAPE.head_size) == expected, (program.index, cache)
    assert num_busy >= 2 * len(requests)


@CUTS
def test_blocks_of_nobody_and_of_other_requests_are_never_loaded(requests: list[Request], split_len: int | None):
    batch = make_batch(requests, SHAPE)
    found, cut = traced(batch, split_len)
    owned = [
        set(row[: -(-length // SHAPE.block_size)].tolist())
        for row, length in zip(batch.metadata.block_table, batch.metadata.seq_lens, strict=True)
    ]
    loaded: list[set[int]] = [set() for _ in requests]
    for program in found.launches[0].programs:
        for access in program.accesses:
            if access.tensor in ("k_cache", "v_cache"):
                owner = positions_of(batch, cut, program)
                assert owner is not None, program.index
                assert 0 not in access.indices(1), "the null block"
                loaded[owner[0]].update(access.indices(1))
    assert loaded == owned


# ------------------------------------------------------------------ attention: the online softmax
def log_sum_exp(batch: Batch, window: int | None) -> torch.Tensor:  # [num_tokens, num_heads] float64, base 2
    """Of every row's visible scores, from the definition."""
    rows = []
    metadata, double = batch.metadata, batch.double()
    for r, seq_len in enumerate(metadata.seq_lens):
        start, stop = metadata.query_start_loc[r : r + 2]
        keys = torch.arange(seq_len)
        blocks = metadata.block_table[r].long()[keys // metadata.block_size]
        k = double.k_cache[:, blocks, keys % metadata.block_size].repeat_interleave(SHAPE.group, dim=0)
        scores = torch.einsum("thd,hkd->thk", double.query[start:stop], k) * SHAPE.head_size**-0.5
        distance = torch.arange(seq_len - (stop - start), seq_len)[:, None] - keys
        hidden = (distance < 0) | (distance >= (window or 10**9))
        rows.append(torch.logsumexp(scores.masked_fill(hidden[:, None], -torch.inf), dim=-1))
    return torch.cat(rows) / np.log(2)


@pytest.mark.parametrize("window", [None, 100])
def test_maximum_and_sum_after_the_last_tile_are_the_log_sum_exp(window: int | None):
    batch = make_batch(REQUESTS, SHAPE)
    found, cut = traced(batch, None, sliding_window=window)
    expected = log_sum_exp(batch, window)
    seen = torch.full_like(expected, torch.nan)
    for program in found.launches[0].programs:
        owner = positions_of(batch, cut, program)
        if owner is None:
            assert program.tiles == ()
            continue
        request, positions = owner
        end = batch.metadata.query_start_loc[request + 1]
        last = program.tiles[-1]
        for lane in range(len(positions) * SHAPE.group):  # the lanes behind belong to no row and are never stored
            row, head = divmod(lane, SHAPE.group)
            token = end - batch.metadata.seq_lens[request] + positions[row]
            lse = last.running_max[lane] + np.log2(last.running_sum[lane])
            seen[token, program.index[1] * SHAPE.group + head] = lse
        stored = [access.num_active for access in program.accesses if access.kind == "store"]
        assert stored == [len(positions) * SHAPE.group * SHAPE.head_size]
    torch.testing.assert_close(seen, expected, atol=LOG_SUM_EXP_ATOL, rtol=0)


def test_tiles_are_those_whose_keys_are_loaded_and_the_maximum_only_grows():
    found, cut = traced(make_batch([Request(200, 5, seed=3)], SHAPE), None)
    program = found.launches[0].programs[0]
    assert [tile.first_key for tile in program.tiles] == list(range(0, 200, cut.tile))
    assert {access.tile for access in program.accesses if access.tensor == "k_cache"} == set(range(0, 200, cut.tile))
    assert {access.tile for access in program.accesses if access.tensor in ("query", "out")} == {None}
    maxima = torch.tensor([tile.running_max for tile in program.tiles])
    assert (maxima.diff(dim=0)[:, : 5 * SHAPE.group] >= 0).all()


def test_a_split_that_sees_no_key_has_no_tile_and_the_merge_reads_every_split():
    found, cut = traced(make_batch([Request(40), Request(300, seed=1)], SHAPE), 128)
    first, merge = found.launches
    short = [program for program in first.programs if program.index == (0, 0, 1)]
    assert [program.tiles for program in short] == [()]
    assert merge.kernel == "merge_kernel"
    for program in merge.programs:
        (load,) = [access for access in program.accesses if access.tensor == "lse"]
        assert load.indices(0) == list(range(cut.num_splits))


# ------------------------------------------------------------------ every operation
def every_operation() -> dict[str, tuple[Any, dict[str, Any]]]:
    """name -> operation and inputs."""
    rows = random_values(5, 9, 16, dtype=torch.bfloat16)
    angles = random_values(5, 8, dtype=FP32, seed=1)
    caches = [torch.zeros(2, NUM_KEPT_BLOCKS, 16, 16, dtype=torch.bfloat16) for _ in "kv"]
    batch = make_batch(REQUESTS, SHAPE)
    attention = {name: getattr(batch, name) for name in ("query", "k_cache", "v_cache", "metadata")}
    return {
        "rms_norm": (
            rms_norm,
            {"x": rows, "weight": rows[0, 0], "eps": 1e-5, "residual": rows.flip(0).contiguous()},
        ),
        "rotary_embedding": (
            rotary_embedding,
            {
                "query": rows[:, :4],
                "key": rows[:, 4:6],
                "cos": torch.cat([angles.cos()] * 2, -1),
                "sin": torch.cat([-angles.sin(), angles.sin()], -1),
            },
        ),
        "silu_and_mul": (silu_and_mul, {"x": random_values(3, 2050, dtype=FP32)}),
        "reshape_and_cache": (
            reshape_and_cache,
            {
                "key": rows[:, 4:6],
                "value": rows[:, 6:8],
                **dict(zip(("k_cache", "v_cache"), caches, strict=True)),
                "slot_mapping": torch.tensor([40, -1, 3, 2, 90]),
            },
        ),
        "paged_attention": (paged_attention, {**attention, "scale": 0.125}),
        "quant_matmul": (
            quant_matmul,
            {
                "rows": random_values(3, 64, dtype=FP32),
                "codes": torch.arange(40 * 64).remainder(255).sub(127).to(torch.int8).view(40, 64),
                "scales": random_values(40, dtype=FP32, seed=1),
            },
        ),
        **operations_on_logits(),
    }


def operations_on_logits() -> dict[str, tuple[Any, dict[str, Any]]]:
    """The same, of two rows of 40 logits."""
    logits = random_values(2, 40, dtype=FP32, size=3.0)
    ids = torch.tensor([[1, 7, 39], [0, 2, 0]], dtype=torch.int32)
    ones = torch.ones(2, dtype=torch.float64)
    return {
        "token_bitmask": (token_bitmask, {"logits": logits.clone(), "bitmask": ids[:, :2].contiguous()}),
        "penalties": (
            penalties,
            {
                "logits": logits.clone(),
                "seen_token_ids": ids,
                "output_counts": torch.ones_like(ids),
                "num_seen": torch.tensor([3, 2], dtype=torch.int32),
                **dict.fromkeys(("repetition", "frequency", "presence"), ones),
            },
        ),
        "logprobs": (logprobs, {"logits": logits, "token_ids": torch.tensor([3, 39]), "num_top": 2}),
        "top_k_top_p": (
            top_k_top_p_sample,
            {
                "logits": logits,
                "temperature": ones,
                "top_k": torch.tensor([5, 40], dtype=torch.int32),
                "top_p": 0.9 * ones,
                "min_p": 0 * ones,
                "uniform": 0.5 * ones,
            },
        ),
    }


def stored(launch: Launch, tensor: str) -> Counter[int]:
    return Counter(
        number
        for program in launch.programs
        for access in program.accesses
        if access.kind == "store" and access.tensor == tensor
        for number in access.numbers()
    )


def test_every_operation_with_a_kernel_is_looked_at_here():
    folder = Path(str(rms_norm_package.__file__)).parents[1]
    assert set(every_operation()) == {file.parent.name for file in folder.glob("*/kernel.py")}


@pytest.mark.parametrize("name", every_operation())
def test_every_operation_can_be_traced(name: str):
    found = trace(*every_operation()[name])
    assert found.launches
    for launch in found.launches:
        names = {tensor.name for tensor in launch.tensors}
        kinds = {access.kind for program in launch.programs for access in program.accesses}
        assert kinds == {"load", "store"}
        assert {access.tensor for program in launch.programs for access in program.accesses} <= names
    assert Trace.from_json(found.to_json()) == found
    assert len(page_data(found)["launches"]) == len(found.launches)


@pytest.mark.parametrize("name", ["rms_norm", "rotary_embedding", "silu_and_mul", "paged_attention"])
def test_stores_cover_the_output_exactly_once(name: str):
    found = trace(*every_operation()[name])
    assert found.operation == name
    for launch in found.launches:
        size = next(int(np.prod(tensor.shape)) for tensor in launch.tensors if tensor.name == "out")
        assert stored(launch, "out") == Counter(range(size))


def test_the_output_of_split_attention_is_covered_exactly_once():
    found, _ = traced(make_batch(LONG, SHAPE), 128)
    sizes = [{tensor.name: int(np.prod(tensor.shape)) for tensor in launch.tensors} for launch in found.launches]
    for launch, size in zip(found.launches, sizes, strict=True):
        assert stored(launch, "out") == Counter(range(size["out"]))
    assert stored(found.launches[0], "lse") == Counter(range(sizes[0]["lse"]))


def test_keys_and_values_of_one_row_keep_their_names_and_land_in_their_slots():
    (launch,) = trace(*every_operation()["reshape_and_cache"]).launches
    slots = [program.accesses[0] for program in launch.programs]
    assert [access.text for access in slots] == [f"slot_mapping[{token}]" for token in range(5)]
    texts = [[access.text for access in program.accesses[1:]] for program in launch.programs]
    assert texts[1] == []  # slot -1
    assert texts[0] == [
        "key[0, 0:2, 0:16]",
        "k_cache[0:2, 2, 8, 0:16]",
        "value[0, 0:2, 0:16]",
        "v_cache[0:2, 2, 8, 0:16]",
    ]


@pytest.mark.parametrize("dtype", [FP32, torch.float16, torch.bfloat16], ids=str)
def test_stored_values_are_those_of_the_output(dtype: torch.dtype):
    inputs = {"x": random_values(3, 9, dtype=dtype), "weight": random_values(9, dtype=dtype, seed=1), "eps": 1e-5}
    (launch,) = trace(rms_norm, inputs).launches
    written = torch.empty(27, dtype=dtype)
    for program in launch.programs:
        access = program.accesses[-1]
        assert access.values is not None
        written[access.numbers()] = torch.tensor(access.values).to(dtype)
    assert torch.equal(written.view(3, 9), rms_norm(**inputs, impl="triton"))


def test_an_access_knows_its_line_and_its_mask():
    (launch,) = trace(rms_norm, {"x": torch.ones(2, 9), "weight": torch.ones(9), "eps": 1e-5}).launches
    assert (launch.kernel, launch.grid, launch.numbers["BLOCK"]) == ("rms_norm_kernel", (2, 1, 1), 16)
    for program in launch.programs:
        for access in program.accesses:
            assert (access.num_active, access.num_lanes) == (9, 16)
            line = launch.source[access.line - launch.first_line]
            assert f"tl.{access.kind}({access.tensor}_ptr" in line


def test_a_tensor_given_as_several_arguments_has_the_name_that_the_code_says():
    """Without a quantised cache and slopes, seq_lens stands in for what is never read."""
    found, _ = traced(make_batch([Request(40, seed=1)], SHAPE), None)
    loaded = {access.tensor for access in found.launches[0].programs[0].accesses}
    assert loaded == {"query_start_loc", "seq_lens", "query", "block_table", "k_cache", "v_cache", "out"}


# ------------------------------------------------------------------ numbers of a view
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_every_view_is_numbered_by_its_own_shape(data: st.DataObject):
    shape = data.draw(st.lists(st.integers(1, 4), min_size=0, max_size=4))
    dtype = data.draw(st.sampled_from([FP32, torch.int8, torch.int64]))
    view = torch.zeros(shape, dtype=dtype).permute(data.draw(st.permutations(range(len(shape)))))
    for axis, size in enumerate(view.shape):
        first, step = data.draw(st.integers(0, size - 1)), data.draw(st.integers(1, 2))
        view = view[(slice(None),) * axis + (slice(first, None, step),)]
    index = np.indices(view.shape).reshape(view.ndim, view.numel())
    strides = np.array(view.stride(), dtype=np.int64).reshape(-1, 1)
    addresses = (view.data_ptr() + (index * strides).sum(axis=0) * view.itemsize).astype(np.uint64)
    found = numbers_at(view, addresses)
    assert found is not None
    assert found.tolist() == list(range(view.numel()))


def test_addresses_beside_a_view_have_no_number():
    rows = torch.zeros(4, 6)
    view = rows[1:3, 2:4]

    def at(row: int, column: int) -> np.ndarray:
        return np.array([rows.data_ptr() + (6 * row + column) * 4], dtype=np.uint64)

    assert [numbers_at(view, at(*place)).tolist() for place in ((1, 2), (2, 3))] == [[0], [3]]
    for place in ((0, 2), (1, 1), (1, 4), (3, 2), (2, 4)):
        assert numbers_at(view, at(*place)) is None
    assert numbers_at(view, at(1, 2) + np.uint64(2)) is None  # inside a value
    assert numbers_at(view[:0], at(1, 2)) is None


# ------------------------------------------------------------------ records
def test_json_gives_the_trace_back():
    found, _ = traced(make_batch([Request(1), Request(70, 9, seed=1)], SHAPE), 64)
    text = found.to_json()
    strict = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert strict["version"] == SCHEMA_VERSION
    assert Trace.from_json(text) == found


def test_a_trace_of_another_version_is_refused():
    with pytest.raises(ValueError, match=r"version: expected a trace of schema 1, got 2"):
        Trace.from_json('{"version": 2, "operation": "x", "launches": []}')


def test_nothing_launched_is_a_trace_too():
    found = trace(silu_and_mul, {"x": torch.empty(0, 8)})
    assert found.launches == ()
    assert Trace.from_json(found.to_json()) == found
    assert "<script" in found.to_html()


# ------------------------------------------------------------------ the page
def test_the_page_needs_nothing_else_and_a_notebook_shows_the_same():
    found = trace(*every_operation()["rotary_embedding"])
    page = found.to_html()
    assert not re.search(r"https?:|//[a-z]|<link|<img|\ssrc=|@import|url\(|fetch\(|__[A-Z]+__", page)
    shown = re.fullmatch(r'<iframe srcdoc="([^"]*)".*</iframe>', found._repr_html_(), re.DOTALL)
    assert shown is not None
    assert html.unescape(shown[1]) == page


def page_data(found: Trace) -> Any:
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', found.to_html(), re.DOTALL)
    assert data is not None
    return json.loads(data[1])


def test_the_page_has_every_step_and_its_squares_are_the_slots():
    batch = make_batch([Request(40, seed=1)], SHAPE)
    found, _ = traced(batch, None)
    (launch,) = page_data(found)["launches"]
    names = [tensor["name"] for tensor in launch["tensors"]]
    cache = launch["tensors"][names.index("k_cache")]
    num_blocks = batch.k_cache.shape[1]
    assert (cache["rows"], cache["columns"], cache["group"]) == (2, num_blocks * 16, 16)
    for program, drawn in zip(found.launches[0].programs, launch["programs"], strict=True):
        assert len(program.accesses) == len(drawn["steps"])
        squares = {
            cell
            for step in drawn["steps"]
            if step["tensor"] == names.index("k_cache")
            for first, stop in step["cells"]
            for cell in range(first, stop)
        }
        assert squares == slots_loaded(program, "k_cache", SHAPE.head_size)


def test_long_rows_share_squares():
    """The gate is the first half of a row of 2,050 values, drawn as 64 squares; up is the second half."""
    (launch,) = page_data(trace(silu_and_mul, {"x": torch.ones(3, 2050)}))["launches"]
    rows = [program for program in launch["programs"] if program["index"][1] == 0]
    for row, program in enumerate(rows):
        gate, up, _ = (step["cells"] for step in program["steps"])
        assert (gate, up) == ([[64 * row, 64 * row + 32]], [[64 * row + 32, 64 * row + 64]])


def test_source_that_looks_like_html_stays_text():
    found = trace(rms_norm, {"x": torch.ones(2, 9), "weight": torch.ones(9), "eps": 1e-5})
    (launch,) = found.launches
    evil = replace(found, launches=(replace(launch, source=("</script><script>alert(1)",)),), operation="<b>")
    page = evil.to_html()
    assert "</script><script>alert" not in page
    assert "<b>" not in page
    assert page_data(evil)["launches"][0]["source"] == ["</script><script>alert(1)"]


# ------------------------------------------------------------------ the interpreter
@triton.jit
def _reads_too_far(x_ptr, out_ptr, size: tl.constexpr):
    columns = tl.arange(0, size)
    tl.store(out_ptr + columns, tl.load(x_ptr + 1 + columns))


def run_too_far(x: torch.Tensor) -> None:  # [size]
    """Reads one value behind x."""
    _reads_too_far[(1,)](x, torch.empty_like(x), size=x.shape[0])


def test_an_access_outside_is_an_error_and_leaves_the_interpreter_as_it_was():
    before = (interpreter.interpreter_builder.create_masked_load, interpreter.GridExecutor)
    with pytest.raises(InterpreterError, match=r"program \(0, 0, 0\), line \d+: it touches memory outside"):
        trace(run_too_far, {"x": torch.zeros(8)})
    assert (interpreter.interpreter_builder.create_masked_load, interpreter.GridExecutor) == before


LATE = """
import os, torch, triton
os.environ["TRITON_INTERPRET"] = "1"
"""


@pytest.mark.parametrize("start", ["import torch", LATE], ids=["never", "too late"])
def test_without_the_interpreter_the_error_says_what_to_do(start: str):
    program = f"""{start}
from minivllm.kernels.rms_norm import rms_norm
from minivllm.kernels.trace import trace
try:
    trace(rms_norm, {{"x": torch.ones(1, 8), "weight": torch.ones(8), "eps": 1e-5}})
except RuntimeError as error:
    print(error)
"""
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert re.search(r"Set TRITON_INTERPRET=1 before triton is imported", done.stdout), done.stderr
