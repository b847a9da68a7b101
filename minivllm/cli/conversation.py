"""chat: turn after turn with a model that is loaded here or with a server, in a terminal or through a pipe.

    _converse      reads lines, keeps the messages, carries out /commands
    Speak          one turn: prints the answer to the messages and returns it; made by _local or _remote

Called by cli/__init__.py. Twin in vLLM: vllm/entrypoints/cli/openai.py.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from minivllm.cli import options, remote
from minivllm.cli.terminal import (
    as_json_object,
    load,
    print_json,
    print_stream,
    printable,
    sampling_fields,
    sampling_params,
    speed,
    stderr,
)
from minivllm.errors import ClientError
from minivllm.openai_client import RemoteError

Message = dict[str, Any]
Speak = Callable[[list[Message]], str]
COMMANDS = """/reset         forget the conversation, keep the system message
/system TEXT   another system message from now on; without TEXT: none
/save FILE     write the conversation as JSON, to a new file
/help          this
/exit          end, as Ctrl-D does; Ctrl-C stops an answer"""


def chat(
    ctx: typer.Context,
    message: Annotated[str | None, typer.Argument(help="Answer this one message and end.")] = None,
    url: options.UrlOption = None,
    api_key: options.ClientKeyOption = None,
    model: options.ModelOption = None,
    system: Annotated[
        str | None, typer.Option("--system", "--system-prompt", metavar="TEXT", help="System message.")
    ] = None,
    max_tokens: options.MaxTokensOption = None,
    temperature: options.TemperatureOption = None,
    top_p: options.TopPOption = None,
    top_k: options.TopKOption = None,
    seed: options.SeedOption = None,
    stop: options.StopOption = None,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    quantization: options.QuantizationOption = None,
    max_model_len: options.MaxModelLenOption = None,
    gpu_memory_utilization: options.UtilizationOption = None,
    kv_cache_memory_bytes: options.CacheBytesOption = None,
    speculative_config: options.SpeculativeOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Talk with a model. /help lists the commands, Ctrl-C stops an answer, Ctrl-D ends.

    With --url a server answers, and --model is its name there (not given: the first one that it serves). Without
    MESSAGE every line of standard input is a turn; with --json every reply is one line.
    """
    server = remote.connect(ctx)
    name, speak = _local(ctx, as_json) if server is None else _remote(ctx, server, as_json)
    opening = _opening(system)
    if message is not None:
        speak([*opening, {"role": "user", "content": message}])
        return
    if not as_json:
        stderr().print(f"[dim]{escape(name)}. /help lists the commands, /exit ends.[/dim]")
    _converse(speak, opening)


def _local(ctx: typer.Context, as_json: bool) -> tuple[str, Speak]:
    """A model that is loaded here: its name, and how it answers."""
    llm = load(ctx, ctx.params["model"])
    params = sampling_params(ctx, llm)

    def speak(messages: list[Message]) -> str:
        if as_json:
            output = llm.chat(messages, params, use_tqdm=False)[0]
            print_json(as_json_object(output))
        else:
            output, seconds = print_stream(llm.stream(messages, params))
            stderr().print(f"[dim]{speed(output, seconds)}[/dim]")
        return str(output.outputs[0].text)

    return llm.llm_engine.config.model.name, speak


def _remote(ctx: typer.Context, server: remote.Remote, as_json: bool) -> tuple[str, Speak]:
    """A model of a server: its name, and how it answers."""
    fields = sampling_fields(ctx)

    def speak(messages: list[Message]) -> str:
        return remote.print_answer(server.client.chat(messages, model=server.model, **fields), as_json)

    return f"{server.model} at {server.client.url}", speak


# ------------------------------------------------------------------ turns
def _converse(speak: Speak, opening: list[Message]) -> None:
    """Turn after turn. A refused or interrupted turn is forgotten, so that the conversation can go on."""
    messages = list(opening)
    while (text := _ask()) is not None and text.strip() != "/exit":
        if re.fullmatch(r"/\w*(\s.*)?", text.strip()):  # but /etc/hosts is no command
            messages = _command(text.strip(), messages)
            continue
        if not text.strip():
            continue
        question = {"role": "user", "content": text}
        try:
            answer = speak([*messages, question])
        except ClientError as error:
            stderr().print(f"\n[red]{escape(str(error))} (/reset starts afresh)[/red]")
        except RemoteError as error:
            stderr().print(f"\n[red]{escape(str(error))}[/red]")
        except KeyboardInterrupt:
            stderr().print("\n[red]stopped[/red]")
        else:
            messages += [question, {"role": "assistant", "content": answer}]


def _opening(system: str | None) -> list[Message]:
    return [{"role": "system", "content": system}] if system else []


def _command(text: str, messages: list[Message]) -> list[Message]:
    """Carry out /something; returns the messages that the conversation goes on with."""
    name, _, argument = text.partition(" ")
    opening = [message for message in messages[:1] if message["role"] == "system"]
    if name == "/reset":
        return opening
    if name == "/system":
        return [*_opening(argument.strip()), *messages[len(opening) :]]
    if name == "/save" and argument.strip():
        _save(Path(argument.strip()).expanduser(), messages)
    elif name == "/help":
        stderr().print(escape(COMMANDS))
    else:
        missing = "needs the name of a file" if name == "/save" else "is no command (/help lists them)"
        stderr().print(f"[red]{escape(name)} {missing}[/red]")
    return messages


def _save(file: Path, messages: list[Message]) -> None:
    """What was said, in the form that a request has. Never over a file that is there."""
    try:
        with file.open("x", encoding="utf-8") as sink:
            sink.write(printable(json.dumps({"messages": messages}, ensure_ascii=False, indent=2)) + "\n")
    except OSError as error:
        stderr().print(f"[red]cannot write {escape(str(file))}: {error.strerror}[/red]")
    else:
        stderr().print(f"[dim]{len(messages)} messages are in {escape(str(file))}[/dim]")


def _ask() -> str | None:
    """The next line of the user; None at the end of the input."""
    try:
        if sys.stdin.isatty():
            return Console(stderr=True).input("[bold]> [/bold]")
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    except (EOFError, KeyboardInterrupt):
        return None
    except UnicodeDecodeError as error:
        raise ClientError(f"standard input must be UTF-8 text: {error}") from None
