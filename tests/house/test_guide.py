"""Every program of the guide has its script in examples/ai-sdk, as README.md there lists them."""

import json
import re
from pathlib import Path

import pytest

from tests.house.guide import BLOCKS, PROGRAMS, Block, rows_under, sections_without_a_script, wrong_scripts
from tests.house.source import ROOT

EXAMPLES = ROOT / "examples" / "ai-sdk"
README = (EXAMPLES / "README.md").read_text(encoding="utf-8")
SCRIPTS = rows_under("The guide, section by section", README)
CLIENT = rows_under("The client's side", README)
REST = rows_under("What is no program", README)
VERSIONS = {"sdk4": "sdk4", "sdk7": "sdk7", "client": "sdk7"}  # folder of examples -> folder of tests/sdk


def test_every_program_of_the_guide_has_its_script_in_the_table():
    assert sections_without_a_script(BLOCKS, SCRIPTS) == []
    assert len(SCRIPTS) == 32


def test_every_other_block_of_the_guide_has_its_place():
    others = [block.section for block in BLOCKS if block.language not in PROGRAMS]
    assert [row[0] for row in REST] == list(dict.fromkeys(others))


@pytest.mark.parametrize("folder", ["sdk4", "sdk7"])
def test_every_script_is_in_the_table_and_says_which_section_it_is_and_what_to_expect(folder: str):
    assert wrong_scripts(EXAMPLES / folder, SCRIPTS) == []


def test_every_section_has_its_cases_in_tests_sdk():
    for _, _, cases in SCRIPTS:
        assert (ROOT / "tests" / "sdk" / "sdk4" / cases).exists(), cases
        assert (ROOT / "tests" / "sdk" / "shared" / "migrated" / cases).exists(), cases


def test_every_script_of_the_client_is_in_its_table_with_tests_that_exist():
    assert {row[0] for row in CLIENT} == {path.name for path in (EXAMPLES / "client").glob("*.mjs")}
    tests = (ROOT / "tests" / "examples" / "test_client.py").read_text(encoding="utf-8")
    for name, _, proofs in CLIENT:
        assert f'"{Path(name).stem}"' in tests or f"client/{name}" in tests
        for proof in re.findall(r"test_\w+", proofs):
            assert f"def {proof}(" in tests, proof


@pytest.mark.parametrize("folder", VERSIONS)
def test_packages_are_those_of_tests_sdk_and_their_lock_names_no_registry(folder: str):
    ours = json.loads((EXAMPLES / folder / "package.json").read_text())["dependencies"]
    theirs = json.loads((ROOT / "tests" / "sdk" / VERSIONS[folder] / "package.json").read_text())["dependencies"]
    assert ours.items() <= theirs.items()
    lock = json.loads((EXAMPLES / folder / "package-lock.json").read_text())["packages"]
    assert lock[""]["dependencies"] == ours
    assert all("integrity" in package and "resolved" not in package for path, package in lock.items() if path)


# ------------------------------------------------------------------ the checkers on wrong files
def test_a_section_without_a_script_is_found_and_so_is_a_row_of_nothing():
    blocks = [Block("A / b", "typescript"), Block("A / c", "tsx"), Block("A / d", "bash")]
    assert sections_without_a_script(blocks, [["A / b", "b.mjs"], ["A / d", "d.mjs"]]) == [
        "no script: A / c",
        "no such program: A / d",
    ]


def test_a_table_is_read_without_its_head():
    first = "## T\n\ntext\n\n| a | b |\n|---|---|\n| one | `1.mjs` |\n| two | `2.mjs` |\n"
    readme = f"# x\n{first}\n## U\n\n| c |\n|---|\n| three |\n"
    assert rows_under("T", readme) == [["one", "1.mjs"], ["two", "2.mjs"]]
    assert rows_under("U", readme) == [["three"]]


def test_missing_mute_and_forgotten_scripts_are_found(tmp_path: Path):
    (tmp_path / "good.mjs").write_text("// Guide: A / b\n// Expect: a text.\n")
    (tmp_path / "mute.mjs").write_text("// Guide: A / c\nconst x = 1;\n")
    (tmp_path / "other.mjs").write_text("// Guide: A / b\n// Expect: a text.\n")
    (tmp_path / "forgotten.mjs").write_text("")
    rows = [["A / b", "good.mjs"], ["A / c", "mute.mjs"], ["A / d", "other.mjs"], ["A / e", "missing.mjs"]]
    name = tmp_path.name
    assert wrong_scripts(tmp_path, rows) == [
        f"{name}/mute.mjs: does not say what to expect",
        f"{name}/other.mjs: begins with '// Guide: A / b', not with its section",
        f"missing: {name}/missing.mjs",
        f"not in the table: {name}/forgotten.mjs",
    ]
