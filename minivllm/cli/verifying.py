"""verify and diff: is the engine, or a server, right?

Knows no comparison (minivllm/verify does). Called by cli/__init__.py. Twin in vLLM: none.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from minivllm.cli.options import ClientKeyOption, JsonOption
from minivllm.cli.terminal import print_json, stderr

if TYPE_CHECKING:
    from minivllm.verify.records import Report

COLOURS = (("ok", "green"), ("fail", "bold red"), ("tie", "yellow"), ("not run", "dim"))

TokensOption = Annotated[int, typer.Option(metavar="TOKENS", help="Tokens of a greedy run.")]
HtmlOption = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a page with plots.")]
JunitOption = Annotated[Path | None, typer.Option("--junit", metavar="FILE", help="Write JUnit's XML, for a CI.")]
JsonFileOption = Annotated[Path | None, typer.Option("--json-file", metavar="FILE", help="Write what --json prints.")]
ServerDtypeOption = Annotated[
    str,
    typer.Option(
        "--server-dtype",
        metavar="NAME",
        help="What the server computes in: float32, bfloat16, int8 or int4. Decides the tolerances.",
    ),
]


def verify(
    model: Annotated[
        str | None, typer.Argument(help="Folder, .gguf file or Hugging Face id; nothing = the default model.")
    ] = None,
    against_url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Compare this OpenAI server with the model, e.g. http://127.0.0.1:8000/v1."),
    ] = None,
    api_key: ClientKeyOption = None,
    server_dtype: ServerDtypeOption = "float32",
    max_tokens: TokensOption = 24,
    no_invariance: Annotated[
        bool, typer.Option("--no-invariance", help="Leave out the table of what must not change an answer: faster.")
    ] = False,
    html: HtmlOption = None,
    junit: JunitOption = None,
    json_file: JsonFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare the engine, or a server, with transformers in float32. Exit code 1: they differ, and where."""
    from minivllm.verify.remote import LIMITS, verify_server
    from minivllm.verify.verify import verify_model

    _check_dtype(server_dtype, LIMITS)
    with stderr().status("starting") as status:

        def say(text: str) -> None:
            status.update(text)

        if against_url is None:
            report = verify_model(model, max_tokens=max_tokens, invariance=not no_invariance, say=say)
        else:
            report = verify_server(
                against_url, model, api_key=api_key, server_dtype=server_dtype, max_tokens=max_tokens, say=say
            )
    _deliver(report, html, junit, json_file, as_json)


def diff(
    url_a: Annotated[str, typer.Argument(metavar="URL_A", help="An OpenAI server, whose answers count as right.")],
    url_b: Annotated[str, typer.Argument(metavar="URL_B", help="The server that is compared with it.")],
    api_key: ClientKeyOption = None,
    server_dtype: ServerDtypeOption = "float32",
    max_tokens: TokensOption = 24,
    html: HtmlOption = None,
    junit: JunitOption = None,
    json_file: JsonFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare two servers: log-probabilities of the same texts, and greedy answers. Exit code 1: they differ."""
    from minivllm.verify.remote import LIMITS, diff_servers

    _check_dtype(server_dtype, LIMITS)
    with stderr().status("asking both servers"):
        report = diff_servers(url_a, url_b, api_key=api_key, server_dtype=server_dtype, max_tokens=max_tokens)
    _deliver(report, html, junit, json_file, as_json)


def _check_dtype(name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise typer.BadParameter(f"--server-dtype must be one of {', '.join(known)}, got {name!r}")


def _deliver(report: Report, html: Path | None, junit: Path | None, json_file: Path | None, as_json: bool) -> None:
    """Files, then the terminal, then the exit code."""
    from minivllm.cli.terminal import to_json
    from minivllm.verify.html import page

    for path, text in ((html, page), (junit, lambda r: r.as_junit()), (json_file, lambda r: to_json(r.as_dict()))):
        if path is not None:
            path.write_text(text(report), encoding="utf-8", errors="backslashreplace")
    if as_json:
        print_json(report.as_dict())
    else:
        print_report(report, Console())
    if report.failures:
        raise typer.Exit(1)


def print_report(report: Report, console: Console) -> None:
    """The verdict, the findings, and a table of all checks."""
    colours = dict(COLOURS)
    table = Table("part", "check", "", "found", "limit", "", box=None, pad_edge=False)
    for check in report.checks:
        status = f"[{colours[check.status]}]{check.status}[/]"
        table.add_row(*map(escape, (check.section, check.name)), status, *map(escape, (check.value, check.limit)),
                      f"[dim]{escape(check.detail)}[/dim]")  # fmt: skip
    console.print(f"[bold]{escape(report.subject)}[/bold]")
    console.print(table)
    for finding in report.findings:
        console.print(f"[bold red]{escape(finding.kind)}[/]{escape(str(finding).removeprefix(finding.kind))}")
    colour = "red" if report.failures else "green"
    console.print(f"[bold {colour}]{escape(report.verdict)}[/]")
