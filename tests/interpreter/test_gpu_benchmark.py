"""benchmarks/gpu.py and tests/gpu before there is a GPU: the script runs, its three ways agree, it counts bytes right;
and an operation on another device looks to a test as if it had run here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.gpu import Step, Timer, comparison_row, decode_row, engine_rows, table
from minivllm.kernels.reshape_and_cache import reshape_and_cache
from tests.gpu.moved import MovedModule, moved, same_bits, to
from tests.kernels.helpers import random_values
from tests.tolerances import KERNEL_ERROR_FACTOR

TIMER = Timer("cpu", 1)


def test_all_three_ways_mean_the_same():
    for num_rows, seq_len in ((1, 40), (20, 20)):
        row = comparison_row(TIMER, 1, num_rows, seq_len)
        assert row["largest_difference"] <= KERNEL_ERROR_FACTOR * torch.finfo(torch.bfloat16).eps
        assert min(rate for name, rate in row.items() if name.endswith("_per_s")) > 0


def test_the_rate_counts_keys_and_values_once():
    """Two requests of 40 tokens, 8 heads of 128 values of two bytes, twice."""
    assert Step(2, 1, 40, "cpu").key_value_bytes == 2 * 40 * 8 * 128 * 2 * 2
    row = decode_row(TIMER, 2, 40, copy_rate=1e9)
    assert row["gb_per_s"] == row["fraction_of_copy"]
    assert round(row["gb_per_s"] * row["microseconds"] * 1e3) == 2 * 40 * 8 * 128 * 2 * 2


def test_the_engines_table_has_a_line_per_number_of_requests(tiny_model: Callable[[str], Path]):
    rows = engine_rows(str(tiny_model("llama")), "cpu", (1, 2), 2, 1e9)
    assert [row["requests"] for row in rows] == [1, 2]
    for row in rows:
        assert row["graphs_over_eager"] == row["graphs_tokens_per_s"] / row["eager_tokens_per_s"] > 0
        assert row["graphs_over_transformers"] == row["graphs_tokens_per_s"] / row["transformers_tokens_per_s"] > 0


def test_the_table_has_a_line_per_row():
    assert table([{"a": 1, "rate": 12345.678}, {"a": 20, "rate": 0.5}]).split("\n") == [
        " a       rate",
        " 1  1.235e+04",
        "20        0.5",
    ]


def test_a_moved_operation_brings_back_what_it_changed_in_place():
    key = random_values(3, 2, 16, dtype=torch.float32)
    slots = torch.tensor([4, 1, 9])
    caches = [torch.full((2, 1, 16, 16), torch.nan) for _ in range(4)]
    moved(reshape_and_cache, "cpu")(key, key, *caches[:2], slots, impl="triton")
    reshape_and_cache(key, key, *caches[2:], slots, impl="reference")
    for got, expected in zip(caches[:2], caches[2:], strict=True):
        assert same_bits(got, expected)


def test_a_copy_elsewhere_has_the_same_strides_and_its_own_memory():
    view = random_values(4, 6, dtype=torch.float32)[:, 1:4].T
    copy = to(view, "cpu")
    assert (copy.stride(), copy.data_ptr() == view.data_ptr()) == (view.stride(), False)
    assert torch.equal(copy, view)
    assert torch.equal(to(torch.ones(1).expand(3), "cpu"), torch.ones(3))


def test_other_calls_and_constants_stay_where_they_are():
    seen = []

    def operation(x: torch.Tensor, impl: str) -> tuple[torch.Tensor, int]:  # [...]
        seen.append(x)
        return x, 1

    x = torch.ones(2)
    moved(operation, "cpu")(x, impl="reference")
    moved(operation, "cpu")(x, impl="triton")
    assert [one is x for one in seen] == [True, False]
    assert MovedModule(torch.nn, "cpu").__name__ == "torch.nn"
