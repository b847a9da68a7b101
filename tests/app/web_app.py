"""The app of examples/ai-sdk/app as processes: its packages, its build, and the app itself on a free port."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
FOLDER = HERE.parents[1] / "examples" / "ai-sdk" / "app"
START_SECONDS = 240.0
BUILD_SECONDS = 900.0


def environment(**settings: str) -> dict[str, str]:
    """This one without the settings of whoever runs the tests."""
    return {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")} | settings


def build() -> None:
    """`npm run build`, which checks the types too. Raises RuntimeError with what it printed."""
    command = ["npm", "run", "build"]
    done = subprocess.run(command, cwd=FOLDER, env=environment(), capture_output=True, text=True, timeout=BUILD_SECONDS)
    if done.returncode != 0:
        raise RuntimeError(f"npm run build failed:\n{done.stdout}{done.stderr}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def running(script: str, base_url: str, folder: Path, **settings: str) -> Iterator[str]:
    """`npm run dev` or `npm run start`, against the model server at `base_url`: the app's URL.

    Raises RuntimeError when it does not answer; AssertionError afterwards, when it asked for another host.
    """
    port, log, strangers = free_port(), folder / f"{script}.log", folder / f"{script}.strangers"
    strangers.touch()
    env = environment(
        VLLM_BASE_URL=base_url,
        NODE_OPTIONS=f'--require "{HERE / "loopback_only.cjs"}"',
        STRANGERS_LOG=str(strangers),
        **settings,
    )
    command = ["npm", "run", script, "--", "--port", str(port)]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=FOLDER, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    url = f"http://localhost:{port}"
    try:
        wait_for_answer(url, process, log)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    asked = strangers.read_text().split()
    assert not asked, f"the app asked {asked}"


def wait_for_answer(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=60):
            return
        time.sleep(0.1)
    raise RuntimeError(f"the app does not answer at {url}:\n{log.read_text()}")
