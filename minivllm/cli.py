"""The command line: generate, chat, embed, pull, plan, run-batch.

Every command takes --json for a machine-readable answer on standard output; progress and messages go to standard
error. Knows no scheduler: it speaks to LLM. Twin in vLLM: vllm/entrypoints/cli/.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from minivllm.errors import ClientError, MiniVLLMError
from minivllm.outputs import RequestOutput
from minivllm.sampling_params import SamplingParams
from minivllm.version import __version__

app = typer.Typer(
    name="minivllm",
    help="A readable LLM inference engine. Without --model every command uses SmolLM2-135M-Instruct.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
ENGINE, SAMPLING = "Engine", "Sampling"

ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="Folder, .gguf file or Hugging Face id.", rich_help_panel=ENGINE)
]
DtypeOption = Annotated[str, typer.Option(help="auto, float32 or bfloat16.", rich_help_panel=ENGINE)]
MaxModelLenOption = Annotated[
    int | None, typer.Option(help="Tokens of prompt and output together.", rich_help_panel=ENGINE)
]
BlockSizeOption = Annotated[int, typer.Option(help="Tokens per cache block.", rich_help_panel=ENGINE)]
MaxNumSeqsOption = Annotated[int, typer.Option(help="Requests running at once.", rich_help_panel=ENGINE)]
UtilizationOption = Annotated[
    float,
    typer.Option("--gpu-memory-utilization", help="Share of the memory for weights and cache.", rich_help_panel=ENGINE),
]
CacheBytesOption = Annotated[
    int | None, typer.Option("--kv-cache-memory-bytes", help="Size of the cache, in bytes.", rich_help_panel=ENGINE)
]
SeedOption = Annotated[int | None, typer.Option(help="Makes sampling repeatable.", rich_help_panel=SAMPLING)]
TemperatureOption = Annotated[
    float | None, typer.Option("--temperature", "-t", help="0 = always the likeliest token.", rich_help_panel=SAMPLING)
]
TopPOption = Annotated[float | None, typer.Option(help="Nucleus sampling.", rich_help_panel=SAMPLING)]
TopKOption = Annotated[int | None, typer.Option(help="0 = off.", rich_help_panel=SAMPLING)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
BatchInvariantOption = Annotated[
    bool, typer.Option("--batch-invariant", help="Same bits whatever else runs; slower.", rich_help_panel=ENGINE)
]


def _stderr() -> Console:
    return Console(stderr=True)


def _print_version(value: bool) -> None:
    if value:
        parts = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "triton", "transformers")]
        typer.echo(f"minivllm {__version__} ({', '.join(parts)})")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Versions, then exit.")
    ] = False,
) -> None:
    """A readable LLM inference engine."""


def _load(model: str | None, **settings: Any) -> Any:
    """An LLM; torch is imported only by the commands that compute."""
    from minivllm.llm import LLM

    with _stderr().status("loading the model"):
        return LLM(model, **{name: value for name, value in settings.items() if value is not None})


def _sampling_params(llm: Any, max_tokens: int | None, **overrides: Any) -> SamplingParams:
    """The model's own defaults, with what was given on the command line on top."""
    given = {name: value for name, value in overrides.items() if value is not None}
    return dataclasses.replace(llm.get_default_sampling_params(), max_tokens=max_tokens, **given)


def _print_json(value: dict[str, Any]) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False))


def _print_stream(outputs: Any) -> tuple[RequestOutput, float]:
    """Write a growing answer to standard output; returns the last output and the seconds after the first token."""
    shown, started, last = 0, None, None
    for last in outputs:
        started = started or time.perf_counter()
        text = last.outputs[0].text
        sys.stdout.write(text[shown:])
        sys.stdout.flush()
        shown = len(text)
    sys.stdout.write("\n")
    assert last is not None
    return last, time.perf_counter() - (started or time.perf_counter())


def _speed(output: RequestOutput, decode_seconds: float) -> str:
    """What a reader wants to know after a reply."""
    completion = output.outputs[0]
    num_tokens = len(completion.token_ids)
    speed = (num_tokens - 1) / decode_seconds if num_tokens > 1 and decode_seconds > 0 else 0.0
    first = output.metrics["first_token_time"] - output.metrics["arrival_time"]
    return (
        f"{num_tokens} tokens, {speed:.1f} tok/s, first token after {first:.2f} s, "
        f"{output.num_cached_tokens} of {len(output.prompt_token_ids)} prompt tokens from the cache, "
        f"ended by {completion.finish_reason}"
    )


def _as_json(output: RequestOutput) -> dict[str, Any]:
    completion = output.outputs[0]
    return {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "usage": {
            "prompt_tokens": len(output.prompt_token_ids),
            "completion_tokens": len(completion.token_ids),
            "cached_tokens": output.num_cached_tokens,
        },
        "metrics": output.metrics,
    }


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from standard input.")],
    model: ModelOption = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.", rich_help_panel=SAMPLING)] = 64,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    seed: SeedOption = None,
    stop: Annotated[list[str] | None, typer.Option(help="End the answer here.", rich_help_panel=SAMPLING)] = None,
    dtype: DtypeOption = "auto",
    max_model_len: MaxModelLenOption = None,
    batch_invariant: BatchInvariantOption = False,
    as_json: JsonOption = False,
) -> None:
    """Continue a text, as it is: no chat template. The answer appears as it is generated."""
    text = sys.stdin.read() if prompt == "-" else prompt
    llm = _load(model, dtype=dtype, max_model_len=max_model_len, batch_invariant=batch_invariant)
    params = _sampling_params(llm, max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, stop=stop)
    if as_json:
        _print_json(_as_json(llm.generate(text, params, use_tqdm=False)[0]))
        return
    output, seconds = _print_stream(llm.stream(text, params))
    _stderr().print(f"[dim]{_speed(output, seconds)}[/dim]")


@app.command()
def chat(
    message: Annotated[str | None, typer.Argument(help="Answer this one message and end.")] = None,
    model: ModelOption = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest reply.", rich_help_panel=SAMPLING)] = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    seed: SeedOption = None,
    dtype: DtypeOption = "auto",
    max_model_len: MaxModelLenOption = None,
    as_json: JsonOption = False,
) -> None:
    """Talk with the model. /reset forgets the conversation, /exit (or Ctrl-D) ends it, Ctrl-C stops a reply."""
    llm = _load(model, dtype=dtype, max_model_len=max_model_len)
    params = _sampling_params(llm, max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    if message is None and not as_json:
        _stderr().print(f"[dim]{llm.llm_engine.config.model.name}. /reset forgets, /exit ends.[/dim]")
    while True:
        text = message if message is not None else _ask()
        if text is None or text.strip() == "/exit":
            return
        if text.strip() == "/reset":
            messages = list(opening)
            continue
        if text.strip():
            _reply(llm, messages, text, params, as_json)
        if message is not None:
            return


def _ask() -> str | None:
    """The next line of the user; None at the end of the input."""
    try:
        if sys.stdin.isatty():
            return Console(stderr=True).input("[bold]> [/bold]")
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    except (EOFError, KeyboardInterrupt):
        return None


def _reply(llm: Any, messages: list[dict[str, Any]], text: str, params: SamplingParams, as_json: bool) -> None:
    """One turn. A refused or interrupted turn is forgotten, so that the conversation can go on."""
    messages.append({"role": "user", "content": text})
    try:
        if as_json:
            output = llm.chat(list(messages), params, use_tqdm=False)[0]
            _print_json(_as_json(output))
        else:
            output, seconds = _print_stream(llm.stream(list(messages), params))
            _stderr().print(f"[dim]{_speed(output, seconds)}[/dim]")
    except (ClientError, KeyboardInterrupt) as error:
        messages.pop()
        hint = "stopped" if isinstance(error, KeyboardInterrupt) else f"{error} (/reset starts afresh)"
        _stderr().print(f"\n[red]{hint}[/red]")
        return
    messages.append({"role": "assistant", "content": output.outputs[0].text})


@app.command()
def embed(
    texts: Annotated[list[str], typer.Argument(help="One vector is printed for each.")],
    model: ModelOption = None,
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Turn texts into vectors of length 1. With two or more, also how similar they are."""
    outputs = _load(model, dtype=dtype).embed(texts, use_tqdm=False)
    vectors = [output.outputs.embedding for output in outputs]
    if as_json:
        data = [{"index": i, "embedding": vector} for i, vector in enumerate(vectors)]
        _print_json({"data": data, "usage": {"prompt_tokens": sum(len(o.prompt_token_ids) for o in outputs)}})
        return
    for text, vector in zip(texts, vectors, strict=True):
        head = ", ".join(f"{value:+.4f}" for value in vector[:6])
        typer.echo(f"{text!r}: [{head}, ...] ({len(vector)} numbers)")
    if len(vectors) > 1:
        _print_similarity(texts, vectors)


def _print_similarity(texts: list[str], vectors: list[list[float]]) -> None:
    table = Table("cosine", *(str(i) for i in range(len(texts))))
    for i, left in enumerate(vectors):
        cells = [f"{sum(x * y for x, y in zip(left, right, strict=True)):.3f}" for right in vectors]
        table.add_row(f"{i} {texts[i][:40]}", *cells)
    Console().print(table)


@app.command()
def pull(
    model: Annotated[str | None, typer.Argument(help="A Hugging Face id; nothing = the default model.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Fetch a model into the cache folder, check it, and say where it lies."""
    from minivllm.hub import pull as fetch

    started = time.perf_counter()
    source, was_there = fetch(model, show_progress=not as_json)
    seconds = time.perf_counter() - started
    if as_json:
        _print_json({"name": source.name, "path": str(source.path), "kind": source.kind, "was_there": was_there})
        return
    how = "was there already" if was_there else f"fetched in {seconds:.1f} s"
    typer.echo(f"{source.name} ({source.kind}): {source.path} ({how})")


@app.command()
def plan(
    model: Annotated[str | None, typer.Argument(help="Folder, .gguf file or Hugging Face id.")] = None,
    max_model_len: MaxModelLenOption = None,
    block_size: BlockSizeOption = 16,
    max_num_seqs: MaxNumSeqsOption = 64,
    gpu_memory_utilization: UtilizationOption = 0.25,
    kv_cache_memory_bytes: CacheBytesOption = None,
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """What will fit: weights, bytes per token, blocks, concurrency - with the arithmetic, without loading weights."""
    from minivllm.engine.planning import plan_engine

    result = plan_engine(
        model,
        dtype=dtype,
        max_model_len=max_model_len,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        gpu_memory_utilization=gpu_memory_utilization,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
    )
    if as_json:
        _print_json(result.as_dict())
        return
    table = Table(title=result.name, show_header=False)
    for label, value, arithmetic in result.rows():
        table.add_row(label, f"[bold]{value}[/bold]", f"[dim]{arithmetic}[/dim]")
    Console().print(table)


@app.command("run-batch")
def run_batch(
    file: Annotated[Path, typer.Argument(help="OpenAI batch file, one JSON request per line.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where answers go; default: stdout.")] = None,
    model: ModelOption = None,
    dtype: DtypeOption = "auto",
    max_model_len: MaxModelLenOption = None,
    max_num_seqs: MaxNumSeqsOption = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON summary at the end.")] = False,
) -> None:
    """Answer a batch file. A bad line is reported in its place, the rest runs."""
    from minivllm.entrypoints.run_batch import run_batch_lines

    try:
        lines = file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError as error:
        raise ClientError(f"cannot read {file}: {error.strerror}", parameter="FILE") from None
    llm = _load(model, dtype=dtype, max_model_len=max_model_len, max_num_seqs=max_num_seqs)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, console=_stderr()) as progress:
        task = progress.add_task("requests", total=None)
        answers = run_batch_lines(llm.llm_engine, lines, lambda done, total: progress.update(task, completed=done, total=total))
    text = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
    num_failed = sum(answer["error"] is not None for answer in answers)
    if output is None:
        sys.stdout.write(text)
    else:
        output.write_text(text, encoding="utf-8")
    summary = {"requests": len(answers), "failed": num_failed, "output": str(output) if output else None}
    if as_json and output is not None:
        _print_json(summary)
    else:
        _stderr().print(f"[dim]{len(answers)} requests, {num_failed} failed[/dim]")


def main() -> None:
    """Entry point: expected errors are one clear message and exit code 1, never a traceback."""
    try:
        app()
    except MiniVLLMError as error:
        _stderr().print(Panel(str(error), title="error", border_style="red", title_align="left"))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
