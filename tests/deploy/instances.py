"""Three real `minivllm serve`, and deploy/nginx.conf as a real nginx runs it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from tests.sdk.test_sdk import Server, server

ROOT = Path(__file__).parents[2]
NGINX_CONF = (ROOT / "deploy/nginx.conf").read_text()
NOBODY = 10001  # the image's user
MODEL = "tiny"
PATIENCE_SECONDS = 300.0  # until a test that hangs fails; nothing waits for it to pass
LONG = 100_000  # tokens: a stream that does not end while a test looks at it


def eventually(is_so: Callable[[], Any]) -> Any:
    """What is_so() says as soon as that is true."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if found := is_so():
            return found
        time.sleep(0.05)
    raise TimeoutError(f"not so after {PATIENCE_SECONDS} s")


# ------------------------------------------------------------------ servers
class Instance:
    """One server, which can be killed and started again at the same address."""

    def __init__(self, model: Path, log: Path, *arguments: str):
        self._command = (str(model), "--served-model-name", MODEL, *arguments)
        self._log = log
        self._stack = contextlib.ExitStack()
        self.port = 0
        self.start()

    def start(self) -> None:
        started: Server = self._stack.enter_context(server(self._log, *self._command, "--port", str(self.port)))
        self.pid, self.url = started.pid, started.url
        self.port = urlsplit(started.url).port or 0

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self._stack.close()

    def close(self) -> None:
        self._stack.close()

    def metric(self, name: str, **labels: str) -> float:
        """The sum of /metrics' lines of this name that have these labels."""
        page = urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=PATIENCE_SECONDS).read().decode()
        lines = [line for line in page.splitlines() if re.match(rf"{re.escape(name)}[{{ ]", line)]
        chosen = [line for line in lines if all(f'{key}="{value}"' in line for key, value in labels.items())]
        return sum(float(line.rpartition(" ")[2]) for line in chosen)

    @property
    def num_answered(self) -> float:
        return self.metric("vllm:request_success_total")


def long_model(tiny: Path, folder: Path) -> Path:
    """A tiny model that takes long texts."""
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2 * LONG}))
    return folder


# ------------------------------------------------------------------ nginx
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def configuration(folder: Path, ports: list[int], listen: int) -> str:
    """deploy/nginx.conf with these addresses in place of its own; of its three servers the first len(ports)."""
    text = NGINX_CONF.replace("listen 8080;", f"listen 127.0.0.1:{listen};").replace("/tmp/", f"{folder}/")
    text = text.replace("/dev/stdout", f"{folder}/access.log").replace("/dev/stderr", "stderr")
    for number in (1, 2, 3):
        address = f"server minivllm-{number}:8000 "
        if address not in text:
            raise ValueError(f"deploy/nginx.conf has no {address!r}")
        if number <= len(ports):
            text = text.replace(address, f"server 127.0.0.1:{ports[number - 1]} ")
        else:
            text = re.sub(rf" *{address}.*\n", "", text)
    return text


def as_nobody() -> dict[str, Any]:
    """For subprocess: another user than root, if we are root."""
    return {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.getuid() == 0 else {}


@contextlib.contextmanager
def nginx(folder: Path, ports: list[int], change: Callable[[str], str] = str) -> Iterator[str]:
    """Its address. change: of the configuration."""
    folder.mkdir()
    if os.getuid() == 0:
        os.chown(folder, NOBODY, NOBODY)
    for parent in folder.parents:  # pytest's folders are closed to others
        with contextlib.suppress(PermissionError):
            parent.chmod(parent.stat().st_mode | 0o011)
    listen = free_port()
    file = folder / "nginx.conf"
    file.write_text(change(configuration(folder, ports, listen)))
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    command = [program, "-e", "stderr", "-c", str(file), "-g", "daemon off;"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, **as_nobody())
    try:
        eventually(lambda: process.poll() is not None or is_listening(listen))
        if process.poll() is not None:
            raise RuntimeError(process.stderr.read().decode() if process.stderr else "")
        yield f"http://127.0.0.1:{listen}"
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE_SECONDS)


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# ------------------------------------------------------------------ clients
class Reply(NamedTuple):
    status: int
    headers: Any
    text: str

    @property
    def error(self) -> dict[str, Any]:
        assert self.headers["Content-Type"] == "application/json", self.text
        found: dict[str, Any] = json.loads(self.text)["error"]
        assert list(found) == ["message", "type", "param", "code"]
        return found


def call(url: str, body: dict[str, Any] | bytes | None = None) -> Reply:
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as answer:
            return Reply(answer.status, answer.headers, answer.read().decode())
    except urllib.error.HTTPError as answer:
        return Reply(answer.code, answer.headers, answer.read().decode())


def complete(url: str, **fields: Any) -> Reply:
    body = {"model": MODEL, "prompt": "a", "max_tokens": 3, "temperature": 0, "ignore_eos": True}
    return call(f"{url}/v1/completions", body | fields)


class Stream:
    """A streamed completion, read as it comes."""

    def __init__(self, url: str, max_tokens: int = LONG):
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=PATIENCE_SECONDS)
        body = {"model": MODEL, "prompt": "a", "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
        self._connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        self._socket = self._connection.sock
        self._answer = self._connection.getresponse()
        assert self._answer.status == 200

    def pieces(self) -> Iterator[bytes]:
        """What one read of the connection brought, until the end. Raises IncompleteRead where that was cut."""
        while piece := self._answer.read1():
            yield piece

    def wait_for_text(self) -> None:
        found = b""
        for piece in self.pieces():
            found += piece
            if b'"text"' in found:
                return
        raise EOFError(f"no token in {found!r}")

    def hang_up(self) -> None:
        """For another thread than the reader's, which then sees the end."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.hang_up()
        self._answer.close()
        self._connection.close()
