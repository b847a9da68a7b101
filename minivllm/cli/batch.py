"""run-batch: an OpenAI batch file, answered without a server.

Twin in vLLM: vllm/entrypoints/cli/run_batch.py.

"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn

from minivllm.cli.answer_files import answer_sink
from minivllm.cli.options import (
    BatchInvariantOption,
    BlockSizeOption,
    CacheBytesOption,
    DeviceOption,
    DtypeOption,
    MaxBatchedTokensOption,
    MaxModelLenOption,
    MaxNumSeqsOption,
    ModelOption,
    NumBlocksOption,
    QuantizationOption,
    RecordOption,
    UtilizationOption,
)
from minivllm.cli.terminal import load, print_json, read_stdin, stderr
from minivllm.cli.tracing import recording
from minivllm.errors import ClientError


def run_batch(
    ctx: typer.Context,
    file: Annotated[
        Path | None, typer.Argument(help="OpenAI batch file, one JSON request per line; - reads standard input.")
    ] = None,
    input_file: Annotated[
        Path | None, typer.Option("--input-file", "-i", metavar="FILE", help="FILE, as vLLM has it.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "--output-file", "-o", metavar="FILE", help="Where answers go; default: stdout."),
    ] = None,
    model: ModelOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    quantization: QuantizationOption = None,
    max_model_len: MaxModelLenOption = None,
    max_num_seqs: MaxNumSeqsOption = 64,
    max_num_batched_tokens: MaxBatchedTokensOption = 1024,
    block_size: BlockSizeOption = 16,
    gpu_memory_utilization: UtilizationOption = None,
    kv_cache_memory_bytes: CacheBytesOption = None,
    num_gpu_blocks_override: NumBlocksOption = None,
    batch_invariant: BatchInvariantOption = False,
    record: RecordOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --output: print a JSON summary at the end.")] = False,
) -> None:
    """Answer a batch file. A bad line is reported in its place, the rest runs."""
    from minivllm.entrypoints.run_batch import run_batch_lines

    if file is not None and input_file is not None:
        raise typer.BadParameter("give the batch file once, as FILE or as --input-file")
    lines = _read_batch(file or input_file)
    llm = load(ctx, model)
    # Both are opened before hours of work, not after them.
    with answer_sink(output, sys.stdout) as sink, recording(llm.llm_engine, record):
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        with Progress(*columns, console=stderr()) as progress:
            task = progress.add_task("requests", total=None)

            def show(done: int, total: int) -> None:
                progress.update(task, completed=done, total=total)

            answers = run_batch_lines(llm.llm_engine, lines, show, sink.take)
        sink.finish(answers)
    num_failed = sum(answer["error"] is not None for answer in answers)
    summary = {"requests": len(answers), "failed": num_failed, "output": str(output) if output else None}
    if as_json and output is not None:
        print_json(summary)
    else:
        stderr().print(f"[dim]{len(answers)} requests, {num_failed} failed[/dim]")


def _read_batch(file: Path | None) -> list[str]:
    """The lines of a batch file. Bytes that are no UTF-8 spoil only their own line."""
    if file is None:
        raise typer.BadParameter("a batch file is missing: FILE or --input-file")
    if str(file) == "-":
        return read_stdin().split("\n")
    try:
        return file.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    except OSError as error:
        raise ClientError(f"cannot read {file}: {error.strerror}", parameter="FILE") from None
