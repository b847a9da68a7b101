"""Two replicas with one core each against one engine with both cores, on W32: the same requests, in turns.

    pip install -e .[ray]
    python benchmarks/replicas.py

Three sides: an engine that is stepped as LLM.generate does it, `minivllm serve` and deploy/ray_serve.py. All are loaded
once and rest while another one is measured; every round has other token ids. Printed: the median seconds for all
requests, and the throughput of the replicas over that of the other two. Only ratios inside one run count.
"""

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer
from http_path import Offline, Server
from machine import describe, has_fast_bf16, num_cores
from rich.console import Console
from rich.table import Table
from workload import random_requests

from minivllm.cli import wait_awake_for_a_moment

console = Console()
SCRIPT = Path(__file__).parents[1] / "deploy" / "ray_serve.py"
START_SECONDS = 300.0


class Replicas(Server):
    """deploy/ray_serve.py, asked as the server is."""

    def __init__(self, num_replicas: int, dtype: str, quantization: str | None) -> None:
        self.name = f"{num_replicas} replicas"
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        cpus = max(1, num_cores() // num_replicas)
        command = [sys.executable, SCRIPT, "--num-replicas", str(num_replicas), "--cpus", str(cpus)]
        self.process = subprocess.Popen(
            [*command, "--port", str(port), "--engine", json.dumps({"dtype": dtype, "quantization": quantization})],
            stdout=subprocess.DEVNULL,
            process_group=0,
        )
        self.url = urlsplit(f"http://127.0.0.1:{port}")
        deadline = time.monotonic() + START_SECONDS
        while not self._is_ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the replicas have not started")
            time.sleep(0.5)

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url.geturl()}/health", timeout=5):
                return True
        except OSError:
            return False


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    num_replicas: Annotated[int, typer.Option(min=1)] = 2,
    dtype: Annotated[str, typer.Option(help="auto: bfloat16 where the processor multiplies it, else float32")] = "auto",
    quantization: Annotated[str | None, typer.Option(help="Of the weights, on all sides: gguf, int8, int4.")] = None,
) -> None:
    """Measure the three in turns and print the ratios."""
    machine = describe()
    if dtype == "auto":
        dtype = "bfloat16" if has_fast_bf16(machine["flags"]) else "float32"
    os.environ["OMP_NUM_THREADS"] = str(num_cores())
    wait_awake_for_a_moment()  # all sides, as the command line does
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # through the end below
    console.print({**machine, "flags": len(machine["flags"])}, dtype, quantization)
    sides: list[Offline | Server] = []
    seconds: list[list[float]] = [[], [], []]
    try:
        sides += [Offline(None, dtype, quantization), Server(None, dtype, quantization)]
        sides.append(Replicas(num_replicas, dtype, quantization))
        console.print("loaded")
        for number in range(rounds + 1):  # the first one warms up
            requests = random_requests(32, seed=32_000 + number)
            # The side that goes first would always find the same state of the machine.
            for index in range(3)[:: 1 if number % 2 else -1]:
                _, total = sides[index].run(requests)
                console.print(f"round {number}: {sides[index].name} {total:.2f} s")
                if number:
                    seconds[index].append(total)
    finally:
        for side in sides:
            side.process.terminate()
        if all(seconds):
            print_table([side.name for side in sides], seconds)


def print_table(names: list[str], seconds: list[list[float]]) -> None:
    """The ratio is the median of the rounds' own ratios."""
    num_rounds = min(map(len, seconds))  # an unfinished round does not count
    table = Table(title=f"W32, {num_rounds} rounds")
    for column in ("", "seconds for all", "range", f"throughput of {names[-1]} over this"):
        table.add_column(column, justify="right")
    for name, own in zip(names, (side[:num_rounds] for side in seconds), strict=True):
        ratios = [one / replicas for one, replicas in zip(own, seconds[-1][:num_rounds], strict=True)]
        ratio = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} - {max(ratios):.3f})"
        table.add_row(name, f"{statistics.median(own):.2f}", f"{min(own):.2f} - {max(own):.2f}", ratio)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
