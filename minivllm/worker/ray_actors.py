"""Ranks that Ray starts: actors in a placement group, on this machine or on several.

    rank 0      the engine's process, as with `mp`; its place in Ray's books is reserved
    rank 1 ..   an actor each, with one call that lasts as long as the model: rank_process.py

Ray says where a rank runs and what it may use. What the ranks tell each other goes through torch.distributed, as after
torchrun; Ray takes no part in a step.

The only module that imports Ray, which is an extra: `pip install minivllm[ray]`. Called by parallel_executor.py and
deploy/ray_serve.py. Twin in vLLM: vllm/v1/executor/ray_executor.py.
"""

from __future__ import annotations

import os
import subprocess
from typing import Any

from minivllm.errors import ConfigError
from minivllm.worker import rank_process
from minivllm.worker.ranks import Ranks, join_elsewhere, refused, start_elsewhere

PLACE_SECONDS = 60.0  # for Ray to find room for every rank
KILLED = -9


def import_ray() -> Any:
    """The package. Raises ConfigError with the command that installs it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray starts; who wants to report sets it to 1
    try:
        import ray
        import ray.util.placement_group
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise ConfigError(
            f"distributed_executor_backend 'ray' needs Ray, and it is not installed ({error}): "
            "pip install 'minivllm[ray]', in a clone pip install -e '.[ray]'.",
            parameter="distributed_executor_backend",
        ) from error
    return ray


def connect_to_ray(num_cpus: int) -> Any:
    """The package, connected to the cluster that RAY_ADDRESS names ("auto": the one that `ray start` has started here).

    Without RAY_ADDRESS, Ray is started on this machine for this process alone, without a dashboard, and counts at least
    num_cpus cores. It ends with the calling thread. Ray takes SIGTERM for itself, so set handlers after this.
    """
    ray = import_ray()
    if ray.is_initialized():
        return ray
    quiet = {"include_dashboard": False, "logging_level": "error"}
    if "RAY_ADDRESS" in os.environ:
        try:
            ray.init(**quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"Ray at RAY_ADDRESS={os.environ['RAY_ADDRESS']} cannot be joined: {error.__cause__ or error}.",
                parameter="distributed_executor_backend",
            ) from error
    else:
        os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own 15 is for work that may wait
        num_cpus = max(num_cpus, len(os.sched_getaffinity(0)))
        ray.init(address="local", num_cpus=num_cpus, _node_ip_address="127.0.0.1", **quiet)
    return ray


class RayProcess:
    """A rank on Ray, as ranks.py sees a process.

    actor: where it runs; done: the reference of its one call, whose result is the exit code; group: everybody's place.
    """

    def __init__(self, ray: Any, actor: Any, done: Any, group: Any):
        self._ray, self.actor, self._done, self._group = ray, actor, done, group
        self._code: int | None = None

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, when it has ended. Raises subprocess.TimeoutExpired after `timeout` seconds."""
        if self._code is None:
            if not self._ray.is_initialized():  # Ray has ended, and its actors with it
                self._code = KILLED
            elif self._ray.wait([self._done], timeout=timeout)[0]:
                self._code = self._result()
            else:
                raise subprocess.TimeoutExpired("a rank on Ray", timeout or 0)
        return self._code

    def _result(self) -> int:
        try:
            return int(self._ray.get(self._done))
        except self._ray.exceptions.RayError:  # it was killed, or its machine is gone
            return KILLED

    def kill(self) -> None:
        """End it at once, and give its place back; the others' too, who can do nothing without it."""
        if self._ray.is_initialized():
            self._ray.kill(self.actor)
            self._ray.util.remove_placement_group(self._group)


class RankActor:
    """What runs in the other processes."""

    def follow(self, device_type: str, rank: int, size: int, host: str, port: int) -> int:
        """Compute with rank 0 until it ends; returns the exit code."""
        return rank_process.follow_rank_0(join_elsewhere(device_type, rank, size, host, port), device_type)


def start(size: int, device_type: str) -> Ranks:
    """Rank 0, in this process, of `size`. Raises ConfigError where Ray has no room for the others."""
    if "RANK" in os.environ:
        raise refused(size, "RANK is set, so torchrun has started the ranks: leave distributed_executor_backend at mp")
    ray = connect_to_ray(size)
    host = ray.util.get_node_ip_address()

    def launch(port: int, num_threads: int) -> dict[int, RayProcess]:
        resource = {"GPU": 1.0} if device_type == "cuda" else {"CPU": float(num_threads)}
        group = _find_room(ray, size, resource, host)
        if device_type == "cuda":
            _check_own_gpu(ray, size, group)
        processes = {}
        for rank in range(1, size):
            options = _in_bundle(ray, group, rank, resource)
            threads = {"env_vars": {"OMP_NUM_THREADS": str(num_threads)}}
            actor = ray.remote(RankActor).options(**options, runtime_env=threads).remote()
            processes[rank] = RayProcess(ray, actor, actor.follow.remote(device_type, rank, size, host, port), group)
        return processes

    return start_elsewhere(size, device_type, host, launch)


def _find_room(ray: Any, size: int, resource: dict[str, float], host: str) -> Any:
    """A placement group of one bundle per rank, the first of them on this machine: rank 0 is here already."""
    here = {**resource, f"node:{host}": 0.001}
    group = ray.util.placement_group([here, *[resource] * (size - 1)], strategy="PACK")
    if not group.wait(PLACE_SECONDS):
        ray.util.remove_placement_group(group)
        wanted = ", ".join(f"{number:g} {name}" for name, number in resource.items())
        raise refused(size, f"Ray has found no room for as many ranks of {wanted} in {PLACE_SECONDS:g} seconds")
    return group


def _in_bundle(ray: Any, group: Any, rank: int, resource: dict[str, float]) -> dict[str, Any]:
    """Options of an actor or a task that runs in a rank's place and uses it up."""
    strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(group, rank)
    return {"scheduling_strategy": strategy, "num_cpus": resource.get("CPU", 0), "num_gpus": resource.get("GPU", 0)}


def _check_own_gpu(ray: Any, size: int, group: Any) -> None:
    """Rank 0 was not started by Ray, so it must ask which GPU is its own."""
    ask = ray.remote(_given_gpus).options(**_in_bundle(ray, group, 0, {"GPU": 1.0}))
    if (given := ray.get(ask.remote())) != [0]:
        ray.util.remove_placement_group(group)
        raise refused(size, f"rank 0 computes on cuda:0, and Ray has given it {given}")


def _given_gpus() -> list[int]:
    return [int(number) for number in import_ray().get_gpu_ids()]
