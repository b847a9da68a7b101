"""One engine in a process of its own python: started, asked, stopped and continued.

It knows the lines of engines/protocol.py and no engine. Called by compare.py.
"""

import json
import math
import os
import select
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engines.protocol import Setup
from workload import Batch

HERE = Path(__file__).parent


class EngineFailed(Exception):
    """The engine's process ended, hung, or returned something else than it was asked for."""


class Unsupported(Exception):
    """The engine is fine, and has nothing for this batch."""


@dataclass
class Engine:
    """One engine in its process, and what was measured on it."""

    name: str  # as asked for: "vllm", "vllm:float32" or "ours+int4"
    dtype: str
    python: Path
    adapter: str
    log_file: Path
    timeout_seconds: float
    options: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    load_seconds: float = math.nan
    seconds: dict[str, list[list[float]]] = field(default_factory=dict)  # workload -> [round][batch]
    process: subprocess.Popen[str] | None = None

    @property
    def base(self) -> str:
        """The name without dtype and variants."""
        return self.name.partition("+")[0].partition(":")[0]

    def start(self, model: Path, gguf: Path | None, threads: int) -> None:
        """Start the process and wait until it can answer: imports, weights, warm-up and compilation of its own."""
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        start = time.perf_counter()
        with self.log_file.open("w") as log:
            self.process = subprocess.Popen(
                [self.python, HERE / "engines" / self.adapter],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                start_new_session=True,  # a process group, to stop and continue it with its children
            )
        self.info = self._ask(asdict(Setup(str(model), gguf and str(gguf), self.dtype, threads, self.options)))
        self.load_seconds = time.perf_counter() - start - self.info.get("prepare_seconds", 0.0)

    def run(self, batch: Batch) -> float:
        """Seconds for `batch`. Raises EngineFailed unless every request got its number of tokens; Unsupported."""
        reply = self._ask(asdict(batch))
        if "unsupported" in reply:
            raise Unsupported(reply["unsupported"])
        if reply["num_output_tokens"] != [num_tokens for _, num_tokens in batch.requests]:
            raise EngineFailed(f"wrong number of output tokens: {reply['num_output_tokens']}")
        return reply["seconds"]

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self.process and self.process.stdin and self.process.stdout
        try:
            print(json.dumps(message), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            raise EngineFailed(self._last_words()) from None
        if not select.select([self.process.stdout], [], [], self.timeout_seconds)[0]:
            raise EngineFailed(f"no answer in {self.timeout_seconds:.0f} s, see {self.log_file}")
        if not (line := self.process.stdout.readline()):
            raise EngineFailed(self._last_words())
        return json.loads(line)

    def _last_words(self) -> str:
        lines = [line for line in self.log_file.read_text(errors="replace").splitlines() if line.strip()]
        return f"ended, see {self.log_file}" + (f": {lines[-1].strip()[:200]}" if lines else "")

    def signal(self, number: signal.Signals) -> None:
        """SIGSTOP keeps an idle engine from spinning on the cores that another one is measured on."""
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def stop(self) -> None:
        """End the process and its children: politely, then not."""
        if self.process and self.process.stdin and self.process.stdout:
            self.signal(signal.SIGCONT)
            with suppress(BrokenPipeError):  # of what it never read
                self.process.stdin.close()
            try:
                self.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self.signal(signal.SIGKILL)
                self.process.wait()
            self.process.stdout.close()
