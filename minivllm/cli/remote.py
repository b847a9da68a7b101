"""The same answers from a server that runs already: chat --url, complete --url.

Called by conversation.py and completion.py. Knows no model of our own. Twin in vLLM: vllm/entrypoints/cli/openai.py.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import typer

from minivllm.cli.options import ENGINE, REMOTE
from minivllm.cli.settings import COMMAND_LINE, flag_of, options_of, source_of
from minivllm.cli.terminal import print_json, printable, stderr
from minivllm.errors import ClientError
from minivllm.openai_client import OpenAIClient, Piece, RemoteError


class Remote(NamedTuple):
    """A server, and the model there that is asked."""

    client: OpenAIClient
    model: str


def connect(ctx: typer.Context) -> Remote | None:
    """The server that --url names, asked for its models; None without --url. Raises RemoteError, ClientError.

    Options that belong to the other way of answering are wrong usage, not ignored.
    """
    url: str | None = ctx.params["url"]
    for option in options_of(ctx.command).values():
        is_given = source_of(ctx, option.name) == COMMAND_LINE
        if is_given and url is not None and option.rich_help_panel == ENGINE and option.name != "model":
            raise typer.BadParameter(f"{flag_of(option)} is for a model that is loaded here: not with --url")
        if is_given and url is None and option.rich_help_panel == REMOTE:
            raise typer.BadParameter(f"{flag_of(option)} needs --url")
    if url is None:
        return None
    client = OpenAIClient(url, _key(ctx.params["api_key"], url))
    if ctx.params["model"] is not None:
        return Remote(client, ctx.params["model"])
    models = client.models()
    if not models:
        raise RemoteError(f"{client.url} serves no model.")
    return Remote(client, models[0])


def _key(given: str | None, url: str) -> str | None:
    """One key: a variable that a server reads may hold several. OpenAI's own is never sent in the clear."""
    words = (given or "").split()
    if words:
        return words[0]
    return os.environ.get("OPENAI_API_KEY") if url.startswith("https://") else None


def print_answer(pieces: Iterator[Piece], as_json: bool) -> str:
    """Write an answer as it comes, or as one JSON object at its end; returns its text. Raises ClientError."""
    answer = _Answer(as_json)
    try:
        for piece in pieces:
            answer.add(piece)
    except RemoteError as error:
        if not as_json and answer.num_pieces:
            sys.stdout.write("\n")
        if error.status is not None and 400 <= error.status < 500:
            raise ClientError(str(error)) from None
        raise
    answer.end()
    return answer.text


class _Answer:
    """An answer that grows."""

    def __init__(self, as_json: bool):
        self.text = ""
        self.num_pieces = 0
        self._as_json = as_json
        self._is_thinking = False
        self._last = Piece()
        self._usage: dict[str, Any] = {}
        self._started = time.perf_counter()
        self._first: float | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self._usage = piece.usage or self._usage
        if piece.finish_reason is not None:
            self._last = piece
        if piece.text or piece.reasoning:
            self.num_pieces += 1
            self._first = self._first or time.perf_counter()
        if not self._as_json:
            if bool(piece.reasoning) and not self._is_thinking:
                self._write("<think>")
            if self._is_thinking and piece.text:
                self._write("</think>\n")
            self._is_thinking = (self._is_thinking or bool(piece.reasoning)) and not piece.text
            self._write(piece.reasoning + piece.text)

    def _write(self, text: str) -> None:
        sys.stdout.write(printable(text))
        sys.stdout.flush()

    def end(self) -> None:
        if self._as_json:
            usage = {name: self._usage.get(name) for name in ("prompt_tokens", "completion_tokens")}
            usage["cached_tokens"] = (self._usage.get("prompt_tokens_details") or {}).get("cached_tokens")
            ends = {"finish_reason": self._last.finish_reason, "stop_reason": self._last.stop_reason}
            print_json({"text": self.text, **ends, "usage": usage})
            return
        self._write("\n")
        now = time.perf_counter()
        first = self._first or now
        num_tokens = self._usage.get("completion_tokens") or self.num_pieces
        speed = (num_tokens - 1) / (now - first) if num_tokens > 1 and now > first else 0.0
        line = f"{num_tokens} tokens, {speed:.1f} tok/s, first token after {first - self._started:.2f} s"
        stderr().print(f"[dim]{line}, ended by {self._last.finish_reason}[/dim]")
