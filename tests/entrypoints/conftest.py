"""One tiny model for a test module, an engine thread for each test, and what every test must leave behind: nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from minivllm import LLM, AsyncEngine
from tests.engine.test_async_engine import Gate, assert_idle
from tests.entrypoints.helpers import Web


@pytest.fixture(scope="module")
def llm(tiny_model: Callable[[str], Path]) -> LLM:
    """Two requests run at a time; company changes no bit, so that a stream and a whole answer must be equal."""
    return LLM(
        tiny_model("llama"), dtype="float32", num_gpu_blocks_override=64, max_num_seqs=2, batch_invariant=True, seed=7
    )


@pytest.fixture
def engine(llm: LLM) -> Iterator[AsyncEngine]:
    """Every request of the test has ended and every block is free afterwards."""
    llm.reset_prefix_cache()
    engine = AsyncEngine(llm.llm_engine, max_queue=4)
    yield engine
    engine.shutdown()
    assert_idle(llm)


@pytest.fixture
def gate(llm: LLM, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """The engine thread does one step at a time."""
    gate = Gate(llm, monkeypatch)
    yield gate
    gate.open()


@pytest.fixture
def web(engine: AsyncEngine) -> Web:
    return Web(engine)
