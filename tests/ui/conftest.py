"""A server with a tiny model, and one browser for all tests of a module; every test gets an empty page of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import BrowserContext

from minivllm import LLM, AsyncEngine
from minivllm.entrypoints.server import Server, make_server
from minivllm.entrypoints.service import ServerConfig
from tests.engine.test_async_engine import assert_idle
from tests.entrypoints.helpers import eventually
from tests.ui.browser import open_browser
from tests.ui.view import View


@pytest.fixture(scope="module")
def llm(tiny_model: Callable[[str], Path]) -> LLM:
    """Three requests run at a time, and eleven blocks are all there is: they get into each other's way."""
    return LLM(tiny_model("llama"), dtype="float32", num_gpu_blocks_override=12, max_num_seqs=3, seed=7)


@pytest.fixture
def engine(llm: LLM) -> Iterator[AsyncEngine]:
    llm.reset_prefix_cache()
    engine = AsyncEngine(llm.llm_engine, max_queue=8)
    yield engine
    engine.shutdown()
    assert_idle(llm)


@pytest.fixture
def serve(engine: AsyncEngine) -> Iterator[Callable[..., Server]]:
    """Starts a server with these settings; all of them end with the test."""
    servers = []

    def start(**settings: Any) -> Server:
        server = make_server(engine, ServerConfig(port=0, served_model_names=("tiny",), **settings))
        server.start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.service.draining.set()
        server.service.aborting.set()
        server.stop()
    eventually(lambda: engine.num_unfinished_requests == 0)


@pytest.fixture(scope="module")
def browser() -> Iterator[BrowserContext]:
    with open_browser(viewport={"width": 1280, "height": 860}) as context:
        yield context


@pytest.fixture
def view(browser: BrowserContext) -> Iterator[View]:
    """Nothing that the page did was wrong, and nothing left its server."""
    view = View(browser.new_page())
    yield view
    view.close()
