"""serve: an OpenAI server around one model.

Settings are checked before a model is looked for. Knows where no setting comes from (settings.py does), and no HTTP.
Called by cli/__init__.py. Twin in vLLM: vllm/entrypoints/cli/serve.py.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import typer

from minivllm.cli import options, ready, settings
from minivllm.cli import serve_options as only
from minivllm.cli.terminal import load, speculative_config, stderr
from minivllm.cli.tracing import recording
from minivllm.config import DeviceConfig, ParallelConfig, SpeculativeConfig
from minivllm.errors import ConfigError

# What serve hands on to ServerConfig: field -> option.
SAME_NAME = (
    *("host", "port", "allowed_origins", "max_body_bytes", "max_logprobs", "tool_call_parser", "reasoning_parser"),
    *("protect_metrics", "log_requests"),
)
SERVER_SETTINGS: Mapping[str, str] = MappingProxyType(
    {
        **dict(zip(SAME_NAME, SAME_NAME, strict=True)),
        "served_model_names": "served_model_name",
        "served_embedding_model_names": "served_embedding_model_name",
        "api_keys": "api_key",
        "shutdown_timeout_seconds": "shutdown_timeout",
        "client_timeout_seconds": "client_timeout",
    }
)
# Flags of vLLM that ask for nothing, or for what is so anyway -> what is so.
WITHOUT_EFFECT: Mapping[str, str] = MappingProxyType(
    {
        "use_v2_block_manager": "deprecated: there is only one block manager",
        "max_parallel_loading_workers": "deprecated: weights are read by one thread",
        "swap_space": "deprecated: a preempted request is computed again, not swapped",
        "enable_auto_tool_choice": "tools need no flag",
        "trust_remote_code": "code of a model folder never runs",
        "disable_log_requests": "deprecated: requests are not logged",
    }
)


def serve(
    ctx: typer.Context,
    model: only.ModelArgument = None,
    model_option: options.ModelOption = None,
    config: only.ConfigOption = None,
    print_config: only.PrintConfigOption = False,
    as_json: only.JsonReadyOption = False,
    host: only.HostOption = "127.0.0.1",
    port: only.PortOption = 8000,
    api_key: only.ApiKeysOption = None,
    served_model_name: only.ServedNamesOption = None,
    embedding_model: only.EmbeddingModelOption = None,
    served_embedding_model_name: only.ServedEmbeddingNamesOption = None,
    shutdown_timeout: only.ShutdownOption = 30.0,
    client_timeout: only.ClientTimeoutOption = 30.0,
    max_queue: only.MaxQueueOption = 256,
    max_body_bytes: only.MaxBodyOption = 2**20,
    max_logprobs: only.MaxLogprobsOption = 20,
    allowed_origins: only.OriginsOption = None,
    protect_metrics: only.ProtectMetricsOption = False,
    log_level: only.LogLevelOption = "info",
    log_format: only.LogFormatOption = "text",
    access_log: only.AccessLogOption = True,
    log_requests: only.LogRequestsOption = False,
    record: options.RecordOption = None,
    tokenizer: only.TokenizerOption = None,
    chat_template: only.ChatTemplateOption = None,
    tool_call_parser: only.ToolParserOption = "auto",
    reasoning_parser: only.ReasoningParserOption = "auto",
    generation_config: only.GenerationConfigOption = "auto",
    quantization: options.QuantizationOption = None,
    speculative_config: options.SpeculativeOption = None,
    seed: only.ServeSeedOption = 0,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    enforce_eager: only.EagerOption = False,
    max_model_len: options.MaxModelLenOption = None,
    max_num_seqs: options.MaxNumSeqsOption = 64,
    max_num_batched_tokens: options.MaxBatchedTokensOption = 1024,
    block_size: options.BlockSizeOption = 16,
    gpu_memory_utilization: options.UtilizationOption = None,
    kv_cache_memory_bytes: options.CacheBytesOption = None,
    num_gpu_blocks_override: options.NumBlocksOption = None,
    enable_prefix_caching: only.PrefixCachingOption = True,
    enable_chunked_prefill: only.ChunkedPrefillOption = True,
    long_prefill_token_threshold: only.LongPrefillOption = 0,
    scheduling_policy: only.PolicyOption = "fcfs",
    batch_invariant: options.BatchInvariantOption = False,
    tensor_parallel_size: only.TensorParallelOption = 1,
    pipeline_parallel_size: only.PipelineParallelOption = 1,
    data_parallel_size: only.DataParallelOption = 1,
    distributed_executor_backend: only.ExecutorBackendOption = "mp",
    use_v2_block_manager: only.BlockManagerOption = False,
    max_parallel_loading_workers: only.LoadingWorkersOption = None,
    swap_space: only.SwapSpaceOption = None,
    enable_auto_tool_choice: only.ToolChoiceOption = False,
    trust_remote_code: only.TrustCodeOption = False,
    disable_log_requests: only.QuietOption = False,
) -> None:
    """Answer over HTTP, as OpenAI's API does, until a signal comes.

    Every option is also a variable, --max-model-len is MINIVLLM_MAX_MODEL_LEN, and a key of the --config file.
    The command line wins over the environment, the environment over the file.
    """
    _warn(ctx)
    if print_config:
        settings.print_config(ctx, as_json)
        _say_whether_it_would_start(ctx)
        return
    server_config = checked(ctx)

    from minivllm.engine.async_engine import AsyncEngine
    from minivllm.entrypoints.logs import logging_to
    from minivllm.entrypoints.server import Engines, Server
    from minivllm.entrypoints.server import serve as run_server
    from minivllm.worker.ranks import is_another_rank
    from minivllm.worker.ray_actors import connect_to_ray

    if is_another_rank():  # of torchrun: it computes for rank 0 until that ends, and serves nobody
        load_engines(ctx)

    if tensor_parallel_size > 1 and distributed_executor_backend == "ray":
        connect_to_ray(tensor_parallel_size)  # here: Ray ends with the thread that has started it

    def start() -> Engines:
        generating, embedding = load_engines(ctx)
        stack.enter_context(recording(generating, record))
        engine = AsyncEngine(generating, max_queue)
        return engine if embedding is None else (engine, AsyncEngine(embedding, max_queue))

    def announce(server: Server) -> None:
        ready.announce(server, as_json)

    with logging_to(sys.stderr, log_level, log_format, access_log), contextlib.ExitStack() as stack:
        raise typer.Exit(run_server(start, server_config, announce))


def load_engines(ctx: typer.Context) -> tuple[Any, Any]:
    """The generating model's engine, and the embedding model's or None. The second one is loaded first: it says what it
    needs, and the first one's cache takes the rest."""
    from minivllm.engine.beside import load_embedding_engine, memory_bytes

    name = ctx.params["embedding_model"]
    if name is None:
        return load(ctx, chosen_model(ctx)).llm_engine, None
    same = ("dtype", "block_size", "max_num_seqs", "max_num_batched_tokens", "batch_invariant", "device")
    with stderr().status("loading the embedding model"):
        embedding_engine = load_embedding_engine(name, **{setting: ctx.params[setting] for setting in same})
    reserved = memory_bytes(embedding_engine)
    return load(ctx, chosen_model(ctx), reserved_memory_bytes=reserved).llm_engine, embedding_engine


def chosen_model(ctx: typer.Context) -> str | None:
    """MODEL, or --model and what stands for it; a model on the command line wins. None: the default model."""
    model, option = ctx.params["model"], ctx.params["model_option"]
    if model is not None and option is not None and settings.source_of(ctx, "model_option") == settings.COMMAND_LINE:
        raise typer.BadParameter("give the model once, as MODEL or as --model")
    chosen: str | None = model if model is not None else option
    return chosen


def checked(ctx: typer.Context) -> Any:
    """The ServerConfig, after everything was checked that needs no model. Raises BadParameter, ConfigError."""
    from minivllm.entrypoints.service import ServerConfig

    given = dict(ctx.params)
    chosen_model(ctx)
    if given["max_queue"] < 0:
        raise typer.BadParameter(f"--max-queue must be 0 or more, got {given['max_queue']}")
    given["allowed_origins"] = origins(given["allowed_origins"])
    for name in ("api_key", "served_model_name", "served_embedding_model_name"):
        given[name] = _tuple(given[name])
    if given["served_embedding_model_name"] and given["embedding_model"] is None:
        raise typer.BadParameter("--served-embedding-model-name needs --embedding-model")
    config = ServerConfig(**{field: given[option] for field, option in SERVER_SETTINGS.items()})
    sizes = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
    ParallelConfig(**{name: given[name] for name in (*sizes, "distributed_executor_backend")})
    DeviceConfig(given["device"], given["enforce_eager"])
    SpeculativeConfig.from_dict(speculative_config(ctx))
    return config


def _tuple(values: Any) -> tuple[str, ...]:
    return tuple(values or ())


def origins(text: str | None) -> tuple[str, ...]:
    """Words, or a JSON list as vLLM takes it."""
    if text is None or not text.strip().startswith("["):
        return tuple((text or "").replace(",", " ").split())
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(isinstance(origin, str) for origin in found):
        raise typer.BadParameter(f"--allowed-origins must be words or a JSON list of strings, got {text[:100]!r}")
    return tuple(found)


def _warn(ctx: typer.Context) -> None:
    """One line for each flag that changes nothing."""
    for name, reason in WITHOUT_EFFECT.items():
        if ctx.params[name] not in (None, False):
            stderr().print(
                f"[yellow]warning: --{name.replace('_', '-')} has no effect ({reason})[/yellow]", soft_wrap=True
            )


def _say_whether_it_would_start(ctx: typer.Context) -> None:
    try:
        checked(ctx)
    except (ConfigError, typer.BadParameter) as error:
        typer.echo(f"it would not start: {error}", err=True)
