"""Two ranks as actors of Ray: what they say, and an end with words when one of them is gone."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from minivllm import LLM, SamplingParams
from minivllm.errors import EngineDeadError
from minivllm.outputs import RequestOutput
from minivllm.worker import ray_actors
from minivllm.worker.parallel_executor import ParallelExecutor
from tests.entrypoints.helpers import CHAT, HELLO, PATIENCE, events_of
from tests.entrypoints.test_parallel_server import SECONDS_TO_END
from tests.entrypoints.test_serve_command import process
from tests.ray.processes import named
from tests.tolerances import PARALLEL_LOGPROB_ATOL
from tests.worker.test_parallel_executor import GREEDY, PROMPTS, SMALL, logprobs_of

RANK = "ray::RankActor"  # how Ray names the process of an actor


@pytest.fixture
def two_ranks(tiny_model: Callable[[str], Path]) -> Iterator[Callable[[str, str], LLM]]:
    """A model on two ranks of a backend; both end with the test."""
    num_threads = torch.get_num_threads()
    with contextlib.ExitStack() as stack:

        def load(name: str, backend: str) -> LLM:
            llm = LLM(tiny_model(name), **SMALL, tensor_parallel_size=2, distributed_executor_backend=backend)
            stack.callback(llm.llm_engine.close)
            return llm

        yield load
    torch.set_num_threads(num_threads)


def rank_1_of(llm: LLM) -> ray_actors.RayProcess:
    executor = llm.llm_engine._executor
    assert isinstance(executor, ParallelExecutor)
    rank = executor.ranks.processes[1]
    assert isinstance(rank, ray_actors.RayProcess)
    return rank


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_two_actors_say_what_two_processes_say(name: str, two_ranks: Callable[[str, str], LLM]):
    def answers(backend: str) -> list[RequestOutput]:
        llm = two_ranks(name, backend)
        found = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        llm.llm_engine.close()
        return found

    for ours, theirs in zip(answers("ray"), answers("mp"), strict=True):
        assert ours.outputs[0].token_ids == theirs.outputs[0].token_ids
        assert ours.outputs[0].text == theirs.outputs[0].text
        assert len(logprobs_of(ours)) == len(ours.prompt_token_ids) - 1 + 16
        for one, other in zip(logprobs_of(ours), logprobs_of(theirs), strict=True):
            assert one.keys() == other.keys()
            assert all(abs(one[key] - other[key]) <= PARALLEL_LOGPROB_ATOL for key in one)


def test_a_killed_actor_is_an_error_and_another_engine_may_follow(two_ranks: Callable[[str, str], LLM]):
    llm = two_ranks("llama", "ray")
    rank = rank_1_of(llm)
    assert rank.poll() is None and llm.llm_engine.is_alive
    with pytest.raises(subprocess.TimeoutExpired):
        rank.wait(0.01)
    stream = llm.stream(PROMPTS[1], SamplingParams(temperature=0, max_tokens=80, ignore_eos=True))
    next(stream)
    (pid,) = named(RANK, os.getpid())
    os.kill(pid, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(EngineDeadError, match="of this model has ended"):
        list(stream)
    assert time.monotonic() - started < SECONDS_TO_END
    assert rank.wait(PATIENCE) == ray_actors.KILLED and not llm.llm_engine.is_alive
    llm.llm_engine.close()
    following = two_ranks("llama", "ray")
    assert following.generate(PROMPTS, GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    ended = rank_1_of(following)
    following.llm_engine.close()
    assert ended.wait(0) == 0


def test_a_cluster_without_room_is_an_error_that_says_what_was_wanted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ray_actors, "PLACE_SECONDS", 0.5)
    ray = ray_actors.connect_to_ray(2)
    with pytest.raises(Exception, match="Ray has found no room for as many ranks of 999 CPU in 0.5 seconds"):
        ray_actors._find_room(ray, 2, {"CPU": 999.0}, ray.util.get_node_ip_address())


# ------------------------------------------------------------------ as a server
@contextlib.contextmanager
def served(model: Path) -> Iterator[tuple[subprocess.Popen[str], int, http.client.HTTPResponse]]:
    """A server on two ranks of Ray, the other rank's process id, and an answer that has begun."""
    flags = ("--dtype", "float32", "--tensor-parallel-size", "2", "--distributed-executor-backend", "ray")
    with process(str(model), *flags, OMP_NUM_THREADS="1") as server:
        ready = server.stdout.readline()
        port = re.search(r"http://127\.0\.0\.1:(\d+)/", ready)
        assert port, ready + server.stderr.read()
        (rank,) = named(RANK, server.pid)
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", int(port[1]), timeout=PATIENCE)) as client:
            body = {"messages": HELLO, "stream": True, "ignore_eos": True, "temperature": 0}
            client.request("POST", CHAT, json.dumps(body), {"Content-Type": "application/json"})
            yield server, rank, client.getresponse()


def test_a_killed_actor_ends_every_stream_with_an_error_and_the_server(tiny_model: Callable[[str], Path]):
    with served(tiny_model("llama")) as (server, rank, response):
        first = response.readline()
        os.kill(rank, signal.SIGSTOP)  # now nothing can end by itself
        time.sleep(0.1)
        assert server.poll() is None
        killed = time.monotonic()
        os.kill(rank, signal.SIGKILL)
        events = events_of((first + response.read()).decode())
        (error,) = [event["error"] for event in events if isinstance(event, dict) and "error" in event]
        assert "of this model has ended" in error["message"]
        assert server.wait(SECONDS_TO_END) == 1
        assert time.monotonic() - killed < SECONDS_TO_END


def test_a_signal_lets_the_answer_end_and_ray_with_it(tiny_model: Callable[[str], Path]):
    with served(tiny_model("llama")) as (server, rank, response):
        first = response.readline()
        server.send_signal(signal.SIGTERM)
        events = events_of((first + response.read()).decode())
        assert events[-2]["choices"][0]["finish_reason"] == "length" and events[-1] == "[DONE]"
        assert server.wait(PATIENCE) == 0
        deadline = time.monotonic() + PATIENCE
        while Path(f"/proc/{rank}").exists():
            assert time.monotonic() < deadline, "the actor outlives its server"
            time.sleep(0.05)
