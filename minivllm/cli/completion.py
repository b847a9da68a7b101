"""complete: a text continued as it is, by a model that is loaded here or by a server.

Called by cli/__init__.py. Twin in vLLM: vllm/entrypoints/cli/openai.py (a server only).
"""

from __future__ import annotations

from typing import Annotated

import typer

from minivllm.cli import options, remote
from minivllm.cli.offline import answer_text
from minivllm.cli.terminal import read_stdin, sampling_fields


def complete(
    ctx: typer.Context,
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from standard input.")],
    url: options.UrlOption = None,
    api_key: options.ClientKeyOption = None,
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
    as_json: options.JsonOption = False,
) -> None:
    """Continue a text, as it is: no chat template. With --url a server does it, and --model is its name there."""
    server = remote.connect(ctx)
    text = read_stdin() if prompt == "-" else prompt
    if server is None:
        answer_text(ctx, text, as_json)
    else:
        pieces = server.client.complete(text, model=server.model, **sampling_fields(ctx))
        remote.print_answer(pieces, as_json)
