"""README.md, setup.cfg and .ci/run tell the truth about each other and about the tree."""

import sys
from pathlib import Path

import pytest

from tests.house.files import (
    command_after,
    command_that_ci_runs,
    folders_without_init,
    package_folders,
    packages_listed,
    packages_on_disk,
    paths_in_text,
    requirements,
    tree_of,
)
from tests.house.source import ROOT, imports, product

README = (ROOT / "README.md").read_text(encoding="utf-8")
SETUP = (ROOT / "setup.cfg").read_text(encoding="utf-8")
CI = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
# Packages that come with a requirement of ours because that one cannot run without them; and one of another name.
COMES_WITH = {
    "tokenizers": "transformers",
    "huggingface_hub": "transformers",
    "jinja2": "torch",
    "llvmlite": "numba",
    "werkzeug": "flask",
    "yaml": "pyyaml",
}
EXTRAS = {"ray"}  # `pip install -e .[NAME]`; the module that imports it says so where it is missing


# ------------------------------------------------------------------ the README's commands
@pytest.mark.parametrize("mark", ["run", "test"])
def test_ci_runs_the_readme_command_as_it_stands(mark: str):
    command = command_after(mark, README)
    assert command, f"README.md has no command after <!-- ci:{mark} -->"
    assert README.count(f"<!-- ci:{mark} -->") == 1
    assert command_that_ci_runs(mark, ROOT, CI) == command
    assert f"{mark}_command=$(readme_command {mark})" in CI
    assert f'bash -euo pipefail -c "${mark}_command"' in CI


def test_the_readme_commands_install_and_then_answer_and_test():
    run, test = (command_after(mark, README) or "" for mark in ("run", "test"))
    assert run.startswith("pip install -e . && minivllm generate ")
    assert test == 'pip install -e ".[test]" && pytest'


def test_another_command_in_the_readme_is_another_command_in_ci(tmp_path: Path):
    """The two ways to read the README agree on other texts too: neither has the command built in."""
    readme = (
        "<!-- ci:run -->\n```bash\nfirst 'a  b' && \\\n  second\n```\n```bash\nthird\n```\n<!-- ci:test -->\nno fence"
    )
    (tmp_path / "README.md").write_text(readme + "\n", encoding="utf-8")
    assert command_after("run", readme) == command_that_ci_runs("run", tmp_path, CI) == "first 'a  b' && \\\n  second"
    assert command_after("test", readme) is None
    assert command_that_ci_runs("test", tmp_path, CI) == ""
    assert command_after("deploy", readme) is None


# ------------------------------------------------------------------ the README's paths
def test_the_drawn_tree_names_only_what_exists():
    paths = tree_of(README)
    assert {"minivllm/", "minivllm/core/", "minivllm/outputs.py", "kernels/ops/", "golden/"} <= set(paths)
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_paths_in_the_text_exist_from_the_root_or_in_minivllm():
    paths = paths_in_text(README)
    assert "core/scheduler.py" in paths
    missing = [path for path in paths if not any((base / path).exists() for base in (ROOT, ROOT / "minivllm"))]
    assert missing == []


def test_a_drawing_is_read_with_its_depth():
    drawing = (
        "# x\n## Read it\n\n```\n"
        "a/\n├── one.py         does this\n├── b/             the rest\n│   └── two.py\n└── c.py d.py      two files\n"
        "e/f/               more/or less\n```\n"
    )
    assert tree_of(drawing) == ["a/", "a/one.py", "a/b/", "a/b/two.py", "a/c.py", "a/d.py", "e/f/"]


def test_paths_are_taken_from_backticks_outside_of_fences():
    text = "Read `core/x.py` and `docs/`, run `pytest tests`, not `word` or /etc/passwd.\n```\n`no/path.py`\n```\n"
    assert paths_in_text(text) == {"core/x.py", "docs/"}


# ------------------------------------------------------------------ packages
def test_every_package_on_disk_is_listed_and_nothing_else():
    assert packages_listed(SETUP) == packages_on_disk(ROOT, package_folders(SETUP))


def test_every_folder_with_python_files_is_a_package():
    assert list(folders_without_init(ROOT, package_folders(SETUP))) == []


def test_the_kernels_folder_itself_is_no_package():
    """kernels/__init__.py would shadow Hugging Face's package `kernels`, and transformers would not import."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert package_folders(SETUP) == {"minivllm": "minivllm", "minivllm.kernels": "kernels/ops"}


def test_every_operation_has_contract_reference_and_maths():
    folders = {path.parent for path in (ROOT / "kernels" / "ops").glob("*/__init__.py")}
    for operation in sorted(folders - {ROOT / "kernels" / "ops" / "trace"}):  # watches operations, is none
        for name in ("reference.py", "README.md"):
            assert (operation / name).exists(), f"{operation.name} has no {name}"


def test_a_package_that_setup_forgets_is_found(tmp_path: Path):
    for name in ("p/__init__.py", "p/sub/__init__.py", "p/bare/x.py", "k/ops/__init__.py", "k/ops/op/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    setup = "[options]\npackage_dir =\n    p = p\n    p.kernels = k/ops\npackages =\n    p\n    p.sub\n"
    folders = package_folders(setup)
    assert packages_listed(setup) == {"p", "p.sub"}
    assert packages_on_disk(tmp_path, folders) == {"p", "p.sub", "p.bare", "p.kernels", "p.kernels.op"}
    assert list(folders_without_init(tmp_path, folders)) == ["p/bare"]


def test_every_foreign_import_is_required_or_comes_with_a_requirement():
    foreign = {found.target.split(".")[0] for found in imports(product())} - set(sys.stdlib_module_names) - {"minivllm"}
    required = requirements(SETUP)
    assert {COMES_WITH.get(name, name) for name in foreign} - required == EXTRAS
    assert all(f"\n{name} =\n" in SETUP.partition("[options.extras_require]")[2] for name in EXTRAS)
    assert set(COMES_WITH) <= foreign  # an entry for nothing is a hole


def test_requirements_are_read_without_their_versions():
    setup = "[options]\ninstall_requires =\n    torch>=2.13,<2.14\n    # a comment\n    numpy\n    gguf[x]==1\n"
    assert requirements(setup) == {"torch", "numpy", "gguf"}
