"""The command line on tiny models: every command answers, --json is JSON, errors are one clear message."""

from __future__ import annotations

import errno
import importlib.metadata
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console

from minivllm import LLM, SamplingParams, cli, hub
from tests.command import Result, Run, Stdin
from tests.tolerances import UNIT_LENGTH_ATOL

COMMANDS = (
    *("serve", "complete", "generate", "chat", "embed", "pull", "plan", "run-batch"),
    *("bench", "explain", "replay", "verify", "diff"),
)
SMALL = ("--kv-cache-memory-bytes", "400000")  # a pool of a few blocks: the commands start faster
GREEDY = ("-t", "0", "--max-tokens", "5")


@pytest.fixture(scope="module")
def llm(tiny_model: Callable[[str], Path]) -> LLM:
    """What the commands load."""
    return LLM(tiny_model("llama"), kv_cache_memory_bytes=400_000)


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def answer(llm: LLM) -> str:
    """What GREEDY makes of "the"."""
    params = SamplingParams(temperature=0, max_tokens=5)
    return llm.generate("the", params, use_tqdm=False)[0].outputs[0].text


def forget_template(model: Path, target: Path) -> Path:
    """A copy of the model that cannot chat."""
    shutil.copytree(model, target)
    config = json.loads((target / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (target / "tokenizer_config.json").write_text(json.dumps(config))
    return target


# ------------------------------------------------------------------ help and version
def test_version_names_the_libraries(minivllm: Run):
    result = minivllm("--version")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers")]
    assert result.code == 0 and result.out.startswith("minivllm ")
    assert all(part in result.out for part in versions)


@pytest.mark.parametrize(("installed", "expected"), [("3.8.0", "triton 3.8.0"), (None, "triton not installed")])
def test_version_names_triton_or_says_that_it_is_not_there(
    minivllm: Run, monkeypatch: pytest.MonkeyPatch, installed: str | None, expected: str
):
    """torch's CPU build comes without triton: `--version` was a traceback there."""
    version = importlib.metadata.version

    def fake(name: str) -> str:
        if name != "triton":
            return version(name)
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", fake)
    assert expected in minivllm("--version").out


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, cli.SPIN_COUNT), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "None")],
)
def test_waiting_awake_is_bounded_before_torch_is_imported(given: dict[str, str], expected: str):
    """Without a bound, one busy neighbour on two cores made a token take a second."""
    code = "import os, sys, minivllm.cli; sys.argv = ['minivllm', '--version']\n"
    code += "try: minivllm.cli.main()\nfinally: print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    clean = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", code], env=clean | given, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == f"{expected} False", done.stderr


def test_the_help_names_every_command(minivllm: Run):
    result = minivllm("--help")
    assert result.code == 0
    assert all(command in result.out for command in COMMANDS)
    assert minivllm("-h").out == result.out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help_that_explains_all_its_options(minivllm: Run, command: str):
    result = minivllm(command, "--help")
    assert result.code == 0 and "--json" in result.out
    parameters = typer.main.get_command(cli.app).commands[command].params
    assert [parameter.name for parameter in parameters if not parameter.help] == []
    names = {option for parameter in parameters for option in parameter.opts if option.startswith("--")}
    assert all(name in result.out for name in names)


@pytest.mark.parametrize("command", ["generate", "chat", "embed", "run-batch", "bench", "explain"])
def test_every_command_that_loads_a_model_can_size_its_cache(command: str):
    """The error of a pool that is too large or too small names these settings."""
    parameters = {parameter.name for parameter in typer.main.get_command(cli.app).commands[command].params}
    assert {"model", "dtype", "max_model_len", "gpu_memory_utilization", "kv_cache_memory_bytes"} <= parameters


@pytest.mark.parametrize("arguments", [("generate",), ("--nonsense",), ("nonsense",), ("generate", "x", "-t", "hot")])
def test_wrong_usage_is_exit_code_2(minivllm: Run, arguments: tuple[str, ...]):
    result = minivllm(*arguments)
    assert result.code == 2 and result.out == "" and "Traceback" not in result.err


# ------------------------------------------------------------------ generate
def test_generate_streams_the_answer_and_tells_the_speed_on_standard_error(minivllm: Run, model: Path, answer: str):
    result = minivllm("generate", "the", "-m", model, *GREEDY, *SMALL)
    assert (result.code, result.out) == (0, f"{answer}\n")
    assert "5 tokens, " in result.err and "tok/s, first token after" in result.err and "ended by length" in result.err


def test_generate_json_is_one_object(minivllm: Run, model: Path, llm: LLM, answer: str):
    result = minivllm("generate", "the", "-m", model, *GREEDY, *SMALL, "--json")
    [found] = result.lines
    assert set(found) == {"text", "token_ids", "finish_reason", "stop_reason", "usage", "metrics"}
    assert (result.code, found["text"], found["finish_reason"]) == (0, answer, "length")
    num_prompt_tokens = len(llm.get_tokenizer().encode("the"))
    assert found["usage"] == {"prompt_tokens": num_prompt_tokens, "completion_tokens": 5, "cached_tokens": 0}


def test_generate_reads_its_prompt_from_standard_input(minivllm: Run, model: Path, answer: str):
    assert minivllm("generate", "-", "-m", model, *GREEDY, *SMALL, stdin="the").out == f"{answer}\n"


def test_sampling_options_reach_the_sampler(minivllm: Run, model: Path, llm: LLM):
    params = SamplingParams(temperature=1.5, top_p=0.9, top_k=40, seed=7, max_tokens=9)
    expected = llm.generate("the", params, use_tqdm=False)[0].outputs[0]
    options = ("-t", "1.5", "--top-p", "0.9", "--top-k", "40", "--seed", "7", "--max-tokens", "9")
    [found] = minivllm("generate", "the", "-m", model, *options, *SMALL, "--json").lines
    assert (found["token_ids"], found["text"]) == (expected.token_ids, expected.text)
    stop = expected.text[3:5]
    options += ("--stop", "never to be seen", "--stop", stop)
    [found] = minivllm("generate", "the", "-m", model, *options, *SMALL, "--json").lines
    assert (found["text"], found["stop_reason"]) == (expected.text[: expected.text.index(stop)], stop)


def test_what_is_not_given_is_the_models_own_default(minivllm: Run, model: Path, tmp_path: Path):
    folder = shutil.copytree(model, tmp_path / "m")
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.9, "top_k": 1, "eos_token_id": 0}))
    greedy = minivllm("generate", "the", "-m", folder, "-t", "0", "--max-tokens", "6", *SMALL).out
    assert minivllm("generate", "the", "-m", folder, "--max-tokens", "6", *SMALL).out == greedy  # top_k 1


# ------------------------------------------------------------------ chat
def prompt_tokens(llm: LLM, *contents: str, system: str | None = None) -> int:
    """Length of a conversation whose turns alternate."""
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    opening = [{"role": "system", "content": system}] if system else []
    return len(llm.llm_engine.render_chat([*opening, *messages])["prompt_token_ids"])


def sent(result: Result) -> list[int]:
    """How long the prompt of each turn was: what the model was told."""
    return [reply["usage"]["prompt_tokens"] for reply in result.lines]


def test_chat_answers_one_message_and_ends(minivllm: Run, model: Path, llm: LLM):
    messages = [{"role": "user", "content": "the"}]
    expected = llm.chat(messages, SamplingParams(temperature=0, max_tokens=5), use_tqdm=False)[0].outputs[0].text
    result = minivllm("chat", "the", "-m", model, *GREEDY, *SMALL, stdin="never read\n")
    assert (result.code, result.out) == (0, f"{expected}\n") and "tok/s" in result.err
    [found] = minivllm("chat", "the", "-m", model, *GREEDY, *SMALL, "--json").lines
    assert found["text"] == expected


def test_a_conversation_remembers_its_turns_until_it_is_reset(minivllm: Run, model: Path, llm: LLM):
    result = minivllm("chat", "-m", model, *GREEDY, *SMALL, "--json", stdin="the\n\nand\n/reset\nand\n/exit\nwith\n")
    first, second, third = result.lines  # an empty line is no turn, and nothing comes after /exit
    assert result.code == 0
    assert sent(result) == [
        prompt_tokens(llm, "the"),
        prompt_tokens(llm, "the", first["text"], "and"),
        prompt_tokens(llm, "and"),
    ]


def test_a_system_prompt_stays_after_a_reset(minivllm: Run, model: Path, llm: LLM):
    for name in ("--system", "--system-prompt"):  # the second one is vLLM's
        result = minivllm("chat", "-m", model, *GREEDY, *SMALL, "--json", name, "be", stdin="the\n/reset\nand\n")
        assert sent(result) == [prompt_tokens(llm, "the", system="be"), prompt_tokens(llm, "and", system="be")]


def test_the_end_of_the_input_ends_a_conversation(minivllm: Run, model: Path):
    result = minivllm("chat", "-m", model, *GREEDY, *SMALL, stdin="the")  # no newline either
    assert result.code == 0 and result.out.count("\n") == 1
    assert "llama. /help lists the commands, /exit ends." in result.err


def test_a_refused_turn_is_forgotten_and_the_conversation_goes_on(minivllm: Run, model: Path, llm: LLM):
    result = minivllm("chat", "-m", model, *GREEDY, *SMALL, "--json", stdin=f"the\n{'the ' * 5000}\nand\n")
    first, _ = result.lines
    assert result.code == 0 and "(/reset starts afresh)" in result.err
    assert sent(result)[1] == prompt_tokens(llm, "the", first["text"], "and")


def test_ctrl_c_stops_a_reply_and_the_turn_is_forgotten(
    minivllm: Run, model: Path, llm: LLM, monkeypatch: pytest.MonkeyPatch
):
    calls: list[int] = []
    chat = LLM.chat

    def interrupted(self: LLM, *args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return chat(self, *args, **options)

    monkeypatch.setattr(LLM, "chat", interrupted)
    result = minivllm("chat", "-m", model, *GREEDY, *SMALL, "--json", stdin="the\nand\n")
    assert result.code == 0 and "stopped" in result.err
    assert sent(result) == [prompt_tokens(llm, "and")]


def test_a_terminal_is_asked_with_a_prompt_and_ctrl_c_there_leaves(
    minivllm: Run, model: Path, monkeypatch: pytest.MonkeyPatch
):
    answers = iter(["the"])

    def ask(self: Console, prompt: str = "") -> str:
        assert prompt and self.stderr
        for line in answers:
            return line
        raise KeyboardInterrupt

    monkeypatch.setattr(Console, "input", ask)
    monkeypatch.setattr(Stdin, "is_terminal", True)
    result = minivllm("chat", "-m", model, *GREEDY, *SMALL)
    assert result.code == 0 and result.out.count("\n") == 1


def test_chat_takes_stop_strings(minivllm: Run, model: Path):
    text = minivllm("chat", "the", "-m", model, "-t", "0", "--max-tokens", "9", *SMALL).out
    cut = minivllm("chat", "the", "-m", model, "-t", "0", "--max-tokens", "9", "--stop", text[4:6], *SMALL).out
    assert cut == text[: text.index(text[4:6])] + "\n"


def test_a_single_message_that_is_refused_is_exit_code_1(minivllm: Run, model: Path, tmp_path: Path):
    """It was printed in red, and the exit code was 0: a script took the empty answer for one."""
    for arguments in (("the " * 5000, "-m", model), ("hi", "-m", forget_template(model, tmp_path / "mute"))):
        result = minivllm("chat", *arguments, *GREEDY, *SMALL)
        assert result.code == 1 and result.out == ""
        assert result.message.startswith("error: ")
    assert "This model has no chat template" in result.message


# ------------------------------------------------------------------ embed
def test_embed_json_has_a_vector_for_each_text_in_order(minivllm: Run, tiny_model: Callable[[str], Path]):
    texts = ["the", "value", "and"]
    [found] = minivllm("embed", *texts, "-m", tiny_model("bert-mean"), "--json").lines
    outputs = LLM(tiny_model("bert-mean")).embed(texts, use_tqdm=False)
    assert [entry["index"] for entry in found["data"]] == [0, 1, 2]
    for entry, output in zip(found["data"], outputs, strict=True):
        assert entry["embedding"] == pytest.approx(output.outputs.embedding, abs=UNIT_LENGTH_ATOL)
    assert found["usage"]["prompt_tokens"] == sum(len(output.prompt_token_ids) for output in outputs)


def test_embed_shows_the_beginning_of_each_vector_and_a_table_of_similarities(
    minivllm: Run, tiny_model: Callable[[str], Path]
):
    result = minivllm("embed", "the", "value", "-m", tiny_model("bert-mean"))
    assert result.code == 0
    assert "'the': [" in result.out and "'value': [" in result.out and "(64 numbers)" in result.out
    assert "cosine" in result.out and result.out.count("1.000") == 2  # with itself
    assert "cosine" not in minivllm("embed", "the", "-m", tiny_model("bert-mean")).out


def test_brackets_in_a_text_are_no_markup(minivllm: Run, tiny_model: Callable[[str], Path]):
    """[/b] ended in a traceback, [bold] vanished."""
    result = minivllm("embed", "[/b]", "[bold]x", "-m", tiny_model("bert-mean"))
    assert result.code == 0
    assert "0 [/b]" in result.out and "1 [bold]x" in result.out


def test_a_decoder_embeds_too(minivllm: Run, model: Path, llm: LLM):
    [found] = minivllm("embed", "the", "-m", model, *SMALL, "--json").lines
    [output] = llm.embed("the", use_tqdm=False)
    assert found["data"][0]["embedding"] == pytest.approx(output.outputs.embedding, abs=UNIT_LENGTH_ATOL)


# ------------------------------------------------------------------ pull
def test_pull_says_where_a_model_lies(minivllm: Run, model: Path):
    result = minivllm("pull", model)
    assert (result.code, result.out) == (0, f"llama (folder): {model} (was there already)\n")
    expected = {"name": "llama", "path": str(model), "kind": "folder", "was_there": True}
    assert minivllm("pull", model, "--json").lines == [expected]


def test_pull_without_a_name_fetches_the_default_model(minivllm: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    asked: list[tuple[Any, bool]] = []

    def fetch(model: str | None, *, show_progress: bool) -> tuple[hub.ModelSource, bool]:
        asked.append((model, show_progress))
        return hub.ModelSource("gguf", tmp_path / "m.gguf", "SmolLM2"), False

    monkeypatch.setattr(hub, "pull", fetch)
    assert "(fetched in " in minivllm("pull").out
    assert minivllm("pull", "--json").lines[0]["was_there"] is False
    assert asked == [(None, True), (None, False)]  # no progress beside JSON


# ------------------------------------------------------------------ plan
def test_plan_json_is_what_the_engine_reserves(minivllm: Run, model: Path, llm: LLM):
    [plan] = minivllm("plan", model, *SMALL, "--json").lines
    engine = llm.llm_engine.plan
    assert (plan["num_blocks"], plan["pool_bytes"]) == (engine.num_blocks, engine.pool_bytes)
    assert (plan["block_size"], plan["kv_bytes_per_token"]) == (16, engine.bytes_per_token)


def test_plan_takes_the_size_of_the_pool_in_blocks(minivllm: Run, model: Path):
    options = ("--num-gpu-blocks-override", "37", "--block-size", "8", "--max-model-len", "100")
    [plan] = minivllm("plan", model, *options, "--json").lines
    assert (plan["num_blocks"], plan["block_size"], plan["max_model_len"]) == (37, 8, 100)
    assert plan["rule"] == "num_gpu_blocks_override"


@pytest.mark.parametrize("name", ["llama", "bert-cls"])
def test_plan_is_a_table_with_the_arithmetic(minivllm: Run, tiny_model: Callable[[str], Path], name: str):
    result = minivllm("plan", tiny_model(name))
    assert result.code == 0 and name in result.out
    for label in ("weights", "per token", "per block", "RAM", "blocks", "tokens", "concurrency"):
        assert label in result.out


# ------------------------------------------------------------------ run-batch
def batch_line(custom_id: str, prompt: str = "the", **fields: Any) -> str:
    body = {"prompt": prompt, "max_tokens": 3, "temperature": 0, **fields}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body})


@pytest.fixture
def batch(tmp_path: Path) -> Path:
    """Two good lines, a bad one between them, an empty one at the end."""
    file = tmp_path / "in.jsonl"
    file.write_text("\n".join([batch_line("a"), "nonsense", batch_line("b"), ""]))
    return file


def ok(answers: list[dict[str, Any]]) -> list[bool]:
    return [answer["error"] is None for answer in answers]


def test_run_batch_prints_answers_in_order_and_a_summary_on_standard_error(minivllm: Run, model: Path, batch: Path):
    result = minivllm("run-batch", batch, "-m", model, *SMALL)
    assert result.code == 0 and ok(result.lines) == [True, False, True]
    assert [answer["custom_id"] for answer in result.lines] == ["a", None, "b"]
    assert "3 requests, 1 failed" in result.err


@pytest.mark.parametrize("name", ["-o", "--output", "--output-file"])
def test_run_batch_writes_a_file_and_prints_only_the_summary(
    minivllm: Run, model: Path, batch: Path, tmp_path: Path, name: str
):
    target = tmp_path / "out.jsonl"
    result = minivllm("run-batch", batch, name, target, "-m", model, *SMALL, "--json")
    assert result.lines == [{"requests": 3, "failed": 1, "output": str(target)}]
    assert ok([json.loads(line) for line in target.read_text().splitlines()]) == [True, False, True]
    assert minivllm("run-batch", batch, name, target, "-m", model, *SMALL).out == ""


def test_run_batch_takes_its_file_as_vllm_does_or_from_standard_input(minivllm: Run, model: Path, batch: Path):
    for name in ("-i", "--input-file"):
        assert ok(minivllm("run-batch", name, batch, "-m", model, *SMALL).lines) == [True, False, True]
    piped = minivllm("run-batch", "-", "-m", model, *SMALL, stdin=batch.read_text())
    assert ok(piped.lines) == [True, False, True]


@pytest.mark.parametrize("files", [(), ("one", "-i", "two")], ids=["none", "two"])
def test_run_batch_wants_exactly_one_file(minivllm: Run, files: tuple[str, ...]):
    result = minivllm("run-batch", *files)
    assert result.code == 2 and result.out == ""


def test_a_line_ends_only_at_a_newline(minivllm: Run, model: Path, tmp_path: Path):
    """JSON may hold U+2028 and U+0085 as they are; such a line was cut in two, and both halves were bad."""
    request = json.loads(batch_line("a", prompt="the \u2028 and \x85 end"))
    file = tmp_path / "in.jsonl"
    file.write_bytes(json.dumps(request, ensure_ascii=False).encode() + b"\r\n" + batch_line("b").encode())
    result = minivllm("run-batch", file, "-m", model, *SMALL)
    assert [answer["custom_id"] for answer in map(json.loads, result.out.rstrip("\n").split("\n"))] == ["a", "b"]


def test_text_without_a_utf8_form_spoils_only_its_own_line(minivllm: Run, model: Path, tmp_path: Path):
    """Half of a surrogate pair comes back in the custom_id: writing it lost the answers of all lines."""
    file, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [
        batch_line("a").encode(),
        batch_line("\ud800").encode(),
        b'{"custom_id": "\xff"}',
        batch_line("b").encode(),
    ]
    file.write_bytes(b"\n".join(lines))
    minivllm("run-batch", file, "-o", target, "-m", model, *SMALL)
    answers = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    assert [answer["custom_id"] for answer in answers] == ["a", "\ud800", "\udcff", "b"]
    assert ok(answers) == [True, True, False, True]
    assert minivllm("run-batch", file, "-m", model, *SMALL).out.count("\n") == 4


def test_an_output_that_cannot_be_written_is_said_before_the_work(
    minivllm: Run, model: Path, batch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It was found out at the end, and the answers were gone."""
    monkeypatch.setattr("minivllm.entrypoints.run_batch.run_batch_lines", lambda *_: pytest.fail("work was done"))
    target = tmp_path / "no such folder" / "out.jsonl"
    result = minivllm("run-batch", batch, "-o", target, "-m", model, *SMALL)
    assert result.code == 1 and result.message == f"error: cannot write {target}: No such file or directory"


def test_a_wrong_model_does_not_wipe_an_older_output(minivllm: Run, batch: Path, tmp_path: Path):
    target = tmp_path / "out.jsonl"
    target.write_text("precious")
    assert minivllm("run-batch", batch, "-o", target, "-m", "/no/such/model").code == 1
    assert target.read_text() == "precious"


# ------------------------------------------------------------------ errors
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "the", "-m", "/no/such/model"), "/no/such/model"),
        (("generate", "the", "-m", "TINY", "-t", "7"), "temperature must be a number in [0, 2], got 7.0"),
        (("generate", "", "-m", "TINY"), "prompt must not be empty"),
        (("generate", "the", "-m", "TINY", "--dtype", "int3"), "dtype must be auto, float32 or bfloat16, got 'int3'"),
        (("generate", "the", "-m", "TINY", "--max-model-len", "999"), "max_model_len must be at most 128"),
        (("generate", "the", "-m", "BERT"), "is an embedding model"),
        (("chat", "the", "-m", "BERT"), "error:"),
        (("embed", "", "-m", "BERT"), "prompt must not be empty"),
        (("run-batch", "/no/such/file"), "cannot read /no/such/file: No such file or directory"),
        (("run-batch", "/"), "cannot read /: Is a directory"),
        (("plan", "/no/such/model"), "/no/such/model"),
        (("plan", "TINY", "--num-gpu-blocks-override", "1"), "num_gpu_blocks_override must be an integer in [2, "),
        (("pull", "/no/such/model"), "/no/such/model"),
    ],
)
def test_an_error_is_one_message_and_exit_code_1(
    minivllm: Run, tiny_model: Callable[[str], Path], arguments: tuple[str, ...], message: str
):
    places = {"TINY": str(tiny_model("llama")), "BERT": str(tiny_model("bert-mean"))}
    small = () if arguments[0] in ("pull", "plan") else SMALL
    result = minivllm(*(places.get(word, word) for word in arguments), *small)
    assert (result.code, result.out) == (1, "") and "Traceback" not in result.err
    assert result.err.startswith("error: ") and message in result.message


def test_brackets_in_an_error_are_no_markup(minivllm: Run):
    """A model named [/x] ended in a traceback of the terminal library."""
    result = minivllm("generate", "the", "-m", "[/x]")
    assert result.code == 1 and "Model '[/x]' was not found" in result.message


def test_a_terminal_shows_the_error_in_a_frame(minivllm: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cli, "stderr", lambda: Console(file=sys.stderr, force_terminal=True, width=200))
    result = minivllm("plan", "[/x]")
    assert result.code == 1 and "╭" in result.err and "Model '[/x]' was not found" in result.message


@pytest.mark.parametrize(
    "arguments", [("generate", "-", *SMALL), ("chat", *SMALL), ("run-batch", "-", *SMALL)], ids=lambda words: words[0]
)
def test_standard_input_that_is_no_text_is_an_error(minivllm: Run, model: Path, arguments: tuple[str, ...]):
    result = minivllm(*arguments, "-m", model, stdin=b"\x89PNG\xff")
    assert result.code == 1 and "standard input must be UTF-8 text" in result.message


def test_an_interrupt_is_exit_code_130_without_a_traceback(minivllm: Run, model: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "stream", interrupted)
    for command in ("generate", "chat"):
        result = minivllm(command, "the", "-m", model, *SMALL)
        assert result.code == 130 and "Traceback" not in result.err


def test_a_reader_who_goes_away_is_no_traceback(minivllm: Run, model: Path, monkeypatch: pytest.MonkeyPatch):
    """`minivllm generate ... | head -1`"""

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("sys.stdout", Gone())
    result = minivllm("generate", "the", "-m", model, *GREEDY, *SMALL)
    assert result.code == 1 and "Traceback" not in result.err
