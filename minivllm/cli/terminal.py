"""What every command does on a terminal: load a model with a sign of life, print answers as text or as JSON.

Answers go to standard output, everything else to standard error. Knows no command. Called by the command modules beside
it. Twin in vLLM: vllm/entrypoints/cli/openai.py (parts).
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import Any

import typer
from rich.console import Console

from minivllm.errors import ClientError
from minivllm.outputs import RequestOutput
from minivllm.sampling_params import SamplingParams

# Options that are arguments of LLM and fields of SamplingParams by the same name; a command has some of them.
ENGINE_SETTINGS = (
    *("tokenizer", "dtype", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size"),
    *("gpu_memory_utilization", "kv_cache_memory_bytes", "num_gpu_blocks_override", "enable_prefix_caching"),
    *("enable_chunked_prefill", "long_prefill_token_threshold", "scheduling_policy", "seed", "batch_invariant"),
    *("device", "enforce_eager"),
    *("tensor_parallel_size", "distributed_executor_backend", "quantization", "generation_config", "chat_template"),
)
SAMPLING_SETTINGS = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop")


def stderr() -> Console:
    return Console(stderr=True)


def load(ctx: typer.Context, model: str | None, **more: Any) -> Any:
    """An LLM, as the command's options say; torch is imported only by the commands that compute."""
    from minivllm.llm import LLM

    settings = {name: ctx.params.get(name) for name in ENGINE_SETTINGS}
    settings["speculative_config"] = speculative_config(ctx)
    with stderr().status("loading the model"):
        return LLM(model, **{name: value for name, value in settings.items() if value is not None}, **more)


def speculative_config(ctx: typer.Context) -> dict[str, Any] | None:
    """What --speculative-config says, where the command has it: a JSON object, or null."""
    text = ctx.params.get("speculative_config") or "null"
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = 0
    if found is not None and not isinstance(found, dict):
        raise typer.BadParameter(f"--speculative-config must be a JSON object or null, got {text[:100]!r}")
    return found


def sampling_fields(ctx: typer.Context) -> dict[str, Any]:
    """The sampling options that were given; the rest is the model's or the server's choice."""
    found = {name: ctx.params[name] for name in SAMPLING_SETTINGS}
    found["stop"] = list(found["stop"] or ())
    return {name: value for name, value in found.items() if value not in (None, [])}


def sampling_params(ctx: typer.Context, llm: Any) -> SamplingParams:
    """The model's own defaults, with what was given on top. max_tokens None: the room that is left."""
    return dataclasses.replace(llm.get_default_sampling_params(), **{"max_tokens": None, **sampling_fields(ctx)})


def to_json(value: dict[str, Any]) -> str:
    """One line."""
    return printable(json.dumps(value, ensure_ascii=False))


def printable(text: str) -> str:
    """Half of a surrogate pair (an answer may repeat it from a request) has no UTF-8 form: escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def print_json(value: dict[str, Any]) -> None:
    typer.echo(to_json(value))


def read_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ClientError(f"standard input must be UTF-8 text: {error}") from None


def print_stream(outputs: Any) -> tuple[RequestOutput, float]:
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


def speed(output: RequestOutput, decode_seconds: float) -> str:
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


def as_json_object(output: RequestOutput) -> dict[str, Any]:
    """What --json prints of an answer."""
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
