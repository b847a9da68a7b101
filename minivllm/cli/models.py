"""pull and plan: what can be said about a model before its weights are read.

Twin in vLLM: none.

"""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from minivllm.cli.options import (
    BlockSizeOption,
    CacheBytesOption,
    DtypeOption,
    JsonOption,
    MaxModelLenOption,
    MaxNumSeqsOption,
    NumBlocksOption,
    QuantizationOption,
    UtilizationOption,
)
from minivllm.cli.terminal import print_json


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
        print_json({"name": source.name, "path": str(source.path), "kind": source.kind, "was_there": was_there})
        return
    how = "was there already" if was_there else f"fetched in {seconds:.1f} s"
    typer.echo(f"{source.name} ({source.kind}): {source.path} ({how})")


def plan(
    model: Annotated[str | None, typer.Argument(help="Folder, .gguf file or Hugging Face id.")] = None,
    max_model_len: MaxModelLenOption = None,
    block_size: BlockSizeOption = 16,
    max_num_seqs: MaxNumSeqsOption = 64,
    gpu_memory_utilization: UtilizationOption = None,
    kv_cache_memory_bytes: CacheBytesOption = None,
    num_gpu_blocks_override: NumBlocksOption = None,
    dtype: DtypeOption = "auto",
    quantization: QuantizationOption = None,
    as_json: JsonOption = False,
) -> None:
    """What will fit: weights, bytes per token, blocks, concurrency - with the arithmetic, without loading weights."""
    from minivllm.engine.planning import plan_engine

    result = plan_engine(
        model,
        dtype=dtype,
        quantization=quantization,
        max_model_len=max_model_len,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        gpu_memory_utilization=gpu_memory_utilization,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
        num_gpu_blocks_override=num_gpu_blocks_override,
    )
    if as_json:
        print_json(result.as_dict())
        return
    table = Table(title=escape(result.name), show_header=False)
    for label, value, arithmetic in result.rows():
        table.add_row(label, f"[bold]{value}[/bold]", f"[dim]{arithmetic}[/dim]")
    Console().print(table)
