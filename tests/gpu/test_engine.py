"""The engine on a GPU: graphs give what eager steps give, the cache is what the plan says, the weights are there."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from golden.cases import read_cases
from minivllm import LLM, SamplingParams
from minivllm.errors import ConfigError
from minivllm.worker.gpu import GPUPath
from tests.gpu.conftest import REASON

if not torch.cuda.is_available():  # the interpreter has no graphs: tests/interpreter/test_gpu_path.py has stand-ins
    pytestmark = pytest.mark.skip(reason=REASON)

NUM_TOKENS = 12
SHARE = 0.05  # of the GPU: up to two engines at once here, and those of tests beside this one


@pytest.fixture(autouse=True)
def nothing_of_the_last_test() -> Iterator[None]:
    """An engine and its graphs refer to each other: only a collection frees their memory."""
    yield
    gc.collect()
    torch.cuda.empty_cache()


def engine(model: Path, **options: Any) -> LLM:
    options = {"dtype": "float32", "max_num_seqs": 9, "gpu_memory_utilization": SHARE, **options}
    return LLM(str(model), device="cuda", **options)


def path_of(llm: LLM) -> GPUPath:
    runner = llm.llm_engine._executor._runner
    assert runner is not None and isinstance(runner.path, GPUPath)
    return runner.path


def tokens(llm: LLM, **params: Any) -> list[list[int]]:
    cases = read_cases("llama", "greedy")[:7]
    sampling = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, **{"temperature": 0.0, **params})
    outputs = llm.generate([{"prompt_token_ids": case["prompt"]} for case in cases], sampling, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def test_a_graph_is_captured_for_every_bucket(tiny_model: Callable[[str], Path]):
    path = path_of(engine(tiny_model("llama")))
    assert sorted({key.num_rows for key in path.graphs}) == [1, 2, 4, 8, 9]
    assert path_of(engine(tiny_model("llama"), enforce_eager=True)).graphs == {}


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma3", "gpt2"])
@pytest.mark.parametrize("params", [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 3, "logprobs": 3}], ids=str)
def test_graphs_give_the_tokens_of_eager_steps(name: str, params: dict[str, Any], tiny_model: Callable[[str], Path]):
    graphs, eager = (engine(tiny_model(name), enforce_eager=enforce_eager) for enforce_eager in (False, True))
    assert tokens(graphs, **params) == tokens(eager, **params)


def test_batch_invariant_rows_are_the_same_in_every_graph(tiny_model: Callable[[str], Path]):
    llm = engine(tiny_model("llama"), batch_invariant=True)
    together = tokens(llm)
    llm.llm_engine.reset_prefix_cache()
    alone = engine(tiny_model("llama"), batch_invariant=True, max_num_seqs=1)
    assert tokens(alone) == together


def test_a_replayed_step_equals_an_eager_one(tiny_model: Callable[[str], Path]):
    """The same batch twice, through its graph and without: keys are written to the same slots both times."""
    llm = engine(tiny_model("llama"))
    path, seen = path_of(llm), []
    forward = path.forward

    def both(batch: Any) -> torch.Tensor:  # [num_tokens, hidden_size]
        replayed = forward(batch).clone()
        if path.key_of(batch.attention) is not None:
            seen.append((replayed, super(GPUPath, path).forward(batch).clone()))
        return replayed

    path.forward = both  # type: ignore[method-assign]
    tokens(llm)
    assert len(seen) >= NUM_TOKENS - 1
    for replayed, eager in seen:
        assert float((replayed - eager).abs().max()) <= 64 * torch.finfo(torch.float32).eps * float(eager.abs().max())


def test_the_first_of_equal_logits_is_taken():
    """As the kernel does, and as the CPU does."""
    logits = torch.zeros(3, 128_256, device="cuda")
    logits[1, [70_000, 127_999]] = 1.0
    logits[2, [5, 6]] = 1.0
    assert logits.max(dim=1).indices.tolist() == [0, 70_000, 5]


def test_weights_cache_and_buffers_are_on_the_gpu(tiny_model: Callable[[str], Path]):
    path = path_of(engine(tiny_model("llama")))
    tensors = [*path.model.parameters(), *path.model.buffers(), *(cache for pair in path.kv_caches for cache in pair)]
    assert {tensor.device.type for tensor in tensors} == {"cuda"}
    assert path.buffers.input_ids.host.is_pinned()


def test_the_engine_stays_within_its_share(tiny_model: Callable[[str], Path]):
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.reset_peak_memory_stats()
    llm = engine(tiny_model("llama"))
    tokens(llm)
    plan = llm.llm_engine.plan
    assert plan.device_bytes <= total and plan.pool_bytes <= SHARE * total
    assert torch.cuda.max_memory_reserved() <= 1.05 * SHARE * total


def test_a_gpu_that_is_not_there_is_named(tiny_model: Callable[[str], Path]):
    with pytest.raises(ConfigError, match="device cuda:99 is not here: this machine has cuda:0 to"):
        LLM(str(tiny_model("llama")), device="cuda:99")
