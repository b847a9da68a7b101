"""Options that several commands share, each with its unit; the help shows the default behind it.

Called by the command modules beside it. Twin in vLLM: vllm/engine/arg_utils.py.
"""

from __future__ import annotations

from typing import Annotated

import typer

ENGINE, SAMPLING, SERVER, REMOTE = "Engine", "Sampling", "Server", "A server that runs already"

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="Folder, .gguf file or Hugging Face id. Not given: SmolLM2-135M-Instruct.",
        rich_help_panel=ENGINE,
    ),
]
DtypeOption = Annotated[
    str,
    typer.Option(
        metavar="NAME", help="auto (what the model's files say), float32 or bfloat16.", rich_help_panel=ENGINE
    ),
]
QuantizationOption = Annotated[
    str | None,
    typer.Option(
        "--quantization",
        "-q",
        metavar="NAME",
        help="Weights in few bits: int8, int4, gguf (as a .gguf file has them); int4+bf16, gguf+bf16: more memory, "
        "faster for many requests. Not given, or none: in the dtype.",
        rich_help_panel=ENGINE,
    ),
]
MaxModelLenOption = Annotated[
    int | None,
    typer.Option(
        metavar="TOKENS",
        help="Tokens of prompt and answer together. Not given: the model's own limit, at most 8192.",
        rich_help_panel=ENGINE,
    ),
]
BlockSizeOption = Annotated[int, typer.Option(metavar="TOKENS", help="Tokens per cache block.", rich_help_panel=ENGINE)]
MaxNumSeqsOption = Annotated[
    int, typer.Option(metavar="REQUESTS", help="Requests running at once.", rich_help_panel=ENGINE)
]
MaxBatchedTokensOption = Annotated[
    int,
    typer.Option(
        "--max-num-batched-tokens", metavar="TOKENS", help="Tokens computed in one step.", rich_help_panel=ENGINE
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="cpu, cuda (the first GPU), cuda:1, or auto: a GPU where there is one.",
        rich_help_panel=ENGINE,
    ),
]
UtilizationOption = Annotated[
    float | None,
    typer.Option(
        "--gpu-memory-utilization",
        metavar="SHARE",
        help="Share of the device's memory for weights and cache, in (0, 1]. Not given: 0.92 of a GPU; without one, "
        "0.25 of the RAM.",
        rich_help_panel=ENGINE,
    ),
]
CacheBytesOption = Annotated[
    int | None,
    typer.Option(
        "--kv-cache-memory-bytes",
        metavar="BYTES",
        help="Size of the cache in bytes. Not given: what --gpu-memory-utilization leaves.",
        rich_help_panel=ENGINE,
    ),
]
NumBlocksOption = Annotated[
    int | None,
    typer.Option(
        "--num-gpu-blocks-override",
        metavar="BLOCKS",
        help="Size of the cache in blocks; wins over bytes.",
        rich_help_panel=ENGINE,
    ),
]
BatchInvariantOption = Annotated[
    bool, typer.Option("--batch-invariant", help="Same bits whatever else runs; slower.", rich_help_panel=ENGINE)
]
SpeculativeOption = Annotated[
    str | None,
    typer.Option(
        metavar="JSON",
        help='Guess tokens ahead, e.g. {"method": "ngram", "num_speculative_tokens": 6}.',
        rich_help_panel=ENGINE,
    ),
]
SeedOption = Annotated[
    int | None, typer.Option(metavar="NUMBER", help="Makes sampling repeatable.", rich_help_panel=SAMPLING)
]
MaxTokensOption = Annotated[
    int | None,
    typer.Option(metavar="TOKENS", help="Longest answer. No default: the room that is left.", rich_help_panel=SAMPLING),
]
TemperatureOption = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        "-t",
        metavar="NUMBER",
        help="0 = always the likeliest token; at most 2.",
        rich_help_panel=SAMPLING,
    ),
]
TopPOption = Annotated[
    float | None,
    typer.Option(metavar="SHARE", help="Draw from the likeliest tokens of this total share.", rich_help_panel=SAMPLING),
]
TopKOption = Annotated[
    int | None,
    typer.Option(metavar="TOKENS", help="Draw from so many likeliest tokens; 0 = all.", rich_help_panel=SAMPLING),
]
StopOption = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="End the answer before this text; may be repeated.", rich_help_panel=SAMPLING),
]
RecordOption = Annotated[
    str | None,
    typer.Option(
        "--record",
        metavar="FILE",
        help="Write every request and every step to FILE, prompts and all, for `minivllm replay FILE`.",
        rich_help_panel=ENGINE,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
UrlOption = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Ask this OpenAI server, e.g. http://127.0.0.1:8000/v1, instead of loading a model.",
        rich_help_panel=REMOTE,
    ),
]
ClientKeyOption = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        metavar="KEY",
        help="The server's key. VLLM_API_KEY is read as well, and for https OPENAI_API_KEY.",
        rich_help_panel=REMOTE,
    ),
]
