"""Every kernel on the device, by the tests that it has to pass in the interpreter.

The ordinary tests of tests/interpreter are collected here a second time. What they call runs on the GPU, and
bfloat16 is judged by the house's rule alone: only the interpreter cuts it off.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from minivllm.kernels.logprobs import logprobs
from minivllm.kernels.paged_attention import kernel as attention_kernel
from minivllm.kernels.paged_attention import paged_attention
from minivllm.kernels.penalties import logit_bias, penalties
from minivllm.kernels.quant_matmul import quant_matmul
from minivllm.kernels.reshape_and_cache import kernel as cache_kernel
from minivllm.kernels.reshape_and_cache import reshape_and_cache
from minivllm.kernels.rms_norm import rms_norm
from minivllm.kernels.rotary_embedding import rotary_embedding
from minivllm.kernels.silu_and_mul import silu_and_mul
from minivllm.kernels.token_bitmask import token_bitmask
from minivllm.kernels.top_k_top_p import top_k_top_p_sample
from tests.gpu.conftest import device
from tests.gpu.moved import MovedModule, moved
from tests.interpreter import (
    test_logprobs,
    test_paged_attention,
    test_penalties,
    test_quant_matmul,
    test_quantised_cache,
    test_reshape_and_cache,
    test_row_kernels,
    test_token_bitmask,
    test_top_k_top_p,
)
from tests.interpreter.helpers import assert_right
from tests.kernels import helpers, quant_weights, quantised
from tests.kernels.helpers import assert_kernel_is_right

ORDINARY = (
    test_logprobs,
    test_paged_attention,
    test_penalties,
    test_quant_matmul,
    test_quantised_cache,
    test_reshape_and_cache,
    test_row_kernels,
    test_token_bitmask,
    test_top_k_top_p,
)
HELPERS = (helpers, quant_weights, quantised)
OPERATIONS = (
    *(logprobs, logit_bias, paged_attention, penalties, quant_matmul, reshape_and_cache, rms_norm, rotary_embedding),
    *(silu_and_mul, token_bitmask, top_k_top_p_sample),
)
KERNELS = (attention_kernel, cache_kernel)
# What stands for another GPU there is decided by the GPU here.
NOT_HERE = frozenset({"test_splits_merge_into_the_whole", "test_the_type_of_sm_80_reads_the_same_values"})

for _module in ORDINARY:
    for _name, _test in vars(_module).items():
        if _name.startswith("test_") and callable(_test) and _name not in NOT_HERE:
            globals()[f"{_module.__name__.rsplit('.', 1)[1]}__{_name.removeprefix('test_')}"] = _test
    del _name, _test
# The modules' own names start with test_ too; they are no tests.


@pytest.fixture(autouse=True)
def on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every name of an operation or a kernel's module in the ordinary tests stands for the same on the device."""
    where = device()
    assert where is not None
    for module in (*ORDINARY, *HELPERS):
        for name, value in vars(module).items():
            stand_in = _stand_in(value, where)
            if stand_in is not None:
                monkeypatch.setattr(module, name, stand_in)


def _stand_in(value: Any, where: str) -> Any:
    if isinstance(value, ModuleType):
        return MovedModule(value, where) if value in KERNELS else None
    if value is assert_right and where != "cpu":
        return assert_kernel_is_right
    return moved(value, where) if any(value is operation for operation in OPERATIONS) else None
