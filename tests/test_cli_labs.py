"""minivllm lab: list, start, check; what they print, and how they end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from minivllm.labs import workshop
from minivllm.labs.catalog import LABS
from tests.command import Run


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_list_names_every_lab(minivllm: Run):
    result = minivllm("lab", "list")
    assert result.code == 0
    assert [line.split()[0] for line in result.out.splitlines()[: len(LABS)]] == [lab.name for lab in LABS]
    (found,) = minivllm("lab", "list", "--json").lines
    assert [row["name"] for row in found["labs"]] == [lab.name for lab in LABS]


def test_from_start_to_solved(minivllm: Run):
    result = minivllm("lab", "start", "chunk-budget")
    assert result.code == 0 and "minivllm lab check chunk_budget" in result.out
    result = minivllm("lab", "check", "chunk_budget")
    assert result.code == 1 and "not written yet" in " ".join(result.out.split())
    Path("chunk_budget.py").write_text("print('hello')\n" + workshop.solution("chunk_budget"))
    result = minivllm("lab", "check", "chunk_budget")
    assert result.code == 0 and "47 of 47 examples are right" in result.out
    assert "hello" not in result.out


def test_a_wrong_answer_is_shown_with_its_example(minivllm: Run):
    source = workshop.solution("allocate").replace("pop(0)", "pop()")
    Path("allocate.py").write_text(source)
    result = minivllm("lab", "check", "allocate")
    assert result.code == 1
    for text in ("returns [3, 7]", "returns [5, 7]", "from the right end", "minivllm/core/block_pool.py"):
        assert text in result.out
    (found,) = minivllm("lab", "check", "allocate", "--json").lines
    assert found["passed"] is False and found["got"].startswith("returns [5, 7]")


def test_start_does_not_overwrite(minivllm: Run):
    Path("preempt.py").write_text("mine")
    result = minivllm("lab", "start", "preempt")
    assert result.code == 1 and "nothing is overwritten" in result.message
    assert Path("preempt.py").read_text() == "mine"


def test_check_without_a_file_says_how_to_begin(minivllm: Run):
    result = minivllm("lab", "check", "top_p")
    assert result.code == 1 and "`minivllm lab start top_p` writes it" in result.message
    assert minivllm("lab", "check", "top_p", "--solution").code == 0
    assert list(Path().iterdir()) == []


def test_a_name_that_no_lab_has(minivllm: Run):
    for command in ("start", "check"):
        result = minivllm("lab", command, "nothing")
        assert result.code == 1 and "there are: allocate, append_slot, " in result.message


@pytest.mark.parametrize("command", ["list", "start", "check"])
def test_help_explains(minivllm: Run, command: str):
    result = minivllm("lab", command, "--help")
    assert result.code == 0 and "--json" in result.out


def test_installed_files_are_enough(tmp_path: Path):
    """What setup.cfg lists is built without the repository around it: exercises are found there."""
    root = Path(__file__).parents[1]
    build = "from setuptools import setup; setup()"
    target = tmp_path / "lib"
    done = subprocess.run(
        [sys.executable, "-c", build, "-q", "build", "-b", str(tmp_path / "build"), "--build-lib", str(target)],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    environment = {**os.environ, "PYTHONPATH": str(target)}
    program = "import minivllm, sys; from minivllm.cli import main; print(minivllm.__file__); main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "lab", "start", "preempt"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(target))
    assert (tmp_path / "preempt.py").read_text() == workshop.skeleton("preempt")
