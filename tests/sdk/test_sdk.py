"""The examples of "Using Vercel AI SDK with vLLM", run by four generations of the real SDK against `minivllm serve`.

    sdk4/*.mjs               the guide's code as it stands; its sections are files
    shared/migrated/*.mjs    the same code as generations 5, 6 and 7 write it; sdk5, sdk6, sdk7 hold their packages
    shared/*.mjs             what all of them need

Every case of node's test runner is one test here. When the first is asked for, all generations run, each in one
process, against one server with a key, the default model and a small embedding model beside it. Each also has a server
of its own, without a key, which runs one request and keeps none waiting. Needs node (20 or newer; generation 7 brings
its own) and npm's registry: `tox -e sdk`, or `pytest -n 0 tests/sdk`. Plain `pytest` does not come here (setup.cfg).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
GENERATIONS = ("sdk4", "sdk5", "sdk6", "sdk7")
KEY = "sdk-key"
EMBEDDER = "tiny-embedder"
CASE_TIMEOUT_MS = 300_000
GENERATION_TIMEOUT_SECONDS = 3600


# ------------------------------------------------------------------ which cases there are
def cases_of(generation: str) -> list[str]:
    """`section: case` of each case, in the order in which they run; `both` means two."""
    folder = HERE / ("sdk4" if generation == "sdk4" else "shared/migrated")
    order = re.findall(r"^import .*'\./([\w-]+\.mjs)';$", (folder / "all.mjs").read_text(), re.MULTILINE)
    cases = []
    for name in order:
        source = (folder / name).read_text()
        section = re.findall(r"^ *describe\('([^']+)'", source, re.MULTILINE)
        found = re.findall(r"^ *(test|both|bothOf\(\w+\))\('([^']+)'", source, re.MULTILINE)
        if len(section) != 1 or not found:
            raise ValueError(f"{name} must hold one section with cases: describe('...'), test('...') or both('...')")
        for kind, case in found:
            cases.append(f"{section[0]}: {case}")
            if kind != "test":
                cases.append(f"{section[0]}: {case} over chat")
    return cases


CASES = [(generation, case) for generation in GENERATIONS for case in cases_of(generation)]


# ------------------------------------------------------------------ packages and servers
def install(generation: str) -> None:
    """What the lock file names, once for each state of it."""
    folder = HERE / generation
    stamp = folder / "node_modules" / ".lock-sha256"
    digest = hashlib.sha256((folder / "package-lock.json").read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        raise RuntimeError(f"npm ci in {folder.name} failed:\n{done.stdout}{done.stderr}")
    stamp.write_text(digest)


def node_of(generation: str) -> str:
    """Generation 7 needs node 22 and brings it as a package."""
    if generation != "sdk7":
        return "node"
    (found,) = (HERE / generation / "node_modules").glob("node-linux-*/bin/node")
    return str(found)


class Server(NamedTuple):
    url: str
    model: str
    pid: int


@contextlib.contextmanager
def server(log: Path, *arguments: str, port: str = "0", num_threads: int = 1) -> Iterator[Server]:
    """`minivllm serve`, on a free port unless told."""
    command = [sys.executable, "-m", "minivllm.cli", "serve", "--port", port, "--json", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads)}
    with log.open("w") as errors:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        try:
            ready = process.stdout.readline() if process.stdout else ""
            if not ready.startswith("{"):
                raise RuntimeError(f"{' '.join(command)} did not start: {ready}{log.read_text()}")
            facts = json.loads(ready)
            yield Server(facts["url"], facts["model"], process.pid)
        finally:
            process.kill()
            process.communicate()


@pytest.fixture(scope="session")
def main_server(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The default model, as anybody starts it, with a key; and an embedding model beside it."""
    log = tmp_path_factory.mktemp("sdk") / "server.log"
    embedder = ("--embedding-model", str(tiny_model("bert-cls")), "--served-embedding-model-name", EMBEDDER)
    with server(log, "--api-key", KEY, *embedder, num_threads=os.cpu_count() or 1) as main:
        yield main


# ------------------------------------------------------------------ one run of a generation
Outcome = str | None  # None: passed; otherwise what went wrong


def read_report(path: Path) -> dict[str, Outcome]:
    """Node's JUnit report: `section: case` -> outcome."""
    outcomes: dict[str, Outcome] = {}
    for suite in ElementTree.parse(path).getroot().iter("testsuite"):
        for case in suite.iterfind("testcase"):
            wrong = [child for child in case if child.tag in ("failure", "error", "skipped")]
            outcomes[f"{suite.get('name')}: {case.get('name')}"] = wrong[0].text or wrong[0].tag if wrong else None
    return outcomes


def run_generation(generation: str, main: Server, folder: Path) -> dict[str, Outcome]:
    """All cases, in one process of node, beside a small server of its own."""
    report = folder / f"{generation}.xml"
    command = [
        node_of(generation),
        "--test-reporter=junit",
        f"--test-reporter-destination={report}",
        f"--test-timeout={CASE_TIMEOUT_MS}",
        "all.mjs",
    ]
    with server(folder / f"{generation}.log", "--max-num-seqs", "1", "--max-queue", "0") as small:
        environment = {
            **os.environ,
            "VLLM_BASE_URL": main.url,
            "VLLM_API_KEY": KEY,
            "VLLM_MODEL": main.model,
            "VLLM_EMBEDDING_MODEL": EMBEDDER,
            "VLLM_SMALL_URL": small.url,
            "VLLM_SMALL_PID": str(small.pid),
        }
        done = subprocess.run(
            command,
            cwd=HERE / generation,
            env=environment,
            capture_output=True,
            text=True,
            timeout=GENERATION_TIMEOUT_SECONDS,
        )
    if not report.exists():
        raise RuntimeError(f"node left no report: {done.stdout}{done.stderr}")
    return read_report(report)


@pytest.fixture(scope="session")
def outcomes(
    request: pytest.FixtureRequest, main_server: Server, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Outcome]]:
    """What became of every case of the generations that are asked for. They run together: the server batches them."""
    asked = {item.callspec.params["generation"] for item in request.session.items if hasattr(item, "callspec")}
    generations = [generation for generation in GENERATIONS if generation in asked]
    for generation in generations:
        install(generation)
    folder = tmp_path_factory.mktemp("reports")
    with ThreadPoolExecutor(len(GENERATIONS)) as pool:
        runs = {generation: pool.submit(run_generation, generation, main_server, folder) for generation in generations}
    return {generation: run.result() for generation, run in runs.items()}


@pytest.mark.parametrize(("generation", "case"), CASES, ids=[f"{generation}-{case}" for generation, case in CASES])
def test_example(generation: str, case: str, outcomes: dict[str, dict[str, Outcome]]):
    outcome = outcomes[generation].get(case, "it did not run")
    assert outcome is None, outcome


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_case_that_ran_is_one_of_the_tests_above(generation: str, outcomes: dict[str, dict[str, Outcome]]):
    assert sorted(outcomes[generation]) == sorted(cases_of(generation))


@pytest.mark.parametrize("generation", GENERATIONS)
def test_lock_files_name_no_registry(generation: str):
    lock = json.loads((HERE / generation / "package-lock.json").read_text())
    packages = [package for path, package in lock["packages"].items() if path]
    assert packages and all("integrity" in package and "resolved" not in package for package in packages)
