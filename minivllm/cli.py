"""The command line: serve, generate, chat, embed, pull, plan, run-batch.

Every command takes --json for a machine-readable answer on standard output; progress and messages go to standard
error. Exit codes: 0 done, 1 an error, 2 wrong usage, 130 interrupted.
Knows no scheduler: it speaks to LLM. Twin in vLLM: vllm/entrypoints/cli/.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

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
    context_settings={"help_option_names": ["-h", "--help"]},
)
ENGINE, SAMPLING, SERVER = "Engine", "Sampling", "Server"

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
NumBlocksOption = Annotated[
    int | None,
    typer.Option("--num-gpu-blocks-override", help="Size of the cache, in blocks.", rich_help_panel=ENGINE),
]
SeedOption = Annotated[int | None, typer.Option(help="Makes sampling repeatable.", rich_help_panel=SAMPLING)]
TemperatureOption = Annotated[
    float | None, typer.Option("--temperature", "-t", help="0 = always the likeliest token.", rich_help_panel=SAMPLING)
]
TopPOption = Annotated[float | None, typer.Option(help="Nucleus sampling.", rich_help_panel=SAMPLING)]
TopKOption = Annotated[int | None, typer.Option(help="0 = off.", rich_help_panel=SAMPLING)]
StopOption = Annotated[
    list[str] | None, typer.Option(help="End the answer before this text; may be repeated.", rich_help_panel=SAMPLING)
]
Message = dict[str, Any]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
BatchInvariantOption = Annotated[
    bool, typer.Option("--batch-invariant", help="Same bits whatever else runs; slower.", rich_help_panel=ENGINE)
]


def _stderr() -> Console:
    return Console(stderr=True)


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


def _load(model: str | None, **settings: Any) -> Any:
    """An LLM; torch is imported only by the commands that compute."""
    from minivllm.llm import LLM

    with _stderr().status("loading the model"):
        return LLM(model, **{name: value for name, value in settings.items() if value is not None})


def _sampling_params(llm: Any, max_tokens: int | None, **overrides: Any) -> SamplingParams:
    """The model's own defaults, with what was given on the command line on top."""
    given = {name: value for name, value in overrides.items() if value is not None}
    return dataclasses.replace(llm.get_default_sampling_params(), max_tokens=max_tokens, **given)


def _json(value: dict[str, Any]) -> str:
    """One line. Half of a surrogate pair (an answer may repeat it from a request) has no UTF-8 form: escaped."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace").decode("utf-8")


def _print_json(value: dict[str, Any]) -> None:
    typer.echo(_json(value))


def _read_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ClientError(f"standard input must be UTF-8 text: {error}") from None


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
    stop: StopOption = None,
    dtype: DtypeOption = "auto",
    max_model_len: MaxModelLenOption = None,
    gpu_memory_utilization: UtilizationOption = 0.25,
    kv_cache_memory_bytes: CacheBytesOption = None,
    batch_invariant: BatchInvariantOption = False,
    as_json: JsonOption = False,
) -> None:
    """Continue a text, as it is: no chat template. The answer appears as it is generated."""
    text = _read_stdin() if prompt == "-" else prompt
    llm = _load(
        model,
        dtype=dtype,
        max_model_len=max_model_len,
        gpu_memory_utilization=gpu_memory_utilization,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
        batch_invariant=batch_invariant,
    )
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
    system: Annotated[str | None, typer.Option("--system", "--system-prompt", help="System message.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest reply.", rich_help_panel=SAMPLING)] = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    seed: SeedOption = None,
    stop: StopOption = None,
    dtype: DtypeOption = "auto",
    max_model_len: MaxModelLenOption = None,
    gpu_memory_utilization: UtilizationOption = 0.25,
    kv_cache_memory_bytes: CacheBytesOption = None,
    as_json: JsonOption = False,
) -> None:
    """Talk with the model. /reset forgets the conversation, /exit (or Ctrl-D) ends it, Ctrl-C stops a reply.

    Without MESSAGE every line of standard input is a turn; with --json every reply is one line.
    """
    llm = _load(
        model,
        dtype=dtype,
        max_model_len=max_model_len,
        gpu_memory_utilization=gpu_memory_utilization,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
    )
    params = _sampling_params(llm, max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, stop=stop)
    messages = [{"role": "system", "content": system}] if system else []
    if message is not None:
        _reply(llm, [*messages, {"role": "user", "content": message}], params, as_json)
    else:
        _converse(llm, messages, params, as_json)


def _converse(llm: Any, opening: list[Message], params: SamplingParams, as_json: bool) -> None:
    """Turn after turn. A refused or interrupted turn is forgotten, so that the conversation can go on."""
    if not as_json:
        _stderr().print(f"[dim]{escape(llm.llm_engine.config.model.name)}. /reset forgets, /exit ends.[/dim]")
    messages = list(opening)
    while (text := _ask()) is not None and text.strip() != "/exit":
        if text.strip() == "/reset":
            messages = list(opening)
        elif text.strip():
            question = {"role": "user", "content": text}
            try:
                answer = _reply(llm, [*messages, question], params, as_json)
            except ClientError as error:
                _stderr().print(f"\n[red]{escape(str(error))} (/reset starts afresh)[/red]")
            except KeyboardInterrupt:
                _stderr().print("\n[red]stopped[/red]")
            else:
                messages += [question, {"role": "assistant", "content": answer}]


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


def _reply(llm: Any, messages: list[Message], params: SamplingParams, as_json: bool) -> str:
    """Print the answer to a conversation, and return it."""
    if as_json:
        output = llm.chat(messages, params, use_tqdm=False)[0]
        _print_json(_as_json(output))
    else:
        output, seconds = _print_stream(llm.stream(messages, params))
        _stderr().print(f"[dim]{_speed(output, seconds)}[/dim]")
    return str(output.outputs[0].text)


@app.command()
def embed(
    texts: Annotated[list[str], typer.Argument(help="One vector is printed for each.")],
    model: ModelOption = None,
    dtype: DtypeOption = "auto",
    max_model_len: MaxModelLenOption = None,
    gpu_memory_utilization: UtilizationOption = 0.25,
    kv_cache_memory_bytes: CacheBytesOption = None,
    as_json: JsonOption = False,
) -> None:
    """Turn texts into vectors of length 1. With two or more, also how similar they are."""
    llm = _load(
        model,
        dtype=dtype,
        max_model_len=max_model_len,
        gpu_memory_utilization=gpu_memory_utilization,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
    )
    outputs = llm.embed(texts, use_tqdm=False)
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
        table.add_row(f"{i} {escape(texts[i][:40])}", *cells)
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
    num_gpu_blocks_override: NumBlocksOption = None,
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
        num_gpu_blocks_override=num_gpu_blocks_override,
    )
    if as_json:
        _print_json(result.as_dict())
        return
    table = Table(title=escape(result.name), show_header=False)
    for label, value, arithmetic in result.rows():
        table.add_row(label, f"[bold]{value}[/bold]", f"[dim]{arithmetic}[/dim]")
    Console().print(table)


@app.command()
def serve(
    model: Annotated[
        str | None, typer.Argument(help="Folder, .gguf file or Hugging Face id; nothing = the default model.")
    ] = None,
    model_option: ModelOption = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 = all.", rich_help_panel=SERVER)
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 = any free one.", rich_help_panel=SERVER)] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Clients must send this; may be repeated.",
            envvar=["MINIVLLM_API_KEY", "VLLM_API_KEY"],
            show_envvar=True,
            rich_help_panel=SERVER,
        ),
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            help="What clients call the model; may be repeated, the first is primary.", rich_help_panel=SERVER
        ),
    ] = None,
    shutdown_timeout: Annotated[
        float, typer.Option(help="Seconds that running answers may take to end.", rich_help_panel=SERVER)
    ] = 30.0,
    max_queue: Annotated[int, typer.Option(help="Requests waiting; more get 429.", rich_help_panel=SERVER)] = 256,
    max_body_bytes: Annotated[int, typer.Option(help="Longest request body.", rich_help_panel=SERVER)] = 2**20,
    allowed_origins: Annotated[
        str | None,
        typer.Option(help="Web pages that may call: words, a JSON list, or *.", rich_help_panel=SERVER),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Take the tokenizer from another model.", rich_help_panel=ENGINE)
    ] = None,
    dtype: DtypeOption = "auto",
    max_model_len: MaxModelLenOption = None,
    max_num_seqs: MaxNumSeqsOption = 64,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Tokens in one step.", rich_help_panel=ENGINE)] = 1024,
    block_size: BlockSizeOption = 16,
    gpu_memory_utilization: UtilizationOption = 0.25,
    kv_cache_memory_bytes: CacheBytesOption = None,
    num_gpu_blocks_override: NumBlocksOption = None,
    enable_prefix_caching: Annotated[
        bool, typer.Option(help="Reuse what prompts have in common.", rich_help_panel=ENGINE)
    ] = True,
    enable_chunked_prefill: Annotated[
        bool, typer.Option(help="A long prompt may take several steps.", rich_help_panel=ENGINE)
    ] = True,
    long_prefill_token_threshold: Annotated[
        int, typer.Option(help="Most tokens of one prompt in a step; 0 = no limit.", rich_help_panel=ENGINE)
    ] = 0,
    scheduling_policy: Annotated[str, typer.Option(help="fcfs or priority.", rich_help_panel=ENGINE)] = "fcfs",
    seed: Annotated[int, typer.Option(help="Of requests that bring none.", rich_help_panel=ENGINE)] = 0,
    batch_invariant: BatchInvariantOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the ready line as JSON.")] = False,
) -> None:
    """Answer over HTTP, as OpenAI's API does, until a signal comes."""
    if model is not None and model_option is not None:
        raise typer.BadParameter("give the model once, as MODEL or as --model")
    if max_queue < 0:
        raise typer.BadParameter(f"--max-queue must be 0 or more, got {max_queue}")
    origins = _origins(allowed_origins)

    from minivllm.engine.async_engine import AsyncEngine
    from minivllm.entrypoints.server import Server, ServerConfig
    from minivllm.entrypoints.server import serve as run_server

    config = ServerConfig(
        host=host,
        port=port,
        served_model_names=tuple(served_model_name or ()),
        api_keys=tuple(api_key or ()),
        allowed_origins=origins,
        max_body_bytes=max_body_bytes,
        shutdown_timeout_seconds=shutdown_timeout,
    )
    llm = _load(
        model or model_option,
        tokenizer=tokenizer,
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        block_size=block_size,
        gpu_memory_utilization=gpu_memory_utilization,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
        num_gpu_blocks_override=num_gpu_blocks_override,
        enable_prefix_caching=enable_prefix_caching,
        enable_chunked_prefill=enable_chunked_prefill,
        long_prefill_token_threshold=long_prefill_token_threshold,
        scheduling_policy=scheduling_policy,
        seed=seed,
        batch_invariant=batch_invariant,
    )

    def announce(server: Server) -> None:
        _announce(server, llm.llm_engine, as_json)

    raise typer.Exit(run_server(AsyncEngine(llm.llm_engine, max_queue), config, announce))


def _origins(text: str | None) -> tuple[str, ...]:
    """Words, or a JSON list as vLLM takes it."""
    if text is None or not text.strip().startswith("["):
        return tuple((text or "").replace(",", " ").split())
    try:
        origins = json.loads(text)
    except (ValueError, RecursionError):
        origins = None
    if not isinstance(origins, list) or not all(isinstance(origin, str) for origin in origins):
        raise typer.BadParameter(f"--allowed-origins must be words or a JSON list of strings, got {text[:100]!r}")
    return tuple(origins)


def _announce(server: Any, engine: Any, as_json: bool) -> None:
    """Tell that the server answers, and how to try it."""
    name, max_model_len = server.service.model_names[0], engine.config.model.max_model_len
    num_blocks, config = engine.plan.num_blocks - 1, server.service.config
    if as_json:
        facts = {"url": f"{server.url}/v1", "model": name, "max_model_len": max_model_len, "blocks": num_blocks}
        typer.echo(_json(facts))
        sys.stdout.flush()
        return
    typer.echo(f"minivllm ready: {server.url}/v1  model {name}  max_model_len {max_model_len}  KV blocks {num_blocks}")
    key = " -H 'Authorization: Bearer KEY'" if config.api_keys else ""
    is_pooling = engine.config.model.is_pooling
    path = "embeddings" if is_pooling else "chat/completions"
    content = {"input": "Hello"} if is_pooling else {"messages": [{"role": "user", "content": "Hello"}]}
    body = _json({"model": name, **content})
    typer.echo(f"try: curl {server.url}/v1/{path}{key} -H 'Content-Type: application/json' -d '{body}'")
    sys.stdout.flush()
    if config.host not in ("127.0.0.1", "::1", "localhost") and not config.api_keys:
        _stderr().print(f"[yellow]warning: {config.host} is open to everybody who can reach it: set --api-key[/yellow]")


@app.command("run-batch")
def run_batch(
    file: Annotated[
        Path | None, typer.Argument(help="OpenAI batch file, one JSON request per line; - reads standard input.")
    ] = None,
    input_file: Annotated[Path | None, typer.Option("--input-file", "-i", help="FILE, as vLLM has it.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "--output-file", "-o", help="Where answers go; default: stdout.")
    ] = None,
    model: ModelOption = None,
    dtype: DtypeOption = "auto",
    max_model_len: MaxModelLenOption = None,
    max_num_seqs: MaxNumSeqsOption = 64,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Tokens in one step.", rich_help_panel=ENGINE)] = 1024,
    block_size: BlockSizeOption = 16,
    gpu_memory_utilization: UtilizationOption = 0.25,
    kv_cache_memory_bytes: CacheBytesOption = None,
    num_gpu_blocks_override: NumBlocksOption = None,
    batch_invariant: BatchInvariantOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --output: print a JSON summary at the end.")] = False,
) -> None:
    """Answer a batch file. A bad line is reported in its place, the rest runs."""
    from minivllm.entrypoints.run_batch import run_batch_lines

    if file is not None and input_file is not None:
        raise typer.BadParameter("give the batch file once, as FILE or as --input-file")
    lines = _read_batch(file or input_file)
    llm = _load(
        model,
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        block_size=block_size,
        gpu_memory_utilization=gpu_memory_utilization,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
        num_gpu_blocks_override=num_gpu_blocks_override,
        batch_invariant=batch_invariant,
    )
    with _open_output(output) as sink:  # before hours of work, not after them
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        with Progress(*columns, console=_stderr()) as progress:
            task = progress.add_task("requests", total=None)

            def show(done: int, total: int) -> None:
                progress.update(task, completed=done, total=total)

            answers = run_batch_lines(llm.llm_engine, lines, show)
        sink.writelines(f"{_json(answer)}\n" for answer in answers)
    num_failed = sum(answer["error"] is not None for answer in answers)
    summary = {"requests": len(answers), "failed": num_failed, "output": str(output) if output else None}
    if as_json and output is not None:
        _print_json(summary)
    else:
        _stderr().print(f"[dim]{len(answers)} requests, {num_failed} failed[/dim]")


def _read_batch(file: Path | None) -> list[str]:
    """The lines of a batch file. Bytes that are no UTF-8 spoil only their own line."""
    if file is None:
        raise typer.BadParameter("a batch file is missing: FILE or --input-file")
    if str(file) == "-":
        return _read_stdin().split("\n")
    try:
        return file.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    except OSError as error:
        raise ClientError(f"cannot read {file}: {error.strerror}", parameter="FILE") from None


@contextlib.contextmanager
def _open_output(file: Path | None) -> Iterator[TextIO]:
    """The file, opened for writing, or standard output."""
    if file is None:
        yield sys.stdout
        return
    try:
        sink = file.open("w", encoding="utf-8")
    except OSError as error:
        raise ClientError(f"cannot write {file}: {error.strerror}", parameter="output") from None
    with sink:
        yield sink


def main() -> None:
    """Entry point: expected errors are one clear message and exit code 1, never a traceback."""
    try:
        app()
    except MiniVLLMError as error:
        console = _stderr()
        if console.is_terminal:
            console.print(Panel(Text(str(error)), title="error", border_style="red", title_align="left"))
        else:  # whole lines, for grep
            typer.echo(f"error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
