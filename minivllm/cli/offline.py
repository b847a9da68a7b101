"""generate and embed: a model of our own, loaded for one answer.

Knows no server. Called by cli/__init__.py, and by completion.py (answer_text). Twin in vLLM: none (`vllm complete`
asks a server).
"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from minivllm.cli import options
from minivllm.cli.terminal import (
    as_json_object,
    load,
    print_json,
    print_stream,
    read_stdin,
    sampling_params,
    speed,
    stderr,
)
from minivllm.cli.tracing import recording


def generate(
    ctx: typer.Context,
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from standard input.")],
    model: options.ModelOption = None,
    max_tokens: options.MaxTokensOption = 64,
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
    batch_invariant: options.BatchInvariantOption = False,
    speculative_config: options.SpeculativeOption = None,
    record: options.RecordOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Continue a text, as it is: no chat template. The answer appears as it is generated."""
    answer_text(ctx, read_stdin() if prompt == "-" else prompt, as_json)


def answer_text(ctx: typer.Context, text: str, as_json: bool) -> None:
    """Load what the options say, and print how the text goes on."""
    llm = load(ctx, ctx.params["model"])
    params = sampling_params(ctx, llm)
    with recording(llm.llm_engine, ctx.params.get("record")):
        if as_json:
            print_json(as_json_object(llm.generate(text, params, use_tqdm=False)[0]))
            return
        output, seconds = print_stream(llm.stream(text, params))
    stderr().print(f"[dim]{speed(output, seconds)}[/dim]")


def embed(
    ctx: typer.Context,
    texts: Annotated[list[str], typer.Argument(help="One vector is printed for each.")],
    model: options.ModelOption = None,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    quantization: options.QuantizationOption = None,
    max_model_len: options.MaxModelLenOption = None,
    gpu_memory_utilization: options.UtilizationOption = None,
    kv_cache_memory_bytes: options.CacheBytesOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Turn texts into vectors of length 1. With two or more, also how similar they are."""
    llm = load(ctx, model)
    outputs = llm.embed(texts, use_tqdm=False)
    vectors = [output.outputs.embedding for output in outputs]
    if as_json:
        data = [{"index": i, "embedding": vector} for i, vector in enumerate(vectors)]
        print_json({"data": data, "usage": {"prompt_tokens": sum(len(o.prompt_token_ids) for o in outputs)}})
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
