"""explain and replay: what the engine decides for a prompt, step by step; a recorded run once more.

Knows no scheduler: it speaks to LLM and to trace/. Called by cli/__init__.py; `recording` by the commands that have
--record. Twin in vLLM: none.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from minivllm.cli import options
from minivllm.cli.terminal import load, print_json, printable, read_stdin, sampling_params, stderr
from minivllm.errors import ClientError

OUTPUT = "Where the trace goes"
SHOWN_DIFFERENCES = 12


def explain(
    ctx: typer.Context,
    prompts: Annotated[list[str], typer.Argument(help="Texts to continue together; - reads one from standard input.")],
    html: Annotated[
        str | None, typer.Option(metavar="FILE", help="A page to step through.", rich_help_panel=OUTPUT)
    ] = None,
    chrome: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="For ui.perfetto.dev or chrome://tracing.", rich_help_panel=OUTPUT),
    ] = None,
    save: Annotated[
        str | None, typer.Option(metavar="FILE", help="All data, as JSON lines.", rich_help_panel=OUTPUT)
    ] = None,
    num_top: Annotated[
        int,
        typer.Option(
            metavar="TOKENS", min=1, max=100, help="Candidates at each stage of the sampler.", rich_help_panel=OUTPUT
        ),
    ] = 5,
    model: options.ModelOption = None,
    max_tokens: options.MaxTokensOption = 8,
    temperature: options.TemperatureOption = None,
    top_p: options.TopPOption = None,
    top_k: options.TopKOption = None,
    seed: options.SeedOption = None,
    stop: options.StopOption = None,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    quantization: options.QuantizationOption = None,
    max_model_len: options.MaxModelLenOption = None,
    max_num_seqs: options.MaxNumSeqsOption = 64,
    max_num_batched_tokens: options.MaxBatchedTokensOption = 1024,
    block_size: options.BlockSizeOption = 16,
    gpu_memory_utilization: options.UtilizationOption = None,
    kv_cache_memory_bytes: options.CacheBytesOption = None,
    num_gpu_blocks_override: options.NumBlocksOption = None,
    speculative_config: options.SpeculativeOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Continue texts and tell every step: what was decided and why, blocks, slots, and how each token was drawn."""
    from minivllm.trace import chrome_trace, page
    from minivllm.trace.terminal import print_trace

    llm = load(ctx, model)
    texts = [read_stdin() if text == "-" else text for text in prompts]
    trace = llm.trace(texts, sampling_params(ctx, llm), num_top=num_top)
    for file, make in ((html, lambda: page(trace)), (chrome, lambda: json.dumps(chrome_trace(trace)))):
        if file is not None:
            _write(file, make())
    if save is not None:
        _write(save, trace.to_json())
    if as_json:
        for line in trace.lines():
            typer.echo(line)
    elif html is None and chrome is None and save is None:
        print_trace(trace, Console(highlight=False), num_top)


def replay(
    ctx: typer.Context,
    file: Annotated[str, typer.Argument(help="What --record of another command wrote, or explain --save.")],
    change: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Another setting, e.g. block_size=8; may be repeated."),
    ] = None,
    until: Annotated[int | None, typer.Option(metavar="STEP", min=1, help="Stop behind this step.")] = None,
    as_json: options.JsonOption = False,
) -> None:
    """Run a recording again and say whether every decision, block, slot, logit and token is the same, bit for bit.

    Exit code 1: something is not. With --change it tells what the setting changes, and ends with 0.
    """
    from minivllm.trace import Trace, compare
    from minivllm.trace import replay as run_again

    changes = dict(_parse_change(text) for text in change or ())
    recorded = Trace.load(file)
    with stderr().status("running it again"):
        again = run_again(recorded, changes, until=until)
    differences = [one for one in compare(recorded, again, until=until) if one.is_decision or not changes]
    if as_json:
        print_json(_as_json(recorded, again, differences))
    else:
        _print_environment(recorded, again)
        _print_differences(recorded, differences, "decisions differ" if changes else "differences")
        if changes:
            _print_outcomes(recorded, again)
    if differences and not changes:
        raise typer.Exit(1)


@contextlib.contextmanager
def recording(engine: Any, file: str | None) -> Any:
    """Write what the engine does to a file that `replay` reads; without one, nothing."""
    if file is None:
        yield
        return
    from minivllm.trace import record

    with record(engine, num_top=0, file=file):
        yield


def _parse_change(text: str) -> tuple[str, Any]:
    """NAME=VALUE; a value that is no JSON is text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"--change must be NAME=VALUE, got {text[:100]!r}")
    try:
        return name.strip().replace("-", "_"), json.loads(value)
    except (ValueError, RecursionError):
        return name.strip().replace("-", "_"), value


def _write(file: str, text: str) -> None:
    try:
        Path(file).write_text(printable(text), encoding="utf-8")
    except OSError as error:
        raise ClientError(f"cannot write {file}: {error.strerror}") from None
    stderr().print(f"wrote {file}", markup=False, soft_wrap=True)


def _print_environment(recorded: Any, again: Any) -> None:
    """What the bits depend on beside the settings."""
    for name, then in recorded.header["environment"].items():
        now = again.header["environment"].get(name)
        if now != then:
            stderr().print(f"[yellow]recorded with {name} {escape(str(then))}, here {escape(str(now))}[/yellow]")


def _print_differences(recorded: Any, differences: list[Any], what: str) -> None:
    if differences:
        typer.echo(f"{len(differences)} {what}; the first ones:")
        for difference in differences[:SHOWN_DIFFERENCES]:
            typer.echo(f"  {difference}")
        return
    counts = f"{len(recorded.requests)} requests, {len(recorded.steps)} steps"
    typer.echo(
        f"identical: {counts}, every decision, block and bit" if what == "differences" else f"no {what}: {counts}"
    )


def _print_outcomes(recorded: Any, again: Any) -> None:
    from minivllm.trace.replay import outcomes

    table = Table("request", "steps", "preempted", "from the cache", "tokens", title="recorded -> with the change")
    then, now = outcomes(recorded), outcomes(again)
    for request_id, old in then.items():
        new = now.get(request_id)
        if new is not None:
            same = "the same" if new.token_ids == old.token_ids else "others"
            pairs = zip(old[:3], new[:3], strict=True)
            table.add_row(escape(request_id), *(f"{a}" if a == b else f"{a} -> {b}" for a, b in pairs), same)
    table.caption = f"{len(recorded.steps)} -> {len(again.steps)} steps"
    Console().print(table)


def _as_json(recorded: Any, again: Any, differences: list[Any]) -> dict[str, Any]:
    from minivllm.trace.replay import outcomes

    return {
        "identical": not differences,
        "num_steps": [len(recorded.steps), len(again.steps)],
        "num_differences": len(differences),
        "differences": [difference._asdict() for difference in differences[:SHOWN_DIFFERENCES]],
        "outcomes": {
            request_id: outcome._asdict() | {"token_ids": len(outcome.token_ids)}
            for request_id, outcome in outcomes(again).items()
        },
    }
