"""Replicas of one model behind one endpoint, with Ray Serve.

    python deploy/ray_serve.py --num-replicas 2
    python deploy/ray_serve.py MODEL --min-replicas 1 --max-replicas 4 --cpus 4 --engine '{"max_num_seqs": 32}'

Each replica is an engine with the ordinary server, in a process of its own. Ray starts them, watches them, starts new
ones in place of those that end and, with --max-replicas, as many as the load asks for; and it asks PrefixRouter who
takes a request. The bytes of an answer go through ray_ingress.py from the replica's server to the client, never
through Ray.

    request ─▶ ingress ── lease(prefixes) ─▶ Ray Serve: PrefixRouter ─▶ a replica: "my server is at ..."
                  └────── HTTP, until the answer has ended, and so long the lease lasts ──────┘

Without RAY_ADDRESS, Ray is started on this machine and ends with this process. docs/replicas.md has the rest.
"""

import asyncio
import contextlib
import json
import signal
import socket
import sys
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import typer

from minivllm.cli import wait_awake_for_a_moment
from minivllm.errors import ConfigError, MiniVLLMError, OverloadedError
from minivllm.worker.ray_actors import connect_to_ray, import_ray

import_ray()  # says what to install, and switches the usage report off

import ray  # noqa: E402
from aiohttp import web  # noqa: E402
from ray import serve  # noqa: E402
from ray.serve.config import RequestRouterConfig  # noqa: E402
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError  # noqa: E402
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica  # noqa: E402
from ray_ingress import Ingress, ReplicaGoneError  # noqa: E402

NAME = "minivllm"
MAX_PREFIXES = 65_536  # that are remembered, about 10 MB
MAX_DIFFERENCE = 8  # requests more than the least busy replica has: then a known prefix is not worth the wait
MAX_BODY_BYTES = 2**20  # of a body, as ServerConfig's default


# ------------------------------------------------------------------ who takes a request
class PrefixTable:
    """Which replica has seen which beginning of a prompt last; the oldest are forgotten."""

    def __init__(self, max_prefixes: int = MAX_PREFIXES):
        self._max_prefixes = max_prefixes
        self._replicas: OrderedDict[str, Any] = OrderedDict()

    def find(self, prefixes: list[str], among: Iterable[Any]) -> Any:
        """The replica that has seen the longest of them; None: nobody has."""
        known = set(among)
        return next(
            (found for key in reversed(prefixes) if (found := self._replicas.get(key)) in known and found is not None),
            None,
        )

    def remember(self, prefixes: list[str], replica: Any) -> None:
        """From now on it has."""
        for key in prefixes:
            self._replicas[key] = replica
            self._replicas.move_to_end(key)
        while len(self._replicas) > self._max_prefixes:
            self._replicas.popitem(last=False)


class PrefixRouter(RequestRouter):
    """The replica that has seen the prompt's beginning, unless it is much busier than another; else the least busy.

    Requests that come at the same moment see each other: a choice counts when it is made, not when it is carried out.
    """

    def initialize_state(self, max_difference: int = MAX_DIFFERENCE) -> None:
        """Ray's constructor for subclasses."""
        self._table = PrefixTable()
        self._max_difference = max_difference
        self._chosen: dict[str, tuple[Any, PendingRequest]] = {}  # internal request id -> replica id, request

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One, and then all others: for when it has no room."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # when none has room
        by_id = {replica.replica_id: replica for replica in candidate_replicas}
        load = self._load()
        least_busy = min(by_id, key=lambda name: (load[name], str(name)))
        prefixes = pending_request.args[0]
        known = self._table.find(prefixes, by_id)
        is_worth_it = known is not None and load[known] <= load[least_busy] + self._max_difference
        chosen = known if is_worth_it else least_busy
        self._take(pending_request, chosen)
        return [[by_id[chosen]], [replica for name, replica in by_id.items() if name != chosen]]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: Any, result: Any) -> None:
        """It may have become another."""
        self._take(pending_request, replica_id)

    def on_request_completed(self, replica_id: Any, internal_request_id: str) -> None:
        """However it ended."""
        self._chosen.pop(internal_request_id, None)

    def _take(self, request: PendingRequest, replica_id: Any) -> None:
        self._chosen[request.metadata.internal_request_id] = (replica_id, request)
        self._table.remember(request.args[0], replica_id)

    def _load(self) -> Counter[Any]:
        """Requests per replica id, without those that were given up before they were sent."""
        given_up = [name for name, (_, request) in self._chosen.items() if request.future.cancelled()]
        for name in given_up:
            del self._chosen[name]
        return Counter(replica_id for replica_id, _ in self._chosen.values())


# ------------------------------------------------------------------ a replica
class Replica:
    """An engine and its server.

    engine, server: arguments of LLM and ServerConfig. is_local: nobody on another machine asks it.
    """

    def __init__(self, model: str | None, engine: dict[str, Any], server: dict[str, Any], is_local: bool):
        from minivllm import LLM, AsyncEngine
        from minivllm.entrypoints.server import make_server
        from minivllm.entrypoints.service import ServerConfig

        with ThreadPoolExecutor(1) as loader:  # a thread that ends: only the engine's own may have OpenMP's threads
            llm = loader.submit(lambda: LLM(model, **engine)).result()
        host = "127.0.0.1" if is_local else ray.util.get_node_ip_address()
        self._engine = AsyncEngine(llm.llm_engine)
        self._server = make_server(self._engine, ServerConfig(host=host, port=0, **server))
        self._server.start()

    async def lease(self, prefixes: list[str]) -> AsyncIterator[str]:
        """Where to ask; lasts until it is cancelled, and is what Ray counts as a request."""
        yield self._server.url
        await asyncio.Event().wait()

    async def where(self) -> tuple[str, str]:
        """Its name and its server's URL."""
        return serve.get_replica_context().replica_id.unique_id, self._server.url

    def check_health(self) -> None:
        """For Ray, which ends a replica where this raises, and starts another."""
        self._server.service.check_healthy()

    def __del__(self) -> None:
        if hasattr(self, "_server"):  # it was started
            self._server.stop()
            self._engine.shutdown()


class Replicas:
    """The pool of ray_ingress.py."""

    def __init__(self, handle: Any):
        self._handle = handle
        self._leases = handle.options(method_name="lease", stream=True)

    @contextlib.asynccontextmanager
    async def lease(self, prefixes: list[str]) -> AsyncIterator[str]:
        """See Pool."""
        lease = self._leases.remote(prefixes)
        try:
            try:
                url = await anext(lease)
            except BackPressureError as error:
                raise OverloadedError("Every replica is full, and so is the queue.") from error
            except (ray.exceptions.RayError, DeploymentUnavailableError) as error:
                raise ReplicaGoneError from error
            yield url
        finally:
            lease.cancel()

    async def urls(self) -> dict[str, str]:
        """See Pool."""
        try:
            answers = await self._handle.broadcast("where").results_async(timeout_s=5, return_exceptions=True)
        except (DeploymentUnavailableError, TimeoutError):
            return {}
        return dict(answer for answer in answers if isinstance(answer, tuple))


# ------------------------------------------------------------------ the command
def main(
    model: Annotated[str | None, typer.Argument(help="as of `minivllm serve`; none: the default model")] = None,
    num_replicas: Annotated[int, typer.Option(min=1, help="always so many")] = 2,
    min_replicas: Annotated[int, typer.Option(min=1, help="with --max-replicas: at rest")] = 1,
    max_replicas: Annotated[int | None, typer.Option(min=1, help="as many as the load asks for, up to this")] = None,
    target_ongoing_requests: Annotated[float, typer.Option(help="per replica, that --max-replicas aims at")] = 16,
    upscale_delay_seconds: Annotated[float, typer.Option(help="of more load, before a replica is started")] = 10,
    downscale_delay_seconds: Annotated[float, typer.Option(help="of less load, before one is ended")] = 300,
    max_ongoing_requests: Annotated[int, typer.Option(min=1, help="per replica; more wait here")] = 128,
    max_queued_requests: Annotated[int, typer.Option(min=1, help="that wait; more are refused with 429")] = 256,
    cpus: Annotated[int, typer.Option(min=1, help="cores of a replica")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs of a replica")] = 0,
    engine: Annotated[str, typer.Option(help="JSON of LLM's arguments")] = "{}",
    server: Annotated[str, typer.Option(help='JSON of ServerConfig\'s fields, as {"api_keys": ["..."]}')] = "{}",
    host: str = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any that is free")] = 8000,
    shutdown_timeout: Annotated[float, typer.Option(min=0, help="seconds for running answers, after SIGTERM")] = 30,
    several_machines: Annotated[
        bool, typer.Option(help="replicas listen to other machines: a private network")
    ] = False,
) -> None:
    """Serve replicas of MODEL until a signal comes."""
    engine_fields, server_fields = json_object("--engine", engine), json_object("--server", server)
    wait_awake_for_a_moment()
    count: dict[str, Any] = {"num_replicas": num_replicas}
    if max_replicas is not None:
        names = ("min_replicas", "initial_replicas", "max_replicas", "target_ongoing_requests")
        sizes = (min_replicas, min_replicas, max_replicas, target_ongoing_requests)
        delays = {"upscale_delay_s": upscale_delay_seconds, "downscale_delay_s": downscale_delay_seconds}
        count = {"autoscaling_config": dict(zip(names, sizes, strict=True)) | delays}
    threads = {"env_vars": {"OMP_NUM_THREADS": str(cpus)}}
    deployment = serve.deployment(
        name="replica",
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus, "runtime_env": threads},
        max_ongoing_requests=max_ongoing_requests,
        max_queued_requests=max_queued_requests,
        request_router_config=RequestRouterConfig(request_router_class=PrefixRouter),
        health_check_period_s=2,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=shutdown_timeout,
        max_constructor_retry_count=2,
        **count,
    )(Replica)
    replicas = deployment.bind(model, engine_fields, server_fields, not several_machines)
    with bound(host, port) as address:
        connect_to_ray(cpus * (max_replicas or num_replicas))
        try:
            ingress = Ingress(Replicas(start(replicas)), server_fields.get("max_body_bytes", MAX_BODY_BYTES))
            asyncio.run(listen(ingress, address, shutdown_timeout))
        finally:
            serve.shutdown()
            ray.shutdown()


def json_object(option: str, text: str) -> dict[str, Any]:
    """What an option says. Raises BadParameter."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise typer.BadParameter(f"{option} must be a JSON object, got {text[:100]!r}")
    return found


def bound(host: str, port: int) -> socket.socket:
    """An address of our own, before a model is loaded for it; nobody is answered yet. Raises ConfigError."""
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}.", parameter="port") from None
    return found


def start(replicas: Any) -> Any:
    """Ray's handle, when all replicas are there. Raises ConfigError."""
    serve.start(proxy_location="Disabled")
    try:
        return serve.run(replicas, name=NAME, route_prefix=None, logging_config={"log_level": "WARNING"})
    except RuntimeError as error:
        raise ConfigError(f"the replicas cannot be started: {error}") from error


async def listen(ingress: Ingress, address: socket.socket, shutdown_timeout: float) -> None:
    """Answer until a signal comes."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    runner = web.AppRunner(ingress.app, handler_cancellation=True, access_log=None, shutdown_timeout=0)
    await runner.setup()
    try:
        await web.SockSite(runner, address).start()
        host, port = address.getsockname()[:2]
        print(f"minivllm ready: http://{f'[{host}]' if ':' in host else host}:{port}/v1", flush=True)
        await stop.wait()
        with contextlib.suppress(TimeoutError):
            await ingress.drain(shutdown_timeout)
    finally:
        await runner.cleanup()


if __name__ == "__main__":
    try:
        typer.run(main)
    except MiniVLLMError as error:
        sys.exit(f"error: {error}")
