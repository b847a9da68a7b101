"""The image, built once for all tests of the folder."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.container.podman import Podman


@pytest.fixture(scope="session")
def podman() -> Iterator[Podman]:
    folder = Path(tempfile.mkdtemp(prefix="minivllm-podman-", dir="/var/tmp"))
    found = Podman(folder)
    try:
        found.make_base()
        found.build()
        yield found
    finally:
        found.close()
        shutil.rmtree(folder, ignore_errors=True)
