"""What the compilers make of quantised caches and weights, beyond the budgets of every row."""

from __future__ import annotations

import dataclasses
import re

import pytest

from minivllm.kernels import report
from minivllm.kernels.build import Build

BY_ARCH = {target.arch: target for target in report.TARGETS}


def build_named(operation: str, name: str) -> Build:
    return next(build for build in report.all_builds() if (build.operation, build.name) == (operation, name))


def ptx(build: Build, arch: str) -> str:
    return str(report.compile_build(build, BY_ARCH[arch]).asm["ptx"])


@pytest.mark.parametrize("codes", ["int8", "fp8"])
@pytest.mark.parametrize("step", ["decode 128", "prefill 128"])
def test_a_quantised_cache_has_builds_of_its_own(step: str, codes: str):
    """Not those of plain values under another name."""
    quantised = build_named("paged_attention", f"{step}, {codes}")
    assert quantised.types["k_cache_ptr"] != build_named("paged_attention", step).types["k_cache_ptr"]
    assert quantised.constants["IS_QUANTISED"]


@pytest.mark.parametrize("step", ["decode 128", "prefill 64"])
def test_a_cache_of_values_pays_nothing_for_the_switch(step: str):
    """The pointers to the scales are arguments 3 and 4: code for plain values never looks at them."""
    build = build_named("paged_attention", step)
    names = [parameter.name for parameter in build.kernel.params]
    assert names[3:5] == ["k_scales_ptr", "v_scales_ptr"]
    used = {int(index) for index in re.findall(r"ld\.param\S+\s.*_param_(\d+)\]", ptx(build, "sm_90"))}
    assert {0, 1, 2, 5} <= used
    assert not used & {3, 4}
    switched = dataclasses.replace(
        build_named("paged_attention", f"{step}, int8"), constants={**build.constants, "IS_QUANTISED": True}
    )
    used = {int(index) for index in re.findall(r"ld\.param\S+\s.*_param_(\d+)\]", ptx(switched, "sm_90"))}
    assert {3, 4} <= used


def test_e4m3_is_read_by_an_instruction_where_the_gpu_has_one():
    """sm_90 converts two codes at once; sm_80 moves the same bits into place as e4b15."""
    build = build_named("paged_attention", "decode 128, fp8")
    assert "e4m3x2" in ptx(build, "sm_90")
    assert "e4m3x2" not in ptx(build, "sm_80")
    assert BY_ARCH["sm_80"].fp8 == "fp8e4b15"


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_codes_are_fetched_ahead_in_128_bits(arch: str):
    """The weights of a decode: asynchronous copies of 16 bytes, as many as a tile has for every stage but one."""
    for name in ("int8, 1 rows", "int4, groups of 32, 1 rows", "int4, groups of 128, 1 rows"):
        build = build_named("quant_matmul", name)
        copies = re.findall(r"cp\.async\.cg\S* \[[^;]*?, (0x\w+|\d+)", ptx(build, arch))
        assert sum(int(size, 0) == 16 for size in copies) >= build.num_stages - 1, name
