"""The help of a command: options in panels, each with all its names, its unit and its default.

    --max-model-len TOKENS
        Tokens of prompt and answer together. Not given: the model's own limit, at most 8192.

An option's name is never cut, however narrow the terminal: typer's own table of five columns cuts those that are
longer than 18 characters at 80 columns. Knows no command. Called by settings.py (the class of all commands).
Twin in vLLM: none (argparse prints it).
"""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group
from rich.padding import Padding
from rich.panel import Panel
from rich.text import Text


def print_help(ctx: Any) -> None:
    """Usage, what the command does, and its parameters, to standard output."""
    console, parameters = Console(), ctx.command.get_params(ctx)
    arguments = [_place(parameter) for parameter in parameters if parameter.param_type_name == "argument"]
    console.print(Text(f"\n Usage: {' '.join([ctx.command_path, '[OPTIONS]', *arguments])}\n", style="bold"))
    console.print(Padding(Text(_unwrapped(ctx.command.help or "")), (0, 1)))
    console.print()
    panels: dict[str, list[Any]] = {"Arguments": []}
    for parameter in parameters:
        is_argument = parameter.param_type_name == "argument"
        name = parameter.rich_help_panel or ("Arguments" if is_argument else "Options")
        if not getattr(parameter, "hidden", False):
            panels.setdefault(name, []).append(parameter)
    for name, members in panels.items():
        if members:
            lines = [line for parameter in members for line in (_heading(parameter), _explanation(parameter))]
            console.print(Panel(Group(*lines), title=name, title_align="left", border_style="dim"))


def _place(argument: Any) -> str:
    """NAME, [NAME] when it may be left out, NAME... when it may be repeated."""
    name = f"{argument.name.upper()}{'...' if argument.nargs == -1 else ''}"
    return name if argument.required else f"[{name}]"


def _unwrapped(text: str) -> str:
    """Paragraphs without the line ends of the source."""
    return "\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def _heading(parameter: Any) -> Text:
    """--name, -n, --no-name UNIT  [default: x]"""
    if parameter.param_type_name == "argument":
        return Text(parameter.name.upper(), style="bold cyan")
    names = sorted((*parameter.opts, *parameter.secondary_opts), key=lambda name: not name.startswith("--"))
    text = Text(", ".join(names), style="bold cyan")
    if not parameter.is_flag:
        text.append(f" {parameter.metavar or 'VALUE'}", style="yellow")
    default = parameter.default
    if parameter.is_flag and parameter.secondary_opts:
        default = "on" if default else "off"
    if not (default is None or default is False or default == [] or callable(default)):
        text.append(f"  [default: {default}]", style="dim")
    return text


def _explanation(parameter: Any) -> Padding:
    return Padding(Text(parameter.help or "", overflow="fold"), (0, 0, 0, 4))
