"""lab list, lab start, lab check: exercises on the ideas of the engine.

Knows no exercise. Twin in vLLM: none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from minivllm.cli.options import JsonOption
from minivllm.cli.settings import SettingsCommand
from minivllm.cli.terminal import print_json

if TYPE_CHECKING:
    from minivllm.labs.lab import Verdict

NameArgument = Annotated[str, typer.Argument(help="A lab of `minivllm lab list`.", metavar="NAME")]
SolutionOption = Annotated[bool, typer.Option("--solution", help="Check the solved exercise instead of a file.")]


def lab_commands() -> typer.Typer:
    """The commands behind `minivllm lab`."""
    commands = typer.Typer(
        help="Eight exercises on the ideas of the engine, with checks that explain.",
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for name, command in (("list", list_labs), ("start", start), ("check", check)):
        commands.command(name, cls=SettingsCommand)(command)
    return commands


def list_labs(as_json: JsonOption = False) -> None:
    """The labs, in the order in which they are best done."""
    from minivllm.labs.catalog import LABS

    if as_json:
        rows = [{"name": lab.name, "title": lab.title, "engine": lab.engine} for lab in LABS]
        print_json({"labs": rows})
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    for lab in LABS:
        table.add_row(f"[bold]{lab.name}[/bold]", lab.title)
    Console().print(table)
    typer.echo("\nminivllm lab start NAME writes NAME.py here; minivllm lab check NAME says what it makes of it.")


def start(name: NameArgument, as_json: JsonOption = False) -> None:
    """Write the exercise as NAME.py into this folder. A file that is there already stays as it is."""
    from minivllm.labs import workshop
    from minivllm.labs.catalog import find

    lab = find(name)
    path = workshop.start(lab.name, Path())
    if as_json:
        print_json({"name": lab.name, "path": str(path.resolve())})
        return
    typer.echo(f"{path}: {lab.title}.\nRead it, write {lab.function}, then: minivllm lab check {lab.name}")


def check(name: NameArgument, solution: SolutionOption = False, as_json: JsonOption = False) -> None:
    """Compare NAME.py of this folder with the engine, example by example. Exit code 0 when all are right, else 1."""
    from minivllm.labs import lab as labs
    from minivllm.labs import workshop
    from minivllm.labs.catalog import find

    lab = find(name)
    path = f"{lab.name}.py"
    started = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):  # what the student prints is no part of the answer
        if solution:
            function = lab.solution()
        else:
            function = workshop.function_in(workshop.read(Path(path)), path, lab.function)
        verdict = labs.check(lab, function, path)
    if as_json:
        print_json({**dataclasses.asdict(verdict), "passed": verdict.passed})
    else:
        _show(verdict, time.perf_counter() - started)
    if not verdict.passed:
        raise typer.Exit(1)


def _show(verdict: Verdict, seconds: float) -> None:
    """The result, as a page that fits a screen."""
    console = Console(highlight=False)
    count = f"{verdict.num_passed} of {verdict.num_examples} examples"
    if verdict.passed:
        console.print(Text(f"{verdict.name}: {count} are right, in {seconds:.1f} s.", style="bold green"))
        console.print(Text(f"The engine does it in {verdict.engine}."))
        return
    console.print(Text(f"{verdict.name}: {count} are right. The first that is not:", style="bold red"))
    table = Table(box=None, show_header=False, padding=(1, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in (
        ("example", verdict.example),
        ("call", verdict.call),
        ("expected", verdict.expected),
        ("got", verdict.got),
        ("think about", verdict.message if verdict.message != verdict.example else ""),
        ("engine", verdict.engine),
    ):
        if text:
            table.add_row(label, Text(text))
    console.print(table)
