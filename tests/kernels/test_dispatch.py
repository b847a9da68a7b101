"""choose(): names and devices."""

import pytest
import torch

from minivllm.kernels.dispatch import IMPLS, choose

ON_CPU = torch.zeros(1)
ELSEWHERE = torch.zeros(1, device="meta")  # a device that every machine has


def test_auto_is_the_fast_path_on_a_cpu_and_the_reference_elsewhere():
    assert choose("auto", ON_CPU) == "cpu"
    assert choose("auto", ELSEWHERE) == "reference"


def test_a_name_is_taken_at_its_word():
    assert choose("reference", ON_CPU) == "reference"
    assert choose("cpu", ON_CPU) == "cpu"
    assert choose("reference", ELSEWHERE) == "reference"


@pytest.mark.parametrize("impl", ["triton?", "", "CPU"])
def test_an_unknown_name_is_refused_with_the_known_ones(impl: str):
    with pytest.raises(ValueError, match=rf"^impl: expected one of {', '.join(IMPLS)}, got '{impl.replace('?', '.')}'"):
        choose(impl, ON_CPU)


def test_triton_needs_a_gpu_or_its_interpreter(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="impl: 'triton' needs a GPU, or TRITON_INTERPRET=1 set before Python starts"):
        choose("triton", ON_CPU)


def test_triton_refuses_float64_on_any_device():
    with pytest.raises(ValueError, match="impl: 'triton' computes in float32, got float64 tensors; use 'reference'"):
        choose("triton", ELSEWHERE.double())
    assert choose("triton", ELSEWHERE) == "triton"


def test_the_cpu_path_refuses_a_tensor_that_lives_elsewhere():
    with pytest.raises(ValueError, match=r"impl: 'cpu' needs tensors on the CPU, got a tensor on meta; use 'auto'"):
        choose("cpu", ELSEWHERE)
