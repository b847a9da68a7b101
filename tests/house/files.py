"""Files that speak about other files: README.md, setup.cfg, .ci/run."""

from __future__ import annotations

import configparser
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

FENCED = r"\n```\w*\n(.*?)\n```"


# ------------------------------------------------------------------ README.md
def command_after(mark: str, readme: str) -> str | None:
    """The fenced command right behind `<!-- ci:mark -->`, or None."""
    found = re.search(rf"^<!-- ci:{mark} -->{FENCED}", readme, re.DOTALL | re.MULTILINE)
    return found[1] if found else None


def command_that_ci_runs(mark: str, folder: Path, ci_script: str) -> str:
    """What .ci/run's own shell function extracts from `folder`/README.md."""
    function = re.search(r"^readme_command\(\) \{\n.*?^\}", ci_script, re.DOTALL | re.MULTILINE)
    assert function, ".ci/run has no function readme_command"
    script = f"{function[0]}\nreadme_command {mark}"
    done = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.removesuffix("\n")


def tree_of(readme: str) -> list[str]:
    """The paths that the drawing under `## Read it` names."""
    block = re.search(rf"^## Read it\n{FENCED}", readme, re.DOTALL | re.MULTILINE)
    assert block, "README.md has no drawing under `## Read it`"
    paths: list[str] = []
    folders: list[str] = []  # the open folder of each depth
    for line in block[1].splitlines():
        branch = re.match(r"(?:│   |    )*(?:[├└]── )?", line)
        assert branch
        depth = len(branch[0]) // 4
        words = re.match(r"(?:[\w./-]+(?:\.\w+|/)(?:\s|$))+", line[branch.end() :])
        assert words, f"README.md: the drawing has a line without a path: {line!r}"
        for word in words[0].split():
            paths.append("".join([*folders[:depth], word]))
            if word.endswith("/"):
                folders[depth:] = [word]
    return paths


def paths_in_text(readme: str) -> set[str]:
    """Every `path/of/a/file.py` or `folder/` that the text names in backticks."""
    prose = re.sub(r"^```.*?^```", "", readme, flags=re.DOTALL | re.MULTILINE)
    return set(re.findall(r"`([\w.-]+/[\w./-]*)`", prose))


# ------------------------------------------------------------------ setup.cfg
def packages_listed(setup: str) -> set[str]:
    """[options] packages."""
    return set(_setup(setup)["options"]["packages"].split())


def package_folders(setup: str) -> dict[str, str]:
    """[options] package_dir: package -> folder."""
    lines = _setup(setup)["options"]["package_dir"].split("\n")
    return {package.strip(): folder.strip() for package, folder in (line.split("=") for line in lines if line.strip())}


def packages_on_disk(root: Path, folders: dict[str, str]) -> set[str]:
    """Every folder with Python files below the roots of package_dir, under the name that it is imported by."""
    return {
        ".".join([package, *file.parent.relative_to(root / folder).parts])
        for package, folder in folders.items()
        for file in (root / folder).rglob("*.py")
    }


def folders_without_init(root: Path, folders: dict[str, str]) -> Iterator[str]:
    """Folders with Python files that are no package."""
    for folder in folders.values():
        for parent in sorted({file.parent for file in (root / folder).rglob("*.py")}):
            if not (parent / "__init__.py").exists():
                yield parent.relative_to(root).as_posix()


def requirements(setup: str) -> set[str]:
    """Names in install_requires."""
    text = _setup(setup)["options"]["install_requires"]
    return {re.split(r"[<>=!~;\[ ]", line.strip())[0] for line in text.splitlines() if line.strip() and "#" not in line}


def _setup(text: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read_string(text)
    return parser
