"""Writes requirements-cpu.txt and requirements-cuda.txt: every package of the image, its version and its hash.

    python deploy/lock.py        with the Python of the image (3.11, Linux, x86-64), whenever setup.cfg has changed

pip resolves for this machine, so its answer holds for machines like it. On CUDA torch and its libraries come from PyPI
as everything else does. On a CPU torch comes from an index of PyTorch's own and is pinned by its version in the
Dockerfile, and Triton is a gigabyte that only a GPU has a use for: both are left out of the file. Used by nothing: the
Dockerfile reads what it wrote.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TORCH = {"cpu": "torch==2.13.0+cpu", "cuda": "torch==2.13.0"}
HEAD = (
    "# Written by deploy/lock.py for Python 3.11 on Linux, x86-64. pip install --no-deps --require-hashes -r {name}\n"
)


def resolved(torch: str, options: list[str]) -> list[dict[str, Any]]:
    """What pip would install for minivllm with this torch, into an empty environment."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", *options, "install", "--dry-run", "--ignore-installed", "--quiet"]
        subprocess.run([*command, "--report", str(report), torch, str(HERE.parent)], check=True)
        found: list[dict[str, Any]] = json.loads(report.read_text())["install"]
    return found


def line(package: dict[str, Any]) -> str:
    name = re.sub(r"[-_.]+", "-", package["metadata"]["name"]).lower()
    hashes = package["download_info"]["archive_info"]["hashes"]
    return f"{name}=={package['metadata']['version']} --hash=sha256:{hashes['sha256']}\n"


def write(variant: str) -> None:
    # This machine's own folders of wheels may hold a torch without CUDA: not asked for the other one.
    certificate = os.environ.get("PIP_CERT")
    isolated = ["--isolated", *(["--cert", certificate] if certificate else [])]
    packages = resolved(TORCH[variant], isolated if variant == "cuda" else [])
    left_out = {"minivllm"} | ({"torch", "triton"} if variant == "cpu" else set())
    lines = sorted(line(package) for package in packages if package["metadata"]["name"] not in left_out)
    file = HERE / f"requirements-{variant}.txt"
    file.write_text(HEAD.format(name=file.name) + "".join(lines))
    print(f"{file.name}: {len(lines)} packages")


if __name__ == "__main__":
    for variant in TORCH:
        write(variant)
