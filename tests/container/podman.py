"""Podman with a store of its own: builds deploy/Dockerfile and runs the image, without a daemon and without a registry.

The Dockerfile's base, Debian's image, is made here by debootstrap, as Debian makes it. What pip is told on this machine
(an index, a certificate, folders of wheels) holds inside as well. Needs root, and the right to mount.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
IMAGE = "localhost/minivllm-test"
BASE = "localhost/debian-test"
DEBIAN = "bookworm"
PATIENCE_SECONDS = 900

# Control groups of two kinds at once, as some machines have them, are more than crun takes: it sees those of version 2.
IN_OWN_MOUNTS = 'umount -R /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup && exec "$@"'
CONTAINERS_CONF = """
[containers]
cgroups = "disabled"
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
log_driver = "k8s-file"
netns = "host"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "none"
"""


def say(what: str) -> None:
    """Progress; tox.ini lets it through with -s."""
    print(f"\n{what} ...", flush=True)


class Podman:
    """folder: for everything it keeps; removed with close()."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._settings = folder / "containers.conf"
        self._settings.write_text(CONTAINERS_CONF)
        self._pip = pip_settings(folder)

    def __call__(self, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = self.command(*arguments)
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS, cwd=ROOT
        )
        if check and done.returncode:
            raise RuntimeError(f"podman {' '.join(map(str, arguments))}: {done.stdout[-3000:]}{done.stderr[-3000:]}")
        return done

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "CONTAINERS_CONF": str(self._settings), "TMPDIR": str(self._folder)}

    def command(self, *arguments: str | Path) -> list[str]:
        store = ["--root", str(self._folder / "store"), "--runroot", str(self._folder / "run")]
        podman = ["podman", *store, "--storage-driver", "overlay", *map(str, arguments)]
        return ["unshare", "--mount", "bash", "-euc", IN_OWN_MOUNTS, "bash", *podman]

    def make_base(self) -> None:
        """Debian's smallest system, as an image."""
        say("debootstrap")
        system = self._folder / "debian"
        tar = self._folder / "debian.tar"
        mirror = "http://deb.debian.org/debian"
        for command in (
            ["debootstrap", "--variant=minbase", DEBIAN, str(system), mirror],
            ["tar", "-C", str(system), "--exclude=./var/cache/apt/archives/*.deb", "-cf", str(tar), "."],
        ):
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=PATIENCE_SECONDS)
        self("import", tar, BASE)
        shutil.rmtree(system)
        tar.unlink()

    def build(self) -> None:
        """deploy/Dockerfile, as it stands."""
        say("building deploy/Dockerfile")
        options = ["--format", "docker", "--isolation", "chroot", "--network", "host", "--layers=false"]
        arguments = ["--build-arg", f"DEBIAN={BASE}"]
        if "find-links" in self._pip.settings:  # torch's CPU build lies there; elsewhere PyTorch's own index has it
            index = self._pip.settings.get("index-url", "https://pypi.org/simple")
            arguments += ["--build-arg", f"TORCH_CPU_INDEX={index}"]
        self("build", *options, *self.pip, *arguments, "-f", "deploy/Dockerfile", "-t", IMAGE, ".")

    @property
    def pip(self) -> list[str]:
        """Options: pip inside is told what it is told outside."""
        return self._pip.volumes

    def close(self) -> None:
        self("rm", "--all", "--force", "--time", "0", check=False)
        shutil.rmtree(self._folder, ignore_errors=True)


class PipSettings(NamedTuple):
    """settings: as inside. volumes: options that bring them there, and the files that they name."""

    settings: dict[str, str]
    volumes: list[str]


def pip_settings(folder: Path) -> PipSettings:
    """Of this machine's pip: its index, its certificate, its folders of wheels. Writes a pip.conf into the folder."""
    told = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    found: dict[str, str] = {}
    for line in told.stdout.splitlines():  # global.index-url='...' or :env:.find-links='...'
        name, _, value = line.partition("=")
        found[name.rpartition(".")[2]] = value.strip("'")
    settings = {name: found[name] for name in ("index-url", "extra-index-url", "find-links", "cert") if name in found}
    file = folder / "pip.conf"
    volumes = ["--volume", f"{file}:/etc/pip.conf:ro"]
    for name, value in settings.items():
        for path in (Path(word.removeprefix("file://")) for word in value.split()):
            if not path.is_absolute() or not path.exists():
                continue
            # an index's files lie beside it; a certificate not where Debian keeps its own
            outside = path if name == "cert" else Path(*path.parts[:3])
            inside = Path("/opt/pip-certificate") if name == "cert" else outside
            volumes += ["--volume", f"{outside}:{inside}:ro"]
            settings[name] = settings[name].replace(str(outside), str(inside))
    file.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
    return PipSettings(settings, volumes)
