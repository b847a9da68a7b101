"""The compilers' report: no budget is broken, the committed snapshot is the sources', and the budgets can be broken."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import triton

from minivllm.kernels import report
from minivllm.kernels.build import Build, Workload
from minivllm.kernels.report import TARGETS, Row, Target

SNAPSHOT = Path(__file__).parents[2] / "docs" / "kernel-report.md"
BY_ARCH = {target.arch: target for target in TARGETS}


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return report.report()


def build_named(name: str) -> Build:
    return next(build for build in report.all_builds() if build.name == name)


def test_every_kernel_is_within_its_budget_on_every_target(rows: list[Row]):
    assert {row.target for row in rows} == set(BY_ARCH)
    assert len(rows) == len(TARGETS) * len(report.all_builds())
    assert [(row.operation, row.build, row.target, row.broken) for row in rows if row.broken] == []


def test_every_operation_with_a_kernel_is_in_the_report():
    kernels = {file.parent.name for file in Path(report.__file__).parent.glob("*/kernel.py")}
    assert {build.operation for build in report.all_builds()} == kernels


def test_the_committed_snapshot_is_of_these_sources(rows: list[Row]):
    """With another compiler than the snapshot's its numbers may differ; the rows may not."""
    text = SNAPSHOT.read_text(encoding="utf-8")
    found = re.search(r"<!-- sources (\w+) triton (\S+) -->", text)
    assert found is not None
    assert found.group(1) == report.fingerprint(), "python -m minivllm.kernels.report --write docs/kernel-report.md"
    table = report.as_markdown(rows)
    if found.group(2) == triton.__version__:
        assert text.endswith(table)
    else:
        assert len(text.split("| paged_attention |")) == len(table.split("| paged_attention |"))


SMALLEST = {build.kernel: build for build in report.all_builds()}  # one of each kernel


@pytest.mark.parametrize("build", SMALLEST.values(), ids=lambda build: build.kernel.__name__)
def test_a_number_that_is_one_compiles_too(build: Build):
    """Triton then makes a constant of the argument, which has no methods of a tensor: the interpreter never does."""
    ones = {name: 1 for name, type_name in build.types.items() if type_name == "i32"}
    types = {name: type_name for name, type_name in build.types.items() if name not in ones}
    small = dataclasses.replace(
        build, types=types, constants={**build.constants, **ones}, divisible=build.divisible - ones.keys()
    )
    assert report.compile_build(small, BY_ARCH["sm_90"]).asm["cubin"]


# ------------------------------------------------------------------ each budget can be broken
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"constants": {"TILE": 128, "BLOCK_M": 128, "BLOCK_Q": 32}}, "spills"),
        ({"constants": {"TILE": 256}, "num_stages": 4}, "shared memory above"),
    ],
    ids=["spills", "shared memory"],
)
def test_too_large_tiles_are_found(change: dict[str, object], complaint: str):
    prefill = build_named("prefill 128")
    change = {**change, "constants": {**prefill.constants, **change["constants"]}}  # type: ignore[dict-item]
    try:
        (row,) = report.report([BY_ARCH["sm_80"]], [dataclasses.replace(prefill, **change)])
    except triton.runtime.errors.OutOfResources:
        return
    assert any(complaint in broken for broken in row.broken)


def test_loads_without_the_promise_of_divisibility_are_found():
    norm = build_named("size 4096")
    (row,) = report.report([BY_ARCH["sm_90"]], [dataclasses.replace(norm, divisible=frozenset())])
    assert row.broken == ("no 128-bit loads",)


def test_a_product_that_is_no_tensor_instruction_is_found():
    norm = dataclasses.replace(build_named("size 4096"), has_dot=True)
    (row,) = report.report([BY_ARCH["sm_90"]], [norm])
    assert row.broken == ("no tensor instructions",)


# ------------------------------------------------------------------ the model
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.arch)
@pytest.mark.parametrize("context", [1 << 10, 4 << 10, 16 << 10, 32 << 10, 128 << 10])
@pytest.mark.parametrize("batch", [1, 64])
def test_decode_attention_is_within_a_quarter_of_its_bytes_by_the_model(
    rows: list[Row], target: Target, batch: int, context: int
):
    """Of Llama-3-8B, the split rule included; bound: keys and values once at full bandwidth, or one latency."""
    assert report.decode_model(rows, target, batch, context).ratio <= 1.25


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.arch)
@pytest.mark.parametrize("bucket", [1 << 10, 4 << 10, 16 << 10, 32 << 10, 128 << 10])
@pytest.mark.parametrize("batch", [1, 64])
def test_a_graph_cut_for_the_end_of_its_bucket_is_within_a_quarter_at_the_beginning(
    rows: list[Row], target: Target, batch: int, bucket: int
):
    """worker/gpu.py rounds contexts up to a power of two: at worst nearly half of the splits have nothing to read."""
    found = report.decode_model(rows, target, batch, bucket // 2 + 1, cut_for=bucket)
    whole = report.decode_model(rows, target, batch, bucket)
    assert found.ratio <= 1.25 and found.num_splits <= whole.num_splits // 2 + 1


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.arch)
def test_without_splits_one_long_request_would_miss_the_bound(rows: list[Row], target: Target):
    """The model can say no: a split rule that saw one multiprocessor only would break it on every GPU."""
    found = report.decode_model(rows, target, 1, 32 << 10, multiprocessors=1)
    assert found.num_splits == 1
    assert found.ratio > 2


def test_more_bytes_take_longer_and_more_programs_do_not():
    target = BY_ARCH["sm_90"]
    small = Workload("", 10**6, 0, 10**3, 10**4)
    assert report.model_seconds(target, dataclasses.replace(small, bytes=10**9), 2) > report.model_seconds(
        target, small, 2
    )
    one = dataclasses.replace(small, programs=1)
    assert report.model_seconds(target, one, 2) > report.model_seconds(target, small, 2)
    assert report.model_seconds(target, small, 2) >= report.bound_seconds(target, small)


def test_the_command_prints_one_target_as_json(capsys: pytest.CaptureFixture[str]):
    import json

    assert report.main(["--target", "sm_90", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["target"] for row in found} == {"sm_90"}
    assert {"registers", "spills", "bytes", "flops", "model_microseconds"} <= set(found[0])
