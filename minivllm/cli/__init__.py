"""The command line: serve, chat, generate, embed, pull, plan, run-batch, bench, explain, replay, verify, diff, lab.

    __init__.py      the table of commands, and what an error looks like
    serving.py       serve                      conversation.py  chat
    offline.py       generate, embed            batch.py         run-batch
    models.py        pull, plan                 bench.py         bench
    labs.py          lab list, start, check     tracing.py       explain, replay
    verifying.py     verify, diff               options.py terminal.py  what they share

Every command takes --json for a machine-readable answer on standard output; progress and messages go to standard
error. Exit codes: 0 done, 1 an error, 2 wrong usage, 130 interrupted.
Knows no scheduler: it speaks to LLM. Twin in vLLM: vllm/entrypoints/cli/.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from typing import Annotated

import typer
from rich.panel import Panel
from rich.text import Text

from minivllm.cli.batch import run_batch
from minivllm.cli.bench import bench
from minivllm.cli.completion import complete
from minivllm.cli.conversation import chat
from minivllm.cli.labs import lab_commands
from minivllm.cli.models import plan, pull
from minivllm.cli.offline import embed, generate
from minivllm.cli.serving import serve
from minivllm.cli.settings import SettingsCommand
from minivllm.cli.terminal import stderr
from minivllm.cli.tracing import explain, replay
from minivllm.cli.verifying import diff, verify
from minivllm.errors import MiniVLLMError
from minivllm.version import __version__

SPIN_COUNT = "10000"  # turns of libgomp's waiting loop, about 0.1 ms

app = typer.Typer(
    name="minivllm",
    help="A readable LLM inference engine. Without --model every command uses SmolLM2-135M-Instruct.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(value: bool) -> None:
    if value:
        parts = [f"{name} {_version_of(name)}" for name in ("torch", "triton", "transformers")]
        typer.echo(f"minivllm {__version__} ({', '.join(parts)})")
        raise typer.Exit


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # triton comes with torch's CUDA build only
        return "not installed"


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Versions, then exit.")
    ] = False,
) -> None:
    """A readable LLM inference engine."""


for _name, _command in (
    ("serve", serve),
    ("chat", chat),
    ("complete", complete),
    ("generate", generate),
    ("embed", embed),
    ("plan", plan),
    ("pull", pull),
    ("run-batch", run_batch),
    ("bench", bench),
    ("explain", explain),
    ("replay", replay),
    ("verify", verify),
    ("diff", diff),
):
    app.command(_name, cls=SettingsCommand)(_command)
app.add_typer(lab_commands(), name="lab")


def wait_awake_for_a_moment() -> None:
    """Say how long OpenMP's threads wait awake for the next operation; it is read when torch is imported.

    Their own 3 ms bridge every gap between two operations, but on a machine where others work too they hold the very
    core that the thread they wait for needs, and a step takes a second. 0.1 ms bridges the gaps as well.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def main() -> None:
    """Entry point: expected errors are one clear message and exit code 1, never a traceback."""
    wait_awake_for_a_moment()
    try:
        app()
    except MiniVLLMError as error:
        console = stderr()
        if console.is_terminal:
            console.print(Panel(Text(str(error)), title="error", border_style="red", title_align="left"))
        else:  # whole lines, for grep
            typer.echo(f"error: {error}", err=True)
        sys.exit(1)
