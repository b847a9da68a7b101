"""The command line from its user's side: one call, what it printed and how it ended."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Standard output as JSON, one object per line."""
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def message(self) -> str:
        """Standard error without line ends and frames."""
        return " ".join(self.err.replace("│", " ").split())


class Stdin(io.TextIOWrapper):
    is_terminal = False

    def isatty(self) -> bool:
        return self.is_terminal


Run = Callable[..., Result]


def runner(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`minivllm ARGUMENTS` in this process, with `stdin` as text or as bytes."""
    from minivllm import cli  # here: every test file loads this one

    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str | Path, stdin: str | bytes = "") -> Result:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.setattr("sys.stdin", Stdin(io.BytesIO(data), encoding="utf-8"))
        monkeypatch.setattr("sys.argv", ["minivllm", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        code = caught.value.code
        return Result(code if isinstance(code, int) else 0, captured.out, captured.err)

    return run
