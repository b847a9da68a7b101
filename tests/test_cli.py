"""The command line on a tiny model: every command answers, --json is JSON, errors are one clear message."""

import json
from pathlib import Path

import pytest

from minivllm import cli


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output, standard error of `minivllm ARGUMENTS`."""
    monkeypatch.setattr("sys.argv", ["minivllm", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    captured = capsys.readouterr()
    code = caught.value.code
    return (code if isinstance(code, int) else 0), captured.out, captured.err


@pytest.fixture
def minivllm(monkeypatch, capsys):
    return lambda *arguments: run(monkeypatch, capsys, *arguments)


def test_version_names_the_libraries(minivllm):
    code, out, _ = minivllm("--version")
    assert code == 0
    assert all(name in out for name in ("minivllm", "torch", "triton", "transformers"))


def test_generate_streams_text(minivllm, tiny_model):
    code, out, err = minivllm("generate", "the", "-m", str(tiny_model("llama")), "--max-tokens", "5", "-t", "0")
    assert code == 0 and out.endswith("\n") and "tok/s" in err


def test_generate_json_is_what_was_streamed(minivllm, tiny_model):
    arguments = ("generate", "the", "-m", str(tiny_model("llama")), "--max-tokens", "5", "-t", "0")
    _, text, _ = minivllm(*arguments)
    code, out, _ = minivllm(*arguments, "--json")
    answer = json.loads(out)
    assert code == 0 and answer["text"] == text.removesuffix("\n")
    assert answer["usage"]["completion_tokens"] == len(answer["token_ids"])


def test_embed_prints_one_vector_per_text(minivllm, tiny_model):
    code, out, _ = minivllm("embed", "the", "value", "-m", str(tiny_model("bert-mean")), "--json")
    assert code == 0 and [entry["index"] for entry in json.loads(out)["data"]] == [0, 1]


def test_plan_matches_what_the_engine_reserves(minivllm, tiny_model):
    from minivllm import LLM

    folder = str(tiny_model("llama"))
    code, out, _ = minivllm("plan", folder, "--kv-cache-memory-bytes", "1000000", "--json")
    plan = json.loads(out)
    engine = LLM(folder, kv_cache_memory_bytes=1_000_000).llm_engine
    assert code == 0
    assert plan["num_blocks"] == engine.plan.num_blocks and plan["pool_bytes"] == engine.plan.pool_bytes
    assert plan["weight_bytes"] == pytest.approx(engine.plan.weight_bytes, rel=0.05)
    assert minivllm("plan", folder)[0] == 0


def test_run_batch_writes_answers_in_order(minivllm, tiny_model, tmp_path: Path):
    body = {"prompt": "the", "max_tokens": 3}
    good = json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body})
    (tmp_path / "in.jsonl").write_text(f"{good}\nnonsense\n{good}\n")
    arguments = ("run-batch", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), "--json")
    code, out, _ = minivllm(*arguments, "-m", str(tiny_model("llama")))
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert code == 0 and json.loads(out)["failed"] == 1
    assert [answer["error"] is None for answer in answers] == [True, False, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "the", "-m", "/no/such/model"), "/no/such/model"),
        (("generate", "the", "-m", "TINY", "-t", "7"), "temperature must be a number in [0, 2]"),
        (("generate", "", "-m", "TINY"), "prompt must not be empty"),
        (("generate", "the", "-m", "TINY", "--dtype", "int3"), "dtype"),
        (("run-batch", "/no/such/file"), "cannot read"),
        (("plan", "/no/such/model"), "/no/such/model"),
    ],
)
def test_an_error_is_one_message_and_exit_code_1(minivllm, tiny_model, arguments, message):
    code, out, err = minivllm(*(str(tiny_model("llama")) if word == "TINY" else word for word in arguments))
    plain = " ".join(err.replace("│", " ").split())
    assert code == 1 and out == "" and "Traceback" not in err
    assert message in plain


def test_chat_goes_on_after_a_refused_message(minivllm, tiny_model, monkeypatch, default_chat_input):
    code, out, err = minivllm("chat", "-m", default_chat_input)
    assert code == 0 and out.count("\n") >= 2 and "tok/s" in err


@pytest.fixture
def default_chat_input(tiny_model, monkeypatch, tmp_path) -> str:
    """A tiny model with a chat template, and an input of: a line too long, a good line, /reset, a good line, /exit."""
    import io
    import shutil

    folder = shutil.copytree(tiny_model("llama"), tmp_path / "chatty")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    lines = ["the " * 5000, "the", "/reset", "value", "/exit"]
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return str(folder)
