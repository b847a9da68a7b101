"""What HTTP costs: the same token ids through `minivllm serve` and through the engine, in turns.

    python benchmarks/http_path.py

Two processes hold the default model: a server, asked by this process over plain sockets, and an engine that is stepped
as LLM.generate does it. They take turns round by round, the other one is stopped meanwhile, and every round has other
token ids. Printed: the median time to the first token and output tokens per second, and HTTP's over the engine's.
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
def run_offline(dtype: str) -> None:
    """A line in: [[prompt_token_ids, num_output_tokens], ...]; a line out: Measured."""
    from minivllm import LLM, SamplingParams

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    engine = LLM(dtype=dtype).llm_engine
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

    def __init__(self, dtype: str) -> None:
        command = [sys.executable, __file__, OFFLINE, dtype]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout and self.process.stdout.readline() == "ready\n"

    def run(self, requests: list[Request]) -> Measured:
        assert self.process.stdin and self.process.stdout
        print(json.dumps(requests), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


# ------------------------------------------------------------------ the server, over sockets
class Server:
    name = "HTTP"

    def __init__(self, dtype: str) -> None:
        command = [sys.executable, "-m", "minivllm.cli", "serve", "--port", "0", "--json", "--dtype", dtype]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
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


# ------------------------------------------------------------------ in turns
def measure(num_streams: int, sides: list[Offline | Server], rounds: int) -> list[list[Measured]]:
    """[side][round]. The first round warms up and is not counted."""
    results: list[list[Measured]] = [[] for _ in sides]
    shape = {"prompt": (64, 64), "output": (128, 128)} if num_streams == 1 else {}
    for number in range(rounds + 1):
        requests = random_requests(num_streams, seed=1000 * num_streams + number, **shape)
        # The side that goes first would always find the same state of the machine.
        for index in range(len(sides))[:: 1 if number % 2 else -1]:
            sides[index].process.send_signal(signal.SIGCONT)
            measured = sides[index].run(requests)
            sides[index].process.send_signal(signal.SIGSTOP)
            if number:
                results[index].append(measured)
    return results


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    streams: Annotated[str, typer.Option(help="numbers of streams, separated by commas")] = "1,32",
    dtype: Annotated[str, typer.Option(help="auto: bfloat16 where the processor multiplies it, else float32")] = "auto",
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
    sides: list[Offline | Server] = [Offline(dtype), Server(dtype)]
    try:
        for number in numbers:
            print_table(number, sides, measure(number, sides, rounds))
    finally:
        for side in sides:
            side.process.kill()


def print_table(num_streams: int, sides: list[Offline | Server], results: list[list[Measured]]) -> None:
    """Medians over the rounds with their range; the ratio is the median of the rounds' own ratios."""
    table = Table(title=f"{num_streams} streams, {len(results[0])} rounds")
    for column in ("", "first token ms", "range", "seconds for all", "range"):
        table.add_column(column, justify="right")
    firsts = [[1000 * statistics.median(first) for first, _ in side] for side in results]
    totals = [[total for _, total in side] for side in results]
    for side, first, total in zip(sides, firsts, totals, strict=True):
        table.add_row(side.name, *_median_and_range(first, 1), *_median_and_range(total, 2))
    over = [[http / engine for engine, http in zip(*pair, strict=True)] for pair in (firsts, totals)]
    table.add_row("HTTP / engine", *_median_and_range(over[0], 3), *_median_and_range(over[1], 3))
    console.print(table)


def _median_and_range(values: list[float], digits: int) -> tuple[str, str]:
    return f"{statistics.median(values):.{digits}f}", f"{min(values):.{digits}f} - {max(values):.{digits}f}"


if __name__ == "__main__":
    if OFFLINE in sys.argv:
        run_offline(sys.argv[-1])
    else:
        typer.run(main)
