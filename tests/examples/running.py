"""Runs a script of examples/ai-sdk as its reader would, and tells what it printed and what it asked."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from tests.sdk.test_sdk import install, node_of

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples" / "ai-sdk"
TIMEOUT_SECONDS = 600  # the machine may be busy with something else


class Ran(NamedTuple):
    code: int
    out: str
    err: str
    calls: list[dict[str, Any]]  # tests/examples/watch.mjs

    def lines(self, word: str = "") -> list[dict[str, Any]]:
        """What was printed as JSON behind `word`, one object a line."""
        lines = [line.removeprefix(word).strip() for line in self.out.splitlines() if line.startswith(word)]
        return [json.loads(line) for line in lines if line.startswith("{")]


def install_examples() -> None:
    """The packages of all folders; and node 22, which generation 7 needs and tests/sdk brings."""
    with Path(__file__).open() as itself:
        fcntl.flock(itself, fcntl.LOCK_EX)  # one worker of pytest at a time
        for folder in ("sdk4", "sdk7", "client"):
            install(str(EXAMPLES / folder))
        install("sdk7")


def start(script: str, watch_file: Path, **settings: str) -> subprocess.Popen[str]:
    """`script` is a path in examples/ai-sdk; settings are variables of the environment."""
    folder, name = script.split("/")
    node = "node" if folder == "sdk4" else node_of("sdk7")
    plain = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    return subprocess.Popen(
        [node, "--import", str(HERE / "watch.mjs"), name],
        cwd=EXAMPLES / folder,
        env={**plain, "WATCH_FILE": str(watch_file), **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(script: str, **settings: str) -> Ran:
    """To its end."""
    with tempfile.TemporaryDirectory() as folder:
        watch_file = Path(folder) / "calls"
        watch_file.touch()
        with start(script, watch_file, **settings) as process:
            try:
                out, err = process.communicate(timeout=TIMEOUT_SECONDS)
            finally:
                process.kill()
        return Ran(process.returncode, out, err, [json.loads(line) for line in watch_file.read_text().splitlines()])
