"""bench: how fast this machine runs a model, and with --profile where a step's time goes.

Knows no step: minivllm/bench measures. Called by cli/__init__.py. Twin in vLLM: vllm/entrypoints/cli/benchmark/.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from minivllm.cli import options
from minivllm.cli.terminal import load, print_json

if TYPE_CHECKING:
    from minivllm.bench.measure import Result
    from minivllm.bench.profile import Profile

NAMES = ("single", "w32")


def bench(
    ctx: typer.Context,
    model: options.ModelOption = None,
    workload: Annotated[
        list[str] | None,
        typer.Option("--workload", "-w", metavar="NAME", help="single (one stream) or w32 (32 requests); repeatable."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, metavar="ROUNDS", help="Counted ones; one goes before them.")] = 3,
    profile: Annotated[bool, typer.Option("--profile", help="Also: where a decode step's time goes.")] = False,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    quantization: options.QuantizationOption = None,
    max_model_len: options.MaxModelLenOption = None,
    gpu_memory_utilization: options.UtilizationOption = None,
    kv_cache_memory_bytes: options.CacheBytesOption = None,
    batch_invariant: options.BatchInvariantOption = False,
    speculative_config: options.SpeculativeOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Measure tokens per second and times to the first token, offline, with random prompts."""
    names = workload or list(NAMES)
    if unknown := [name for name in names if name not in NAMES]:
        raise typer.BadParameter(f"--workload must be {' or '.join(NAMES)}, got {unknown[0]!r}")
    engine = load(ctx, model).llm_engine

    from minivllm.bench.measure import measure
    from minivllm.bench.profile import profile as profile_steps
    from minivllm.bench.workloads import WORKLOADS, jobs_of

    results, profiles = [], {}
    for name in names:
        jobs = jobs_of(WORKLOADS[name], 0, engine.config.model.vocab_size, engine.config.model.max_model_len)
        total = (rounds + 1) * sum(job.num_output_tokens for job in jobs)
        with tqdm(desc=name, total=total, unit="tok", leave=False, disable=as_json) as bar:
            results.append(measure(engine, WORKLOADS[name], rounds, bar.update))
        if profile:
            profiles[name] = profile_steps(engine, WORKLOADS[name])
    if as_json:
        found: dict[str, Any] = {"model": engine.config.model.name, "workloads": [one.as_dict() for one in results]}
        if profile:
            found["profiles"] = {name: one.as_dict() for name, one in profiles.items()}
        print_json(found)
        return
    Console().print(_results_table(results))
    for name, one in profiles.items():
        Console().print(_profile_table(name, one))


def _results_table(results: list[Result]) -> Table:
    table = Table(
        "workload", "requests", "tokens in", "tokens out", "s", "tokens out / s", "first token, ms", "per token, ms",
        caption=f"middle of {len(results[0].rounds)} rounds; times: 50, 90, 99 of 100 requests have less",
    )  # fmt: skip
    for result in results:
        values = result.as_dict()
        table.add_row(
            result.workload.name,
            str(result.workload.num_requests),
            str(result.num_prompt_tokens),
            str(result.num_output_tokens),
            f"{result.seconds:.2f}",
            f"[bold]{values['output_tokens_per_second']:.1f}[/bold]",
            *(
                " / ".join(f"{value:.4g}" for value in values[name].values())
                for name in ("time_to_first_token_ms", "time_per_output_token_ms")
            ),
        )
    return table


def _profile_table(name: str, profile: Profile) -> Table:
    table = Table(
        "part", "ms", "%", "calls", "",
        title=f"one decode step of {profile.num_requests} request(s), {name}",
        caption=f"the middle one of {profile.num_steps} steps;\nwithout the stopwatch a step takes "
        f"{profile.plain_milliseconds:.2f} ms",
    )  # fmt: skip
    for part in profile.parts:
        share = part.milliseconds / profile.milliseconds
        bar = "█" * round(24 * share)
        table.add_row(part.name, f"{part.milliseconds:.3f}", f"{100 * share:.1f}", str(part.calls), bar)
    table.add_section()
    table.add_row("the step", f"[bold]{profile.milliseconds:.3f}[/bold]", "100.0", "", "")
    return table
