"""Widening, as on a CPU without a matrix unit, whatever this one has: with one, oneDNN packs bfloat16 otherwise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minivllm.models.onednn import memory, pack
from minivllm.models.widening import Widening
from tests.models.test_linear import random

ROOT = Path(__file__).parents[2]
CASES = "tests/models/widening_cases.py"


def test_every_case_holds_without_a_matrix_unit():
    """oneDNN reads the variable when it is first used, so this is a process of its own."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", CASES]
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_FP16"}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-4000:]
    assert "skipped" not in found.stdout


@pytest.mark.parametrize("shape", [(128, 64), (192, 576), (960, 128)], ids=str)
def test_on_this_cpu_a_weight_is_widened_exactly_or_not_at_all(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Widening, "pays", True)
    plain = random(*shape, seed=3).bfloat16()
    wide = Widening().prepare(pack(plain), plain)
    if wide is not None:
        expected = memory(pack(plain.float()), torch.int32)
        assert torch.equal(memory(wide.scratch.widen(wide.pairs), torch.int32), expected)
