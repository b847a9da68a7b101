"""deploy/Dockerfile, built and run by podman: who runs, as which process, what it writes, how it ends.

Every container has a read-only root file system, no temporary one beside it, no rights, and one writable volume.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.container.podman import IMAGE, ROOT, Podman, say
from tests.deploy.instances import Stream, call, complete, eventually, free_port, long_model

READ_ONLY = ("--read-only", "--read-only-tmpfs=false", "--cap-drop=all", "--security-opt=no-new-privileges")


class Container:
    """One that runs."""

    def __init__(self, podman: Podman, name: str, port: int):
        self.podman, self.name = podman, name
        self.url = f"http://127.0.0.1:{port}"

    @property
    def pid(self) -> int:
        """Outside, of its process 1."""
        return int(self.podman("inspect", "--format", "{{.State.Pid}}", self.name).stdout)

    def inside(self, path: str) -> Path:
        return Path(f"/proc/{self.pid}/root{path}")

    def healthcheck(self) -> int:
        """The image's HEALTHCHECK, run inside by podman."""
        return self.podman("healthcheck", "run", self.name, check=False).returncode

    def wait(self) -> int:
        return int(self.podman("wait", self.name).stdout)


@contextlib.contextmanager
def running(podman: Podman, *options: str, command: tuple[str, ...] = ()) -> Iterator[Container]:
    """`podman run` of the image, on a free port of this machine."""
    name, port = f"minivllm-{free_port()}", free_port()
    given = ("--env", f"MINIVLLM_PORT={port}", "--env", "OMP_NUM_THREADS=1", "--env", "MINIVLLM_MAX_MODEL_LEN=2048")
    podman("run", "--detach", "--name", name, *READ_ONLY, *given, *options, IMAGE, *command)
    try:
        yield Container(podman, name, port)
    finally:
        podman("rm", "--force", "--time", "0", "--volumes", name, check=False)


def status_of(url: str) -> int:
    try:
        return call(url).status
    except OSError:
        return 0


def is_up(container: Container, path: str = "/health") -> bool:
    if container.podman("inspect", "--format", "{{.State.Running}}", container.name).stdout.strip() != "true":
        raise RuntimeError(container.podman("logs", container.name, check=False).stderr)
    return status_of(container.url + path) == 200


# ------------------------------------------------------------------ the default model, as anybody starts it
@pytest.fixture(scope="module")
def default(podman: Podman) -> Iterator[Container]:
    """No arguments: it fetches the default model into its volume, and serves it."""
    say("a container with the default model, which it fetches")
    with running(podman, *podman.pip) as container:
        eventually(lambda: is_up(container, "/live"))
        assert container.healthcheck() != 0 or status_of(container.url + "/health") == 200  # it loads
        eventually(lambda: is_up(container))
        yield container


def test_minivllm_is_process_1_without_rights(default: Container):
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{default.pid}/status").read_text().splitlines() if ":\t" in line
    )
    assert status["NSpid"].split()[-1] == "1"
    assert status["Uid"].split() == ["10001"] * 4 and status["Gid"].split() == ["0"] * 4
    assert status["CapEff"] == status["CapBnd"] == "0" * 16 and status["NoNewPrivs"] == "1"
    command = Path(f"/proc/{default.pid}/cmdline").read_bytes().split(b"\0")
    assert command[1:] == [b"/opt/minivllm/bin/minivllm", b"serve", b""]


def test_it_answers(default: Container):
    body = {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
    reply = call(f"{default.url}/v1/completions", body)
    assert reply.status == 200 and json.loads(reply.text)["choices"][0]["text"].startswith(" Paris.")


def test_the_health_check_passes(default: Container):
    assert default.healthcheck() == 0


def test_the_model_and_the_kernels_are_in_the_volume(default: Container):
    cache = default.inside("/cache")
    assert list((cache / "minivllm").glob("*.gguf")) and list((cache / "numba").rglob("*.nbc"))
    assert not (cache / ".cache").exists() and not list(cache.glob("tmp*"))


def test_nothing_else_was_written(default: Container):
    """Podman's own list of what differs from the image: mount points and nothing inside them."""
    changed = default.podman("diff", default.name).stdout.split("\n")
    own = {"/etc", "/opt", "/run", "/run/.containerenv", "/etc/pip.conf", "/opt/pip-certificate", "/etc/mtab"}
    found = {line[2:] for line in changed if line.startswith(("A ", "C "))}
    mounts = {word for option in default.podman.pip[1::2] for word in [option.split(":")[1]]}
    assert {path for path in found if path not in own | mounts and not is_parent(path, mounts)} == set()


def is_parent(path: str, of: set[str]) -> bool:
    return any(one.startswith(f"{path}/") for one in of)


def test_a_file_outside_of_the_volume_cannot_be_written(default: Container):
    for path in ("/x", "/tmp/x", "/opt/minivllm/x", "/home/x"):
        done = default.podman("exec", default.name, "python", "-c", f"open({path!r}, 'w')", check=False)
        assert done.returncode == 1 and "Read-only file system" in done.stderr, path
    default.podman("exec", default.name, "python", "-c", "open('/cache/x', 'w')")


def test_the_image_holds_no_secret_and_no_compiler(podman: Podman):
    (facts,) = json.loads(podman("inspect", IMAGE).stdout)
    settings = dict(line.split("=", 1) for line in facts["Config"]["Env"])
    assert not [name for name in settings if "KEY" in name or "TOKEN" in name or "PROXY" in name.upper()]
    assert facts["Config"]["User"] == "10001:0" and facts["Config"]["Entrypoint"] == ["minivllm"]
    look = "import shutil; print([shutil.which(name) for name in ('curl', 'wget', 'gcc', 'git')])"
    done = podman("run", "--rm", "--entrypoint", "python", IMAGE, "-c", look)
    assert done.stdout.strip() == "[None, None, None, None]"


# ------------------------------------------------------------------ any user; the end
SERVE_TINY = ("serve", "/models/tiny", "--served-model-name", "tiny", "--max-model-len", "100000")
ANY_USER = 1234567890


@pytest.fixture(scope="module")
def tiny(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Options for a container of another user: a small model mounted, and a volume that the next one finds again."""
    folder = tmp_path_factory.mktemp("model")
    model = long_model(tiny_model("llama"), folder / "long")
    for path in (*model.parents, model, *model.iterdir()):
        path.chmod(path.stat().st_mode | (0o055 if path.is_dir() else 0o044))
    return ("--user", f"{ANY_USER}:0", "--volume", f"{model}:/models/tiny:ro", "--volume", "second:/cache")


def test_any_user_of_group_0_may_run_it_and_sigterm_lets_its_streams_end(podman: Podman, tiny: tuple[str, ...]):
    say("a container with another user, stopped while it answers")
    with running(podman, *tiny, command=SERVE_TINY) as container:
        eventually(lambda: is_up(container))
        assert complete(container.url).status == 200 and container.healthcheck() == 0
        assert {path.stat().st_uid for path in container.inside("/cache").iterdir()} == {ANY_USER}
        with contextlib.closing(Stream(container.url, max_tokens=2000)) as stream:
            stream.wait_for_text()
            podman("kill", "--signal", "TERM", container.name)
            eventually(lambda: status_of(container.url + "/ready") in (0, 503))
            text = b"".join(stream.pieces())
        assert b'"finish_reason":"length"' in text and text.endswith(b"data: [DONE]\n\n")
        assert container.wait() == 0


def test_what_outlasts_the_drain_gets_an_error_event(podman: Podman, tiny: tuple[str, ...]):
    with running(podman, "--env", "MINIVLLM_SHUTDOWN_TIMEOUT=1", *tiny, command=SERVE_TINY) as container:
        eventually(lambda: is_up(container))
        with contextlib.closing(Stream(container.url, max_tokens=90_000)) as stream:
            stream.wait_for_text()
            podman("kill", "--signal", "TERM", container.name)
            text = b"".join(stream.pieces())
        assert b'"error"' in text
        assert container.wait() == 0


def test_the_health_check_fails_where_nobody_answers():
    command = ["python3", str(ROOT / "deploy/healthcheck.py")]
    done = subprocess.run(
        command, env={**os.environ, "MINIVLLM_PORT": "2"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and "no answer" in done.stderr
