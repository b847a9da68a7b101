"""Settings for every test (one thread per xdist worker: the CI machine has two cores), and shared tiny models."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.command import Run, runner

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny random model by name (golden/tiny.py), written once per session."""
    from golden.tiny import write_tiny_model

    folders: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in folders:
            folders[name] = write_tiny_model(name, tmp_path_factory.mktemp("models") / name)
        return folders[name]

    return folder


@pytest.fixture
def minivllm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`minivllm ARGUMENTS`, and no setting of whoever runs the tests."""
    for name in list(os.environ):
        if name.startswith(("MINIVLLM_", "VLLM_")) and name != "MINIVLLM_CACHE":
            monkeypatch.delenv(name)
    return runner(monkeypatch, capsys)
