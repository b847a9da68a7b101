"""One live `minivllm serve` for all clients of a run: the default model, a key, a small embedding model beside it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.clients.live import EMBEDDER, KEY, LiveServer
from tests.sdk.test_sdk import server


@pytest.fixture(scope="session")
def live(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    log = tmp_path_factory.mktemp("clients") / "server.log"
    embedder = ("--embedding-model", str(tiny_model("bert-cls")), "--served-embedding-model-name", EMBEDDER)
    with server(log, "--api-key", KEY, *embedder, num_threads=os.cpu_count() or 1) as started:
        yield LiveServer(*started)
