"""Three instances for all tests of the folder; who kills one starts it again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.deploy.instances import Instance, long_model, nginx


@pytest.fixture(scope="session")
def instances(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Instance]]:
    folder = tmp_path_factory.mktemp("deploy")
    model = long_model(tiny_model("llama"), folder / "long")
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda number: Instance(model, folder / f"server-{number}.log"), (1, 2, 3)))
    yield found
    for instance in found:
        instance.close()


@pytest.fixture
def balanced(instances: list[Instance], tmp_path: Path) -> Iterator[str]:
    """nginx's address, in front of all three. Every test has its own: what nginx knows of them is new."""
    with nginx(tmp_path / "nginx", [instance.port for instance in instances]) as url:
        yield url
