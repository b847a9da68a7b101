"""Measured seconds -> rows with rates, ratios, spread and the share of what this machine can do at most.

Pure functions on plain data. Called by compare.py.
"""

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine_process import Engine
from rich.console import Console
from rich.table import Table
from workload import Batch, Request

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class ModelSize:
    """Parameter counts, for the limits. A tied embedding counts once, as the output head."""

    num_parameters: int
    num_head_parameters: int

    @classmethod
    def of(cls, folder: Path) -> "ModelSize":
        """Read from a Hugging Face folder: config.json and the headers of its safetensors files."""
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


def is_prompt_only(batch: Batch) -> bool:
    """The rate that counts is then that of prompt tokens."""
    return all(num_tokens == 1 for _, num_tokens in batch.requests)


def summarise(
    engine: Engine,
    workload: str,
    batches: list[Batch],
    ours: list[Engine],
    size: ModelSize,
    limit: dict[str, float],
) -> dict[str, Any]:
    """One row: median and range over the rounds, rate, share of the limit, how much faster each of `ours` is.

    share_of_limit is None where there is none to name: a batch that another one has prepared, or see _has_limit.
    ratio_to_first: seconds of the last batch over those of the first, where there are two.
    """
    measured, rounds = batches[-1], engine.seconds[workload]
    seconds = [batch_seconds[-1] for batch_seconds in rounds]
    median = statistics.median(seconds)
    num_tokens = sum(len(ids) if is_prompt_only(measured) else n for ids, n in measured.requests)
    row: dict[str, Any] = {
        "workload": workload,
        "engine": engine.name,
        "dtype": engine.info["dtype"],
        "load_seconds": engine.load_seconds,
        "median_seconds": median,
        "min_seconds": min(seconds),
        "max_seconds": max(seconds),
        "tokens_per_second": num_tokens / median,
        "unit": "prompt tok/s" if is_prompt_only(measured) else "tok/s",
        "share_of_limit": None,
        "ratio_to_first": None,
        "times_faster": {},
    }
    if len(batches) > 1:
        row["ratio_to_first"] = _median_and_range([last / first for first, *_, last in rounds])
    elif _has_limit(engine.options):
        weight_bytes = engine.info.get("weight_bytes") or size.num_parameters * DTYPE_BYTES[engine.info["dtype"]]
        row["share_of_limit"] = least_seconds(measured.requests, size, weight_bytes, limit) / median
    for own in ours:
        own_rounds = own.seconds.get(workload, [])
        if own is not engine and len(own_rounds) == len(rounds):
            # Paired by round: drift of the machine's load cancels.
            pairs = zip(seconds, own_rounds, strict=True)
            row["times_faster"][own.name] = _median_and_range([peer / batch[-1] for peer, batch in pairs])
    return row


def _has_limit(options: dict[str, Any]) -> bool:
    """False where a step yields more than one token, or reads only one of two forms of the weights."""
    return "speculative_config" not in options and "+" not in options.get("quantization", "")


def _median_and_range(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def print_tables(console: Console, rows: list[dict[str, Any]], batches: dict[str, list[Batch]]) -> None:
    """A table per workload, the fastest engine first."""
    for workload, its_batches in batches.items():
        its_rows = sorted((row for row in rows if row["workload"] == workload), key=lambda row: row["median_seconds"])
        if its_rows:
            console.print(_table(workload, its_batches, its_rows))


def _table(workload: str, batches: list[Batch], rows: list[dict[str, Any]]) -> Table:
    requests = batches[-1].requests
    prompt, output = sum(len(ids) for ids, _ in requests), sum(n for _, n in requests)
    ours = list(dict.fromkeys(name for row in rows for name in row["times_faster"]))
    table = Table(title=f"{workload}: {len(requests)} requests, {prompt} prompt and {output} output tokens")
    last = "of first batch" if len(batches) > 1 else "of limit"
    for column in ("engine", "start s", "median s", "min - max", rows[0]["unit"], last, *(f"{n} is" for n in ours)):
        table.add_column(column, justify="left" if column == "engine" else "right")
    for row in rows:
        share = row["ratio_to_first"]["median"] if row["ratio_to_first"] else row["share_of_limit"]
        table.add_row(
            row["engine"],
            f"{row['load_seconds']:.1f}",
            f"{row['median_seconds']:.3g}",
            f"{row['min_seconds']:.3g} - {row['max_seconds']:.3g}",
            f"{row['tokens_per_second']:.1f}",
            "" if share is None else f"{share:.0%}",
            *(_ratio_text(row["times_faster"].get(name), with_range=len(ours) == 1) for name in ours),
        )
    return table


def _ratio_text(ratio: dict[str, float] | None, with_range: bool) -> str:
    """'1.31 x (1.25 - 1.40)'; without the range where many columns need the room; or nothing."""
    if ratio is None:
        return ""
    return f"{ratio['median']:.2f} x" + (f" ({ratio['min']:.2f} - {ratio['max']:.2f})" if with_range else "")
