"""OpenAI's client for JavaScript. Every case of openai_node/client.mjs is one test here; one process of node runs all.

The client wants node 22, which comes as a package. Needs npm and its registry: `tox -e clients`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.clients.live import LiveServer
from tests.sdk.test_sdk import Outcome, install, read_report

FOLDER = Path(__file__).parent / "openai_node"
CASES = [
    f"client: {name}" for name in re.findall(r"^  test\('([^']+)'", (FOLDER / "client.mjs").read_text(), re.MULTILINE)
]
TIMEOUT_SECONDS = 600


@pytest.fixture(scope="module")
def outcomes(live: LiveServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    install(str(FOLDER))
    (node,) = (FOLDER / "node_modules").glob("node-linux-*/bin/node")
    report = tmp_path_factory.mktemp("node") / "report.xml"
    command = [str(node), "--test-reporter=junit", f"--test-reporter-destination={report}", "client.mjs"]
    environment = {
        **os.environ,
        "BASE_URL": live.url,
        "API_KEY": live.key,
        "MODEL": live.model,
        "EMBEDDING_MODEL": live.embedder,
        "EMBEDDING_SIZE": str(live.embedding_size),
    }
    done = subprocess.run(command, cwd=FOLDER, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    if not report.exists():
        raise RuntimeError(f"node left no report: {done.stdout}{done.stderr}")
    return read_report(report)


@pytest.mark.parametrize("case", CASES)
def test_case(case: str, outcomes: dict[str, Outcome]):
    outcome = outcomes.get(case, "it did not run")
    assert outcome is None, outcome


def test_every_case_that_ran_is_one_of_the_tests_above(outcomes: dict[str, Outcome]):
    assert sorted(outcomes) == sorted(CASES)


def test_the_lock_file_names_no_registry():
    lock = json.loads((FOLDER / "package-lock.json").read_text())
    packages = [package for path, package in lock["packages"].items() if path]
    assert packages and all("integrity" in package and "resolved" not in package for package in packages)
