"""The image, built once for all tests of the folder."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.container.podman import Podman

MEMORY_DISK = Path("/dev/shm")
NEEDED_BYTES = 10 * 2**30  # three copies of the image, and room for those who run


def store_folder() -> str:
    """In memory where there is much: the image is written three times and deleted again."""
    available = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    if available is None or int(available[1]) * 1024 < NEEDED_BYTES + 4 * 2**30 or not MEMORY_DISK.is_dir():
        return "/var/tmp"
    may_hold_a_system = not os.statvfs(MEMORY_DISK).f_flag & (os.ST_NOEXEC | os.ST_NODEV)
    return str(MEMORY_DISK) if may_hold_a_system and shutil.disk_usage(MEMORY_DISK).free > NEEDED_BYTES else "/var/tmp"


@pytest.fixture(scope="session")
def podman() -> Iterator[Podman]:
    folder = Path(tempfile.mkdtemp(prefix="minivllm-podman-", dir=store_folder()))
    found = Podman(folder)
    try:
        found.make_base()
        found.build()
        yield found
    finally:
        found.close()
        shutil.rmtree(folder, ignore_errors=True)
