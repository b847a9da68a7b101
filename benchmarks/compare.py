"""Ours against every installed peer, on the same token ids, side by side: python benchmarks/compare.py --help

Each engine lives in a process of its own python (adapters in engines/) and stays loaded. The engines take turns, round
by round, while the others are stopped, so that a busy machine hurts all alike: only ratios inside one run count.
"""

import json
import math
import os
import select
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import typer
from machine import describe, has_fast_bf16, limits, num_cores
from rich.console import Console
from rich.table import Table
from workload import WORKLOADS, Request, random_requests, requests_of_round

HERE = Path(__file__).parent
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

# name -> (adapter, folder of its virtual environment; None = this python, how to install it)
ENGINES: dict[str, tuple[str, str | None, str]] = {
    "ours": ("ours.py", None, "pip install -e ."),
    "transformers": ("hf_generate.py", "transformers", "benchmarks/peers/transformers.sh"),
    "vllm": ("vllm_offline.py", "vllm_cpu", "benchmarks/peers/vllm_cpu.sh"),
}

console = Console()


class EngineFailed(Exception):
    """The engine's process ended, hung, or returned something else than it was asked for."""


@dataclass
class Engine:
    """One engine in its process, and what was measured on it."""

    name: str  # as asked for: "vllm" or "vllm:bfloat16"
    dtype: str
    python: Path
    adapter: str
    log_file: Path
    timeout_seconds: float
    info: dict[str, Any] = field(default_factory=dict)
    load_seconds: float = math.nan
    seconds: dict[str, list[float]] = field(default_factory=dict)  # workload -> one entry per round
    process: subprocess.Popen[str] | None = None

    def start(self, model: Path, threads: int) -> None:
        """Start the process and wait until it can answer: imports, weights, warm-up and compilation of its own."""
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        start = time.perf_counter()
        with self.log_file.open("w") as log:
            self.process = subprocess.Popen(
                [self.python, HERE / "engines" / self.adapter],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                start_new_session=True,  # a process group, to stop and continue it with its children
            )
        self.info = self._ask({"model": str(model), "dtype": self.dtype, "threads": threads})
        self.load_seconds = time.perf_counter() - start

    def run(self, requests: list[Request]) -> float:
        """Seconds for `requests`; raises EngineFailed unless every request got exactly its number of tokens."""
        reply = self._ask({"requests": requests})
        if reply["num_output_tokens"] != [num_tokens for _, num_tokens in requests]:
            raise EngineFailed(f"wrong number of output tokens: {reply['num_output_tokens']}")
        return reply["seconds"]

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self.process and self.process.stdin and self.process.stdout
        try:
            print(json.dumps(message), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            raise EngineFailed(f"ended, see {self.log_file}") from None
        if not select.select([self.process.stdout], [], [], self.timeout_seconds)[0]:
            raise EngineFailed(f"no answer in {self.timeout_seconds:.0f} s, see {self.log_file}")
        if not (line := self.process.stdout.readline()):
            raise EngineFailed(f"ended, see {self.log_file}")
        return json.loads(line)

    def signal(self, number: signal.Signals) -> None:
        """SIGSTOP keeps an idle engine from spinning on the cores that another one is measured on."""
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def stop(self) -> None:
        """End the process and its children: politely, then not."""
        if self.process and self.process.stdin:
            self.signal(signal.SIGCONT)
            self.process.stdin.close()
            try:
                self.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self.signal(signal.SIGKILL)


@dataclass(frozen=True)
class ModelSize:
    """Parameter counts, for the limits. A tied embedding counts once, as the output head."""

    num_parameters: int
    num_head_parameters: int

    @classmethod
    def of(cls, folder: Path) -> "ModelSize":
        config = json.loads((folder / "config.json").read_text())
        num_parameters = 0
        for file in folder.glob("*.safetensors"):
            with file.open("rb") as stream:
                header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
            num_parameters += sum(math.prod(t["shape"]) for name, t in header.items() if name != "__metadata__")
        return cls(num_parameters, config["vocab_size"] * config["hidden_size"])


def least_seconds(requests: list[Request], size: ModelSize, weight_bytes: float, limit: dict[str, float]) -> float:
    """No engine can be faster here: all multiplications at the measured rate, or all weights read once per step.

    Attention is left out (it is small at these lengths); the faster of the two dtypes gives the rate.
    """
    num_prompt = sum(len(ids) for ids, _ in requests)
    num_output = sum(num_tokens for _, num_tokens in requests)
    body = size.num_parameters - size.num_head_parameters
    flops = 2 * (body * (num_prompt + num_output) + size.num_head_parameters * num_output)
    flop_rate = 1e9 * max(rate for name, rate in limit.items() if name.startswith("gemm"))
    num_steps = max(num_tokens for _, num_tokens in requests)
    return max(flops / flop_rate, num_steps * weight_bytes / (1e9 * limit["read_gb_per_s"]))


def find_engines(names: list[str], peers: Path, dtype: str, timeout: float) -> tuple[list[Engine], dict[str, str]]:
    """The engines that are installed, and name -> reason for the others."""
    found, missing = [], {}
    for name in names:
        base, _, own_dtype = name.partition(":")
        if base not in ENGINES:
            raise typer.BadParameter(f"unknown engine {base!r}; choose from {', '.join(ENGINES)}")
        adapter, folder, install = ENGINES[base]
        python = peers / folder / "bin" / "python" if folder else Path(sys.executable)
        if python.exists():
            log_file = peers / "logs" / f"{name.replace(':', '-')}.log"
            found.append(Engine(name, own_dtype or dtype, python.absolute(), adapter, log_file, timeout))
        else:
            missing[name] = f"not installed (run {install})"
    return found, missing


def export_default_model(folder: Path) -> None:
    """Write the default model's GGUF out as a folder that every engine reads."""
    from minivllm import hub

    console.print(f"exporting the default model to {folder}")
    source = hub.resolve_model(None)
    subprocess.run([sys.executable, HERE / "export_model.py", source.path, folder], check=True)


def start_all(engines: list[Engine], model: Path, threads: int) -> dict[str, str]:
    """Load the engines one after another and warm them up; returns name -> reason of those that failed."""
    failed = {}
    for engine in engines:
        console.print(f"{engine.name}: loading as {engine.dtype} ...", end=" ")
        try:
            engine.start(model, threads)
            engine.run(random_requests(4, seed=1, prompt=(16, 64), output=(8, 8)))
        except EngineFailed as error:
            failed[engine.name] = str(error)
            engine.stop()
        engine.signal(signal.SIGSTOP)
        console.print(failed.get(engine.name, f"{engine.load_seconds:.1f} s"), highlight=False)
    return failed


def run_rounds(engines: list[Engine], workloads: list[str], num_rounds: int) -> dict[str, str]:
    """Every engine in turn, for each workload, `num_rounds` times; returns name -> reason of those that failed."""
    failed: dict[str, str] = {}
    for round_index in range(num_rounds):
        for workload in workloads:
            requests = requests_of_round(workload, round_index)
            for engine in (engine for engine in engines if engine.name not in failed):
                engine.signal(signal.SIGCONT)
                try:
                    seconds = engine.run(requests)
                except EngineFailed as error:
                    failed[engine.name] = f"{workload}: {error}"
                    engine.stop()
                    continue
                engine.signal(signal.SIGSTOP)
                engine.seconds.setdefault(workload, []).append(seconds)
                console.print(f"round {round_index + 1}/{num_rounds} {workload} {engine.name}: {seconds:.2f} s")
    return failed


def summarise(engine: Engine, workload: str, ours: Engine | None, size: ModelSize, limit: dict[str, float]) -> dict:
    """One row of the result: median and range over the rounds, rate, share of the limit, how much faster ours is."""
    requests = requests_of_round(workload, 0)
    seconds = engine.seconds[workload]
    median = statistics.median(seconds)
    weight_bytes = engine.info.get("weight_bytes") or size.num_parameters * DTYPE_BYTES[engine.info["dtype"]]
    is_prompt_only = all(num_tokens == 1 for _, num_tokens in requests)
    num_tokens = sum(len(ids) if is_prompt_only else num_tokens for ids, num_tokens in requests)
    row = {
        "workload": workload,
        "engine": engine.name,
        "dtype": engine.info["dtype"],
        "load_seconds": engine.load_seconds,
        "median_seconds": median,
        "min_seconds": min(seconds),
        "max_seconds": max(seconds),
        "tokens_per_second": num_tokens / median,
        "share_of_limit": least_seconds(requests, size, weight_bytes, limit) / median,
    }
    if ours and ours is not engine and len(ours.seconds.get(workload, [])) == len(seconds):
        # Paired by round: drift of the machine's load cancels.
        ratios = [peer / own for peer, own in zip(seconds, ours.seconds[workload], strict=True)]
        row["ours_is_times_faster"] = statistics.median(ratios)
    return row


def print_tables(rows: list[dict], missing: dict[str, str]) -> None:
    for workload in dict.fromkeys(row["workload"] for row in rows):
        requests = requests_of_round(workload, 0)
        prompt, output = sum(len(ids) for ids, _ in requests), sum(n for _, n in requests)
        unit = "prompt tok/s" if output == len(requests) else "output tok/s"
        table = Table(title=f"{workload}: {len(requests)} requests, {prompt} prompt and {output} output tokens")
        for column in ("engine", "dtype", "start s", "median s", "min - max", unit, "of limit", "ours is"):
            table.add_column(column, justify="left" if column in ("engine", "dtype") else "right")
        for row in (row for row in rows if row["workload"] == workload):
            ratio = row.get("ours_is_times_faster")
            table.add_row(
                row["engine"],
                row["dtype"],
                f"{row['load_seconds']:.1f}",
                f"{row['median_seconds']:.2f}",
                f"{row['min_seconds']:.2f} - {row['max_seconds']:.2f}",
                f"{row['tokens_per_second']:.1f}",
                f"{row['share_of_limit']:.0%}",
                f"{ratio:.2f} x" if ratio else "",
            )
        console.print(table)
    for name, reason in missing.items():
        console.print(f"{name}: {reason}", highlight=False)


def main(
    engines: Annotated[str, typer.Option(help="NAME or NAME:DTYPE, separated by commas")] = ",".join(ENGINES),
    workloads: Annotated[str, typer.Option(help="separated by commas")] = ",".join(WORKLOADS),
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    dtype: Annotated[str, typer.Option(help="auto: bfloat16 where the processor multiplies it, else float32")] = "auto",
    model: Annotated[Path | None, typer.Option(help="Hugging Face folder; default: the exported default model")] = None,
    peers: Annotated[Path, typer.Option(help="where benchmarks/peers/*.sh installed the peers")] = Path(".peers"),
    threads: Annotated[int, typer.Option(help="0: all cores")] = 0,
    timeout: Annotated[float, typer.Option(help="seconds for one answer, starting included")] = 1800,
    json_file: Annotated[Path | None, typer.Option("--json", help="write everything there as well")] = None,
) -> None:
    """Measure ours and every installed peer on the same work, in turns, and print medians, limits and ratios."""
    workload_names = workloads.split(",")
    if unknown := set(workload_names) - set(WORKLOADS):
        raise typer.BadParameter(f"unknown workloads {sorted(unknown)}; choose from {', '.join(WORKLOADS)}")
    machine = describe()
    if dtype == "auto":
        dtype = "bfloat16" if has_fast_bf16(machine["flags"]) else "float32"
    found, missing = find_engines(engines.split(","), peers, dtype, timeout)
    (peers / "logs").mkdir(parents=True, exist_ok=True)
    model = model or peers / "model"
    if not model.exists():
        export_default_model(model)

    limit = limits()
    console.print(machine, {name: round(value, 1) for name, value in limit.items()})
    try:
        missing |= start_all(found, model.absolute(), threads or num_cores())
        running = [engine for engine in found if engine.name not in missing]
        missing |= run_rounds(running, workload_names, rounds)
    finally:
        for engine in found:
            engine.stop()

    size = ModelSize.of(model)
    ours = next((engine for engine in running if engine.name.partition(":")[0] == "ours"), None)
    rows = [summarise(e, name, ours, size, limit) for name in workload_names for e in running if name in e.seconds]
    print_tables(rows, missing)
    if json_file:
        details = {e.name: {"info": e.info, "load_seconds": e.load_seconds, "seconds": e.seconds} for e in running}
        result = {"date": date.today().isoformat(), "machine": machine, "limits": limit, "model": model.name}
        result |= {"summary": rows, "engines": details, "missing": missing}
        json_file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
