"""Ranks as processes: how they start and end, and what is refused before they do."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from golden.tiny import BACKEND_DECODERS
from minivllm import LLM, SamplingParams
from minivllm.errors import ConfigError, EngineDeadError, InvalidRequestError
from minivllm.kernels.amx import HAS_AMX
from minivllm.worker import parallel_executor, ranks, ray_actors
from minivllm.worker.ranks import connect
from tests.models.tiny import tiny_hf

ROOT = Path(__file__).parents[2]
# impl: nothing is compiled when a process starts
SMALL: dict[str, Any] = {"dtype": "float32", "num_gpu_blocks_override": 64, "block_size": 4, "impl": "reference"}
PROMPT = {"prompt_token_ids": list(range(20, 60))}


# ------------------------------------------------------------------ the end
@pytest.fixture
def llm(tiny_model: Callable[[str], Path]) -> Iterator[LLM]:
    """With processes of its own."""
    num_threads = torch.get_num_threads()
    found = LLM(tiny_model("llama"), **SMALL, tensor_parallel_size=2)
    yield found
    found.llm_engine.close()
    torch.set_num_threads(num_threads)


def process_of(llm: LLM) -> subprocess.Popen[bytes]:
    executor = llm.llm_engine._executor
    assert isinstance(executor, parallel_executor.ParallelExecutor)
    return executor.ranks.processes[1]


def test_hooks_are_refused_because_they_would_see_a_part_of_the_values(llm: LLM):
    with pytest.raises(InvalidRequestError, match="leave tensor_parallel_size at 1"):
        llm.capture("layers.0.mlp")


def test_a_killed_rank_is_an_error_at_once_and_at_rest_it_is_seen(llm: LLM):
    assert llm.llm_engine.is_alive
    stream = llm.stream(PROMPT, SamplingParams(temperature=0, max_tokens=80, ignore_eos=True))
    next(stream)
    process_of(llm).send_signal(signal.SIGKILL)
    process_of(llm).wait()
    assert not llm.llm_engine.is_alive
    started = time.monotonic()
    with pytest.raises(EngineDeadError, match="rank of this model has ended|rank 1 of this model has ended"):
        list(stream)
    assert time.monotonic() - started < 5


def test_a_rank_that_is_killed_in_a_compiled_step_is_an_error_at_once(
    tiny_model: Callable[[str], Path], tmp_path: Path
):
    """It is stopped wherever it is while tokens come, and then killed."""
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    config = transformers.AutoConfig.from_pretrained(folder)
    config.update({"hidden_size": 96, "head_dim": 64, "intermediate_size": 256})
    tiny_hf(config).bfloat16().save_pretrained(folder)
    num_threads = torch.get_num_threads()
    llm = LLM(folder, dtype="bfloat16", num_gpu_blocks_override=64, tensor_parallel_size=2)
    try:
        assert (llm.llm_engine._executor._runner.path.decoder_weights is not None) == HAS_AMX
        stream = llm.stream(PROMPT, SamplingParams(temperature=0, max_tokens=80, ignore_eos=True))
        next(stream)
        process = process_of(llm)
        process.send_signal(signal.SIGSTOP)
        threading.Timer(0.5, process.kill).start()
        started = time.monotonic()
        with pytest.raises(EngineDeadError, match="rank of this model has ended|rank 1 of this model has ended"):
            list(stream)
        assert 0.4 < time.monotonic() - started < 5
    finally:
        llm.llm_engine.close()
        torch.set_num_threads(num_threads)


def test_close_ends_the_other_rank_and_another_engine_may_follow(llm: LLM, tiny_model: Callable[[str], Path]):
    with pytest.raises(ConfigError, match="a process has one engine over several devices at a time"):
        LLM(tiny_model("llama"), **SMALL, tensor_parallel_size=2)
    process = process_of(llm)
    llm.llm_engine.close()
    assert process.wait(5) == 0
    llm.llm_engine.close()  # twice is once


def test_an_error_of_one_step_ends_the_engine(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    executor: Any = llm.llm_engine._executor

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(executor._runner, "_sample", fail)
    with pytest.raises(EngineDeadError, match=r"a step failed on rank 0 \(RuntimeError\)"):
        llm.generate(PROMPT, use_tqdm=False)


def test_a_rank_ends_when_rank_0_is_killed_and_torchrun_may_start_both(tiny_model: Callable[[str], Path]):
    """The same program in two processes; RANK tells them apart."""
    script = (
        "import os, signal, sys\n"
        "from minivllm import LLM, SamplingParams\n"
        "if __name__ == '__main__':\n"
        f"    llm = LLM(sys.argv[1], tensor_parallel_size=2, **{SMALL!r})\n"
        "    out = llm.generate({'prompt_token_ids': [5, 6, 7]}, SamplingParams(temperature=0, max_tokens=5))\n"
        "    print(out[0].outputs[0].token_ids, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    model = str(tiny_model("llama"))
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script, model],
            env={**os.environ, **place, "RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        (out, _), printed = started[0].communicate(timeout=100), started[1].communicate(timeout=5)[0]
        assert [process.returncode for process in started] == [-signal.SIGKILL, 1]
        assert printed == ""  # it generates nothing and serves nobody
    finally:
        for process in started:
            process.kill()
            process.wait()
    params = SamplingParams(temperature=0, max_tokens=5)
    expected = LLM(model, **SMALL).generate({"prompt_token_ids": [5, 6, 7]}, params, use_tqdm=False)
    assert out.strip() == str(expected[0].outputs[0].token_ids)


def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# ------------------------------------------------------------------ refused at start
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama", {"quantization": "int8"}, "quantization must be left out when tensor_parallel_size is 2"),
        ("llama", {"tensor_parallel_size": 99}, "tensor_parallel_size must be at most [0-9]+ for this model, got 99"),
        ("bert-cls", {}, "tensor_parallel_size must be 1 for BertModel, got 2: only the decoders"),
        *[(name, {}, "tensor_parallel_size must be 1 for .*, got 2: only the dec") for name in BACKEND_DECODERS],
    ],
)
def test_what_does_not_go_together_is_refused_before_a_process_is_started(
    name: str,
    options: dict[str, Any],
    message: str,
    tiny_model: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(parallel_executor, "connect", lambda *_: pytest.fail("a process was started"))
    with pytest.raises(ConfigError, match=message):
        LLM(tiny_model(name), **{**SMALL, "tensor_parallel_size": 2, **options})


def test_a_draft_model_over_several_ranks_is_refused(tiny_model: Callable[[str], Path]):
    draft = {"method": "draft_model", "num_speculative_tokens": 2, "model": str(tiny_model("llama"))}
    with pytest.raises(ConfigError, match="speculative_config.model must be left out when tensor_parallel") as caught:
        LLM(tiny_model("llama"), **SMALL, tensor_parallel_size=2, speculative_config=draft)
    assert caught.value.parameter == "speculative_config"


def test_more_ranks_than_gpus_or_another_world_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="tensor_parallel_size is 2, but this machine has 1 GPUs, and every rank"):
        connect(2, "cuda")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="tensor_parallel_size is 2, but WORLD_SIZE is 4: start as many processes"):
        connect(2, "cpu")


def test_without_ray_its_backend_names_the_command_that_installs_it(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"needs Ray, and it is not installed.*pip install -e '\.\[ray\]'") as caught:
        LLM(tiny_model("llama"), **SMALL, tensor_parallel_size=2, distributed_executor_backend="ray")
    assert caught.value.parameter == "distributed_executor_backend"
    LLM(tiny_model("llama"), **SMALL, distributed_executor_backend="ray")  # one rank is this process


def test_ray_does_not_start_what_torchrun_has_started(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="RANK is set, so torchrun has started the ranks"):
        ray_actors.start(2, "cpu")


def test_a_rank_that_cannot_start_is_an_error_and_not_a_long_wait(monkeypatch: pytest.MonkeyPatch):
    num_threads = torch.get_num_threads()
    monkeypatch.setattr(ranks.sys, "executable", "/bin/false")
    started = time.monotonic()
    with pytest.raises(ConfigError, match="tensor_parallel_size is 2, but rank 1 ended at once, its message is above"):
        connect(2, "cpu")
    assert time.monotonic() - started < 5
    torch.set_num_threads(num_threads)
