"""`minivllm verify` and `minivllm diff`: files, terminal, exit codes. Page and JUnit file hold what the report says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from minivllm.verify.html import page
from minivllm.verify.records import SCHEMA, Report
from tests.command import Run
from tests.verify.planted import BUGS
from tests.verify.test_remote import serving

FAST = ("--no-invariance", "--max-tokens", "4")


@pytest.fixture
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


def test_a_clean_model_is_exit_code_0_and_json_has_a_schema(minivllm: Run, model: Path):
    result = minivllm("verify", model, *FAST, "--json")
    [report] = result.lines
    assert (result.code, report["schema"], report["passed"]) == (0, SCHEMA, True)
    assert report["verdict"].startswith("EQUAL: ")
    assert set(report) == {"schema", "verdict", "passed"} | set(Report.__dataclass_fields__)
    assert report["environment"]["weights read by"] == "transformers"


def test_a_planted_bug_is_exit_code_1_and_in_every_output(
    minivllm: Run, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    BUGS["gate and up swapped"].plant(monkeypatch)
    html, junit, file = tmp_path / "a.html", tmp_path / "a.xml", tmp_path / "a.json"
    result = minivllm("verify", model, *FAST, "--html", html, "--junit", junit, "--json-file", file)
    assert result.code == 1
    assert "gate and up swapped" in result.out and "mlp.activation" in result.out and "DIFFERENT" in result.out
    assert json.loads(file.read_text())["findings"][0]["kind"] == "gate and up swapped"
    suite = ElementTree.fromstring(junit.read_text())
    assert int(suite.get("failures", 0)) == len(suite.findall("testcase/failure")) > 0
    assert int(suite.get("tests", 0)) == len(suite.findall("testcase"))
    text = html.read_text()
    assert "gate and up swapped" in text and "mlp.activation" in text
    check_page(text)


def check_page(text: str) -> None:
    """Closed tags, plots, and nothing from elsewhere."""
    open_tags: list[str] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attributes: object) -> None:
            if tag not in ("meta", "br", "!doctype"):
                open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

    Parser().feed(text)
    assert open_tags == []
    assert text.count("<svg") >= 3 and "nan" not in re.findall(r'(?:cx|cy|points|x|y)="([^"]*)"', text)
    assert not re.search(r"<script|<link|<img|https?://|url\(|@import", text)


def test_a_page_of_nothing_and_one_of_numbers_that_are_none_are_drawn(tmp_path: Path):
    assert "EQUAL: 0 checks" in page(Report("x", {}))
    assert "2 not a number" in page(Report("<x>", {}, logprobs=[(-1.0, float("nan")), (-2.0, float("inf")), (-1, -1)]))


def test_an_embedding_model_is_refused_in_words(minivllm: Run, tiny_model: Callable[[str], Path]):
    result = minivllm("verify", tiny_model("bert-cls"))
    assert result.code == 1 and "embedding model" in result.message and "Traceback" not in result.err


def test_a_dtype_that_nobody_knows_is_wrong_usage(minivllm: Run):
    result = minivllm("diff", "http://127.0.0.1:1", "http://127.0.0.1:1", "--server-dtype", "float64")
    assert result.code == 2 and "float32, bfloat16, int8, int4" in result.message


def test_a_server_that_is_not_there_is_one_clear_message(minivllm: Run, model: Path):
    result = minivllm("verify", model, "--against-url", "http://127.0.0.1:1")
    assert result.code == 1 and "nothing listens at" in result.message


def test_servers_are_compared_from_the_command_line(minivllm: Run, model: Path):
    with serving(model) as url:
        against = minivllm("verify", model, "--against-url", url, "--max-tokens", "4")
        difference = minivllm("diff", url, url, "--max-tokens", "4", "--json")
    assert against.code == 0 and "against transformers" in against.out
    assert difference.code == 0 and difference.lines[0]["passed"]
