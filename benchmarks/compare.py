"""Ours against every installed peer, on the same token ids, side by side: python benchmarks/compare.py --help

Each engine lives in a process of its own python (adapters in engines/) and stays loaded. The engines take turns, round
by round, while the others are stopped, so that a busy machine hurts all alike: only ratios inside one run count.
benchmarks/README.md says what is measured and what is made equal.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from chart import draw
from engine_process import HERE, Engine, EngineFailed, Unsupported
from machine import describe, has_fast_bf16, limits, num_cores
from rich.console import Console
from summary import ModelSize, print_tables, summarise
from tokenizers import Tokenizer
from workload import NAMES, Batch, batches_of_round, random_requests

# name -> (adapter, folder of its virtual environment; None = this python, how to install it)
ENGINES: dict[str, tuple[str, str | None, str]] = {
    "ours": ("ours.py", None, "pip install -e ."),
    "transformers": ("hf_generate.py", "transformers", "benchmarks/peers/transformers.sh"),
    "vllm": ("vllm_offline.py", "vllm_cpu", "benchmarks/peers/vllm_cpu.sh"),
    "openvino": ("openvino_genai_offline.py", "openvino", "benchmarks/peers/openvino.sh"),
    "llama.cpp": ("llama_cpp_offline.py", "llama_cpp", "benchmarks/peers/llama_cpp.sh"),
}

# NAME+VARIANT -> what the engine is given besides. An engine that has no such option ends, and says so.
VARIANTS: dict[str, dict[str, Any]] = {
    "gguf": {"quantization": "gguf"},
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
    # Both forms in memory: few bits for a few requests at a time, 16 for many.
    "gguf-16": {"quantization": "gguf+bf16"},
    "int4-16": {"quantization": "int4+bf16"},
    "compile": {"compile": True},
    "ngram": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 6}},
    "2ranks": {"tensor_parallel_size": 2},
}

console = Console()


def find_engines(names: list[str], peers: Path, dtype: str, timeout: float) -> tuple[list[Engine], dict[str, str]]:
    """The engines that are installed, and name -> reason for the others. A name is NAME[:DTYPE][+VARIANT ...]."""
    found, missing = [], {}
    for name in names:
        engine, *variants = name.split("+")
        base, _, own_dtype = engine.partition(":")
        for kind, word, table in (("engine", base, ENGINES), *(("variant", word, VARIANTS) for word in variants)):
            if word not in table:
                raise typer.BadParameter(f"unknown {kind} {word!r} in {name!r}; choose from {', '.join(table)}")
        adapter, folder, install = ENGINES[base]
        python = peers / folder / "bin" / "python" if folder else Path(sys.executable)
        if python.exists():
            options = {key: value for variant in variants for key, value in VARIANTS[variant].items()}
            log_file = peers / "logs" / f"{name.replace(':', '-')}.log"
            found.append(Engine(name, own_dtype or dtype, python.absolute(), adapter, log_file, timeout, options))
        else:
            missing[name] = f"not installed (run {install})"
    return found, missing


def default_model(folder: Path) -> tuple[Path, Path]:
    """(folder, GGUF file) of the default model, written out as a folder that every engine reads, if it is not yet."""
    from minivllm import hub

    gguf = Path(hub.resolve_model(None).path)
    if not folder.exists():
        console.print(f"exporting the default model to {folder}")
        subprocess.run([sys.executable, HERE / "export_model.py", gguf, folder], check=True)
    return folder.absolute(), gguf


def start_all(engines: list[Engine], model: Path, gguf: Path | None, threads: int) -> dict[str, str]:
    """Load the engines one after another and warm them up; returns name -> reason of those that failed."""
    failed = {}
    for engine in engines:
        console.print(f"{engine.name}: loading as {engine.dtype} ...", end=" ")
        try:
            engine.start(model, gguf, threads)
            engine.run(Batch(random_requests(4, seed=1, prompt=(16, 64), output=(8, 8))))
        except EngineFailed as error:
            failed[engine.name] = str(error)
            engine.stop()
        engine.signal(signal.SIGSTOP)
        console.print(failed.get(engine.name, f"{engine.load_seconds:.1f} s"), highlight=False)
    return failed


def run_rounds(engines: list[Engine], rounds: list[dict[str, list[Batch]]]) -> dict[str, str]:
    """Every engine in turn, for each round's workloads (name -> batches); returns name -> reason of what failed.

    An engine that fails is out; one that has nothing for a workload only misses that.
    """
    failed: dict[str, str] = {}
    for index, workloads in enumerate(rounds):
        for workload, batches in workloads.items():
            # The engine that goes first would always find the same state of the machine.
            for engine in engines if index % 2 == 0 else engines[::-1]:
                if engine.name in failed or f"{engine.name}, {workload}" in failed:
                    continue
                engine.signal(signal.SIGCONT)
                try:
                    seconds = [engine.run(batch) for batch in batches]
                except EngineFailed as error:
                    failed[engine.name] = f"{workload}: {error}"
                    engine.stop()
                    continue
                except Unsupported as error:
                    failed[f"{engine.name}, {workload}"] = str(error)
                    continue
                finally:
                    engine.signal(signal.SIGSTOP)
                engine.seconds.setdefault(workload, []).append(seconds)
                text = ", ".join(f"{value:.3g} s" for value in seconds)
                console.print(f"round {index + 1}/{len(rounds)} {workload} {engine.name}: {text}")
    return failed


def encoder(model: Path) -> Callable[[str], list[int]]:
    """Text -> token ids with the tokenizer of a Hugging Face folder, nothing added."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def main(
    engines: Annotated[
        str, typer.Option(help=f"NAME[:DTYPE][+VARIANT ...], separated by commas; variants: {', '.join(VARIANTS)}")
    ] = ",".join(ENGINES),
    workloads: Annotated[str, typer.Option(help="separated by commas")] = ",".join(NAMES),
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    dtype: Annotated[str, typer.Option(help="auto: bfloat16 where the processor multiplies it, else float32")] = "auto",
    model: Annotated[Path | None, typer.Option(help="Hugging Face folder; default: the exported default model")] = None,
    gguf: Annotated[Path | None, typer.Option(help="the same weights as a file, for llama.cpp and +gguf")] = None,
    peers: Annotated[Path, typer.Option(help="where benchmarks/peers/*.sh installed the peers")] = Path(".peers"),
    threads: Annotated[int, typer.Option(help="0: all cores")] = 0,
    timeout: Annotated[float, typer.Option(help="seconds for one answer, starting included")] = 1800,
    json_file: Annotated[Path | None, typer.Option("--json", help="write everything there as well")] = None,
    chart: Annotated[Path | None, typer.Option(help="draw it there, .png or .svg (pip install matplotlib)")] = None,
) -> None:
    """Measure ours and every installed peer on the same work, in turns, and print medians, limits and ratios."""
    workload_names = workloads.split(",")
    if unknown := set(workload_names) - set(NAMES):
        raise typer.BadParameter(f"unknown workloads {sorted(unknown)}; choose from {', '.join(NAMES)}")
    if chart and not find_spec("matplotlib"):  # said now, not after an hour
        raise typer.BadParameter("--chart needs matplotlib: pip install -e .[chart]")
    machine = describe()
    if dtype == "auto":
        dtype = "bfloat16" if has_fast_bf16(machine["flags"]) else "float32"
    found, missing = find_engines(engines.split(","), peers, dtype, timeout)
    (peers / "logs").mkdir(parents=True, exist_ok=True)
    if model is None:
        model, gguf = default_model(peers / "model")
    encode = encoder(model)
    work = [{name: batches_of_round(name, index, encode) for name in workload_names} for index in range(rounds)]

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that the engines end as well
    limit = limits()
    console.print(machine, {name: round(value, 1) for name, value in limit.items()})
    try:
        missing |= start_all(found, model.absolute(), gguf and gguf.absolute(), threads or num_cores())
        running = [engine for engine in found if engine.name not in missing]
        missing |= run_rounds(running, work)
    finally:
        for engine in found:
            engine.stop()

    size, ours = ModelSize.of(model), [engine for engine in running if engine.base == "ours"]
    rows = [
        summarise(engine, name, work[0][name], ours, size, limit)
        for name in workload_names
        for engine in running
        if name in engine.seconds
    ]
    print_tables(console, rows, work[0])
    for name, reason in missing.items():
        console.print(f"{name}: {reason}", highlight=False)
    details = {e.name: {"info": e.info, "load_seconds": e.load_seconds, "seconds": e.seconds} for e in running}
    result = {"date": date.today().isoformat(), "machine": machine, "limits": limit, "rounds": rounds, "dtype": dtype}
    result |= {"model": gguf.stem if gguf else model.name, "summary": rows, "engines": details, "missing": missing}
    if json_file:
        json_file.write_text(json.dumps(result, indent=1) + "\n")
    if chart:
        draw(result, chart)


if __name__ == "__main__":
    typer.run(main)
