"""What the compiled CPU kernels are made of: values in and out of bfloat16, exp and tanh, shapes, folders."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from minivllm.kernels import jit as compiled
from minivllm.kernels.jit import (
    BFLOAT16,
    FLOAT32,
    array_at,
    constant,
    exp,
    exp2,
    jit,
    largest_of,
    like,
    narrow,
    rounded,
    supports,
    tanh,
    value_of,
    widen,
)
from minivllm.kernels.paged_attention import paged_attention
from tests.kernels.helpers import DTYPES, Request, Shape, as_bits, make_batch, random_values
from tests.tolerances import COMPILED_EXP

SPECIAL = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    1e-45,
    3.4e38,
    -3.4e38,
    float("inf"),
    float("-inf"),
    float("nan"),
    1.00390625,
    1.01171875,
]


@jit
def round_trip(source, target, num_values, like_source, like_target):
    values, rounded = array_at(source, (num_values,), like_source), array_at(target, (num_values,), like_target)
    for i in range(num_values):
        rounded[i] = narrow(widen(values[i]), like_target)


@jit
def apply(values, exps, tanhs):
    for i in range(len(values)):
        exps[i], tanhs[i] = exp(values[i]), tanh(values[i])


@pytest.mark.parametrize("source_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target_dtype", DTYPES, ids=str)
def test_values_are_rounded_as_torch_rounds_them(source_dtype: torch.dtype, target_dtype: torch.dtype):
    """To the nearest, ties to even; NaN, infinities and signed zeros stay."""
    source = torch.cat([torch.tensor(SPECIAL), random_values(5000, dtype=torch.float32)]).to(source_dtype)
    target = torch.empty(len(source), dtype=target_dtype)
    round_trip(source.data_ptr(), target.data_ptr(), len(source), like(source), like(target))
    expected = source.to(target_dtype)
    assert torch.equal(target.isnan(), expected.isnan())
    assert torch.equal(as_bits(target[~target.isnan()]), as_bits(expected[~expected.isnan()]))


def test_exp_and_tanh_are_those_of_float64():
    values = np.linspace(-87, 88, 100_001).astype(np.float32)
    exps, tanhs = np.empty_like(values), np.empty_like(values)
    apply(values, exps, tanhs)
    exact = np.exp(values.astype(np.float64))
    assert (np.abs(exps - exact) <= COMPILED_EXP * exact).all()
    assert (np.abs(tanhs - np.tanh(values.astype(np.float64))) <= COMPILED_EXP).all()


def test_exp_far_out_and_of_what_is_no_number():
    values = np.array([-1000, -np.inf, 100, np.inf, np.nan], dtype=np.float32)
    exps, tanhs = np.empty_like(values), np.empty_like(values)
    apply(values, exps, tanhs)
    assert (exps[:2] >= 0).all() and (exps[:2] < 1e-37).all()
    assert np.isposinf(exps[2:4]).all() and np.isnan(exps[4])
    assert tanhs[:4].tolist() == [-1, -1, 1, 1] and np.isnan(tanhs[4])


@jit
def apply_exp2(values, powers):
    for i in range(len(values)):
        powers[i] = exp2(values[i])


def test_exp2_is_that_of_float64_and_nearly_nothing_far_below():
    values = np.linspace(-125, 0, 100_001).astype(np.float32)
    powers = np.empty_like(values)
    apply_exp2(values, powers)
    exact = np.exp2(values.astype(np.float64))
    assert (np.abs(powers - exact) <= COMPILED_EXP * exact).all()
    far = np.array([-200, -np.inf, np.nan], dtype=np.float32)
    apply_exp2(far, powers[:3])
    assert (powers[:2] >= 0).all() and (powers[:2] < 1.2e-38).all() and np.isnan(powers[2])


@jit
def apply_rounded(values, results, like_result):
    for i in range(len(values)):
        results[i] = rounded(values[i], like_result)


def test_rounded_is_what_torch_would_keep():
    values = torch.cat([torch.tensor(SPECIAL), random_values(5000, dtype=torch.float32)])
    results = np.empty(len(values), np.float32)
    apply_rounded(values.numpy(), results, BFLOAT16)
    expected = values.bfloat16().float()
    is_number = ~expected.isnan()
    assert np.isnan(results[~is_number.numpy()]).all()
    assert torch.equal(torch.from_numpy(results)[is_number].view(torch.int32), expected[is_number].view(torch.int32))
    apply_rounded(values.numpy(), results, FLOAT32)
    assert torch.equal(torch.from_numpy(results)[is_number], values[is_number])


@jit
def largest(values):
    return largest_of(values)


@pytest.mark.parametrize(
    "values",
    [[], [-3.0], [-3.0, -0.5, -7.0], [0.0, -0.0], [-np.inf, -np.inf], [1.0, np.inf], [-1e-45, -1.0], [2.0, 3.5, -9.0]],
    ids=str,
)
def test_the_largest_of_a_few(values: list[float]):
    assert largest(np.array(values, np.float32)) == np.float32(max(values, default=-np.inf))


def test_the_largest_of_many_wherever_it_is_and_a_number_that_has_gone_bad():
    values = random_values(1000, dtype=torch.float32).numpy()
    for place in (0, 1, 15, 16, 500, 998, 999):
        one = values.copy()
        one[place] = 50
        assert largest(one) == 50 and largest(-np.abs(one)) == (-np.abs(one)).max()
        one[place] = np.nan
        assert np.isnan(largest(one))


@jit
def times(number, factor):
    return number * value_of(factor)


def test_a_constant_is_compiled_in():
    assert [times(3, constant(64)), times(3, constant(128)), times(5, constant(64))] == [192, 384, 320]
    assert len(times.signatures) == 2


def test_without_a_folder_to_write_to_kernels_are_compiled_all_the_same(monkeypatch: pytest.MonkeyPatch):
    plain = compiled.numba.njit

    def njit(*arguments, cache: bool = False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return plain(*arguments, **options)

    monkeypatch.setattr(compiled.numba, "njit", njit)

    @compiled.jit
    def double(x):
        return 2 * x

    assert double(21) == 42


@pytest.mark.parametrize("num_threads", [1, 2])
def test_kernels_leave_the_number_of_threads_as_it_is(num_threads: int):
    """Numba tells OpenMP, which it shares with torch, to use all cores."""
    program = (
        "import torch; from minivllm.kernels.rms_norm import rms_norm; before = torch.get_num_threads(); "
        "rms_norm(torch.ones(4, 64), torch.ones(64), 1e-5); print(before, torch.get_num_threads())"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(num_threads)] * 2


def test_other_dtypes_are_left_to_the_reference():
    assert [supports(torch.zeros(1, dtype=dtype)) for dtype in (torch.float16, torch.float64)] == [False, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_number_in_the_context_shows_in_its_own_request_only(dtype: torch.dtype, bad: float):
    batch = make_batch([Request(300, seed=1), Request(40, seed=2)], Shape(dtype=dtype))
    block, slot = int(batch.metadata.block_table[0, 3]), 5
    batch.k_cache[:, block, slot] = bad
    out = paged_attention(batch.query, batch.k_cache, batch.v_cache, batch.metadata, scale=0.125, impl="cpu")
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


# ------------------------------------------------------------------ kept on disk
A_STEP = """
import torch
from minivllm.kernels.paged_attention import AttentionMetadata, paged_attention
from minivllm.kernels.rms_norm import rms_norm
query, cache = torch.ones(1, 2, 64), torch.ones(1, 18, 16, 64)
metadata = AttentionMetadata([0, 1], [257], torch.ones(1, 17, dtype=torch.int32), torch.tensor([-1]), 16)
paged_attention(query, cache, cache, metadata, scale=1.0, impl="cpu")
rms_norm(query[0], torch.ones(64), 1e-5, impl="cpu")
"""


def test_a_second_process_compiles_nothing(tmp_path: Path):
    """Numba's key of a function holds what its closure holds: a compiled function there is new in each process."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    kept = []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", A_STEP], env=environment, check=True)
        kept.append({file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.nb*")})
    assert len(kept[0]) >= 6 and kept[0] == kept[1]


def test_a_change_in_any_file_of_the_kernels_compiles_anew(tmp_path: Path):
    """A kernel holds the code of those that it calls, and numba looks at the kernel's own file only."""
    changed = "from minivllm.kernels import jit; jit.SOURCES = (*jit.SOURCES[1:], ('jit.py', 1, 1))\n"
    kept = []
    for program in (A_STEP, changed + A_STEP):
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
        subprocess.run([sys.executable, "-c", program], env=environment, check=True)
        kept.append({file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.nbi")})
    assert kept[0].keys() == kept[1].keys() and all(kept[0][file] < kept[1][file] for file in kept[0])
