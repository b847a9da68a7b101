"""What a server prints when it answers: the ready line, and how to try it, to be copied as it stands.

Knows no option. Called by serving.py. Twin in vLLM: none (it prints its routes).
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from typing import Any

import typer

from minivllm.cli.terminal import stderr, to_json

KEY_VARIABLES = ("VLLM_API_KEY", "MINIVLLM_API_KEY")
LOCAL = ("127.0.0.1", "::1", "localhost")


def announce(server: Any, as_json: bool) -> None:
    """Tell that the server answers: as one JSON object, or as text with two examples."""
    service, url = server.service, f"{server.url}/v1"
    config, name, engine = service.config, service.model_names[0], service.engine.engine
    max_model_len, num_blocks = engine.config.model.max_model_len, engine.plan.num_blocks - 1
    if as_json:
        facts = {"url": url, "model": name, "max_model_len": max_model_len, "blocks": num_blocks}
        beside = service.embedding_model_names
        typer.echo(to_json({**facts, "embedding_model": beside[0]} if beside else facts))
    else:
        is_pooling = engine.config.model.is_pooling
        variable = key_variable(config.api_keys) if config.api_keys else None
        typer.echo(f"minivllm ready: {url}  model {name}  max_model_len {max_model_len}  KV blocks {num_blocks}")
        if service.embedding_model_names:
            typer.echo(embedding_line(service))
        typer.echo(f"try: {curl_example(url, name, is_pooling, variable)}")
        typer.echo(f"AI SDK:\n{sdk_example(url, name, is_pooling, variable)}")
        if variable is not None and os.environ.get(variable) not in config.api_keys:
            typer.echo(f"(both read the key from ${variable}: put one of yours there)")
    sys.stdout.flush()
    if config.host not in LOCAL and not config.api_keys:
        stderr().print(f"[yellow]warning: {config.host} is open to everybody who can reach it: set --api-key[/yellow]")


def embedding_line(service: Any) -> str:
    """What is beside the model, and what it keeps of the memory."""
    engine = service.embedding_engine.engine
    weights, cache = (round(size / 2**20) for size in (engine.plan.weight_bytes, engine.plan.pool_bytes))
    name, limit = service.embedding_model_names[0], engine.config.model.max_model_len
    return f"embeddings: model {name}  max_model_len {limit}  weights {weights} MiB  cache {cache} MiB"


def key_variable(api_keys: tuple[str, ...]) -> str:
    """The variable that holds one of the keys, so that no key is printed; if there is none, the first name."""
    holding = [name for name in KEY_VARIABLES if os.environ.get(name) in api_keys]
    return holding[0] if holding else KEY_VARIABLES[0]


def curl_example(url: str, name: str, is_pooling: bool, variable: str | None) -> str:
    """A command for a POSIX shell."""
    path = "embeddings" if is_pooling else "chat/completions"
    content = {"input": "Hello"} if is_pooling else {"messages": [{"role": "user", "content": "Hello"}]}
    key = f' -H "Authorization: Bearer ${variable}"' if variable else ""
    body = shlex.quote(to_json({"model": name, **content}))
    return f"curl {url}/{path}{key} -H 'Content-Type: application/json' -d {body}"


def sdk_example(url: str, name: str, is_pooling: bool, variable: str | None) -> str:
    """A module for Node with the Vercel AI SDK, the same for its generations 4 to 7."""
    key = f"process.env.{variable}" if variable else "'none'"  # without any the SDK looks for OpenAI's
    call = "embed" if is_pooling else "generateText"
    model = "textEmbeddingModel" if is_pooling else "chat"
    result, argument = ("embedding", "value") if is_pooling else ("text", "prompt")
    return "\n".join(
        [
            "  import { createOpenAI } from '@ai-sdk/openai';",
            f"  import {{ {call} }} from 'ai';",
            f"  const minivllm = createOpenAI({{ baseURL: {json.dumps(url)}, apiKey: {key} }});",
            f"  const answer = await {call}({{ model: minivllm.{model}({json.dumps(name)}), {argument}: 'Hello' }});",
            f"  console.log(answer.{result});",
        ]
    )
