"""explain, replay and --record on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from minivllm.trace import Trace
from tests.command import Run
from tests.test_cli_serve import started

SMALL = ("--kv-cache-memory-bytes", "400000")
GREEDY = ("-t", "0", "--max-tokens", "5")


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture
def recorded(minivllm: Run, model: Path, tmp_path: Path) -> Path:
    file = tmp_path / "run.jsonl"
    assert minivllm("generate", "the value is", "-m", model, *GREEDY, *SMALL, "--record", file).code == 0
    return file


def test_explain_tells_every_step_on_the_terminal(minivllm: Run, model: Path):
    result = minivllm("explain", "the value", "on the", "-m", model, *GREEDY, *SMALL)
    assert result.code == 0 and all(f"step {number}: " in result.out for number in range(1, 6))
    assert "greedy: " in result.out and "blocks [] -> [1]" in result.out and result.out.count("ends: length") == 2


def test_explain_writes_data_page_and_chrome_trace(minivllm: Run, model: Path, tmp_path: Path):
    files = {name: tmp_path / name for name in ("save", "html", "chrome")}
    options = [word for name, file in files.items() for word in (f"--{name}", file)]
    result = minivllm("explain", "-", "-m", model, *GREEDY, *SMALL, *options, stdin="the value")
    assert (result.code, result.out) == (0, "") and result.err.count("wrote ") == 3
    trace = Trace.load(files["save"])
    assert trace.requests[0].prompt == "the value" and len(trace.steps) == 5
    assert files["html"].read_text().startswith("<!doctype html>")
    assert len(json.loads(files["chrome"].read_text())["traceEvents"]) > 10


def test_explain_json_is_the_trace_itself(minivllm: Run, model: Path):
    result = minivllm("explain", "the value", "-m", model, *GREEDY, *SMALL, "--json", "--num-top", "2")
    trace = Trace.from_json(result.out)
    assert len(trace.steps) == 5 and len(trace.steps[0].rows[0].draws[0].stages[0].top) == 2


def test_a_recording_is_replayed_and_is_identical(minivllm: Run, recorded: Path):
    result = minivllm("replay", recorded)
    assert (result.code, result.out) == (0, "identical: 1 requests, 5 steps, every decision, block and bit\n")
    assert minivllm("replay", recorded, "--json").lines[0]["identical"] is True


def test_a_difference_is_told_and_is_exit_code_1(minivllm: Run, recorded: Path):
    trace = Trace.load(recorded)
    trace.steps[2].rows[0].draws[0].digest = "0" * 16
    trace.save(recorded)
    result = minivllm("replay", recorded)
    assert result.code == 1 and "1 differences" in result.out and "step 3, request " in result.out
    assert minivllm("replay", recorded, "--until", "2").code == 0
    (told,) = minivllm("replay", recorded, "--json").lines
    assert [(one["step"], one["field"]) for one in told["differences"]] == [(3, "draws.digest")]


def test_a_change_is_told_and_is_no_failure(minivllm: Run, recorded: Path):
    result = minivllm("replay", recorded, "--change", "max-num-batched-tokens=2")
    assert result.code == 0 and "decisions differ" in result.out and "the same" in result.out
    result = minivllm("replay", recorded, "--change", "block_size=4", "--change", "dtype=float32", "--json")
    assert result.code == 0 and result.lines[0]["num_steps"] == [5, 5]


def test_another_environment_is_told(minivllm: Run, recorded: Path):
    trace = Trace.load(recorded)
    trace.header["environment"]["torch"] = "0.1"
    trace.save(recorded)
    assert "recorded with torch 0.1, here " in minivllm("replay", recorded).err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("replay", "no-such-file"), 1, "cannot read no-such-file"),
        (("replay", "README.md"), 1, "no JSON object"),
        (("replay",), 2, "Missing argument"),
        (("explain",), 2, "Missing argument"),
    ],
)
def test_wrong_usage_is_told(minivllm: Run, arguments: tuple[str, ...], code: int, message: str):
    result = minivllm(*arguments)
    assert result.code == code and result.out == "" and "Traceback" not in result.err
    assert message in result.message


def test_a_change_without_a_value_or_of_no_setting_is_refused(minivllm: Run, recorded: Path):
    assert minivllm("replay", recorded, "--change", "block_size").code == 2
    result = minivllm("replay", recorded, "--change", "colour=red")
    assert result.code == 1 and "there is no setting 'colour'" in result.message


def test_a_record_that_cannot_be_written_is_refused(minivllm: Run, model: Path, tmp_path: Path):
    result = minivllm("generate", "the", "-m", model, *SMALL, "--record", tmp_path / "no" / "f")
    assert result.code == 1 and "cannot write" in result.message and result.out == ""


def test_run_batch_records_what_it_answers(minivllm: Run, model: Path, tmp_path: Path):
    body = {"prompt": "the value", "max_tokens": 4}
    lines = [json.dumps({"custom_id": f"{i}", "url": "/v1/completions", "body": body}) for i in range(3)]
    options = ("-m", model, *SMALL, "--record", tmp_path / "run.jsonl")
    assert minivllm("run-batch", "-", *options, stdin="\n".join(lines)).code == 0
    assert len(Trace.load(tmp_path / "run.jsonl").requests) == 3
    assert minivllm("replay", tmp_path / "run.jsonl").code == 0


def test_serve_records_until_it_ends(model: Path, tmp_path: Path):
    file = tmp_path / "run.jsonl"
    with started("serve", str(model), *SMALL, "--port", "0", "--record", str(file)) as server:
        body = json.dumps({"model": "llama", "prompt": "the value", "max_tokens": 4, "ignore_eos": True}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{server.url}/completions", body, headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            text = json.load(answer)["choices"][0]["text"]
        code, _ = server.stop()
    assert code == 0 and text
    trace = Trace.load(file)
    assert len(trace.requests) == 1 and len(trace.output_token_ids(trace.request_ids[0])) == 4
    command = [sys.executable, "-m", "minivllm.cli", "replay", str(file)]  # a process of its own, as the server was
    replayed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr
