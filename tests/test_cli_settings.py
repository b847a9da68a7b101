"""Where the value of an option comes from: command line, environment, --config file, default. And the help."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from minivllm import cli
from tests.command import Result, Run

COMMANDS = tuple(typer.main.get_command(cli.app).commands)
# The guide's three command lines. The third cannot be run as it stands there: a comment behind a backslash.
GUIDE_BASIC = r"""
vllm serve meta-llama/Meta-Llama-3-8B-Instruct \
  --host 0.0.0.0 \
  --port 8000
"""
GUIDE_PRODUCTION = r"""
vllm serve meta-llama/Meta-Llama-3-70B-Instruct \
  --host 0.0.0.0 \
  --port 8000 \
  --tensor-parallel-size 4 \
  --max-model-len 8192 \
  --gpu-memory-utilization 0.95 \
  --enable-prefix-caching \
  --enable-chunked-prefill \
  --api-key $VLLM_API_KEY \
  --served-model-name llama-3-70b
"""
GUIDE_OPTIMISED = r"""
vllm serve meta-llama/Meta-Llama-3-8B-Instruct \
  --enable-prefix-caching \
  --enable-chunked-prefill \
  --use-v2-block-manager \
  --max-parallel-loading-workers 4 \
  --gpu-memory-utilization 0.95
"""
# Its containers, their variables filled in.
GUIDE_DOCKER = "vllm serve $M --host 0.0.0.0 --port 8000 --tensor-parallel-size 1 --gpu-memory-utilization 0.9"
GUIDE_COMPOSE = "vllm serve $M --host 0.0.0.0 --port 8000 --api-key $VLLM_API_KEY --gpu-memory-utilization 0.9"


def words_of(command: str, **variables: str) -> list[str]:
    """What a shell makes of a command line, without the name of the program."""
    joined = command.replace("\\\n", " ")
    for name, value in variables.items():
        joined = joined.replace(f"${name}", value)
    return shlex.split(joined)[1:]


def printed(result: Result) -> dict[str, tuple[Any, str]]:
    """--print-config --json: option -> (value, where it comes from)."""
    assert result.code == 0, result.err
    [settings] = result.lines
    return {name: (entry["value"], entry["source"]) for name, entry in settings.items()}


def given(result: Result) -> dict[str, Any]:
    """What is not a default."""
    return {name: value for name, (value, source) in printed(result).items() if source != "default"}


# ------------------------------------------------------------------ the guide's command lines
def test_the_guides_basic_command_line(minivllm: Run):
    result = minivllm(*words_of(GUIDE_BASIC), "--print-config", "--json")
    model = "meta-llama/Meta-Llama-3-8B-Instruct"
    assert given(result) == {"model": model, "host": "0.0.0.0", "port": 8000}
    assert "would not start" not in result.err


def test_the_guides_production_command_line_is_read_whole(minivllm: Run):
    result = minivllm(*words_of(GUIDE_PRODUCTION, VLLM_API_KEY="sesame"), "--print-config", "--json")
    expected = {"host": "0.0.0.0", "port": 8000, "tensor-parallel-size": 4, "max-model-len": 8192}
    expected |= {"gpu-memory-utilization": 0.95, "enable-prefix-caching": True, "enable-chunked-prefill": True}
    expected |= {"api-key": "1 given, hidden", "served-model-name": ["llama-3-70b"]}
    assert given(result) == expected | {"model": "meta-llama/Meta-Llama-3-70B-Instruct"}
    assert "would not start" not in result.err


def test_the_guides_production_command_line_says_what_is_not_built(minivllm: Run):
    other = ("--distributed-executor-backend", "uni")
    result = minivllm(*words_of(GUIDE_PRODUCTION, VLLM_API_KEY="sesame"), *other, "--print-config", "--json")
    assert "would not start: distributed_executor_backend must be one of mp, ray, got 'uni'" in result.message
    result = minivllm(*words_of(GUIDE_PRODUCTION, VLLM_API_KEY="sesame"), *other)
    assert result.code == 1 and result.out == ""
    assert "error: distributed_executor_backend must be one of mp, ray, got 'uni'" in result.message


def test_the_guides_optimised_command_line_warns_about_what_is_gone(minivllm: Run):
    result = minivllm(*words_of(GUIDE_OPTIMISED), "--print-config", "--json")
    assert given(result)["max-parallel-loading-workers"] == 4 and given(result)["use-v2-block-manager"] is True
    warnings = result.err.splitlines()
    assert warnings == [
        "warning: --use-v2-block-manager has no effect (deprecated: there is only one block manager)",
        "warning: --max-parallel-loading-workers has no effect (deprecated: weights are read by one thread)",
    ]


@pytest.mark.parametrize("command", [GUIDE_DOCKER, GUIDE_COMPOSE], ids=["docker", "compose"])
def test_the_guides_containers(minivllm: Run, command: str):
    result = minivllm(*words_of(command, M="a/b", VLLM_API_KEY="k"), "--print-config", "--json")
    assert given(result)["gpu-memory-utilization"] == 0.9 and given(result)["model"] == "a/b"
    assert result.err == ""


def test_a_comment_behind_a_backslash_is_told_in_words(minivllm: Run):
    r"""`\      # Cache` is a blank word for the shell, and the rest of the command is lost."""
    result = minivllm("serve", "m", "--enable-prefix-caching", " ")
    assert result.code == 2 and "a backslash must be the last character of its line" in result.message


def test_an_empty_variable_is_told_in_words(minivllm: Run):
    """`--api-key $NOT_SET --port 8` made the next flag the key."""
    result = minivllm("serve", "m", "--api-key", "--served-model-name", "x")
    assert result.code == 2 and "--api-key needs a value, and --served-model-name follows" in result.message
    assert given(minivllm("serve", "--api-key=--served-model-name", "--print-config", "--json"))["api-key"]


def test_underscores_are_hyphens_as_in_vllm(minivllm: Run):
    options = ("--max_model_len", "77", "--no_enable_prefix_caching", "--served_model_name=a_b", "-tp", "1")
    found = given(minivllm("serve", *options, "--print-config", "--json"))
    expected = {"max-model-len": 77, "enable-prefix-caching": False, "served-model-name": ["a_b"]}
    assert found == expected | {"tensor-parallel-size": 1}


# ------------------------------------------------------------------ precedence
def test_line_over_environment_over_file_over_default(minivllm: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    file = tmp_path / "serve.yaml"
    file.write_text("port: 1\nmax-num-seqs: 2\nblock_size: 8\n")
    monkeypatch.setenv("MINIVLLM_PORT", "3")
    monkeypatch.setenv("MINIVLLM_MAX_NUM_SEQS", "4")
    found = printed(minivllm("serve", "--config", file, "--port", "5", "--print-config", "--json"))
    assert found["port"] == (5, "command line")
    assert found["max-num-seqs"] == (4, "MINIVLLM_MAX_NUM_SEQS")
    assert found["block-size"] == (8, f"{file}:3")
    assert found["max-num-batched-tokens"] == (1024, "default")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_variable(minivllm: Run, monkeypatch: pytest.MonkeyPatch, command: str):
    """A value that no option takes is refused with the variable's name; so every variable is read."""
    parameters = typer.main.get_command(cli.app).commands[command].params
    arguments = ["x" for parameter in parameters if parameter.param_type_name == "argument" and parameter.required]
    for option in parameters:
        if option.param_type_name == "option" and type(option.default) in (int, float):
            flag = next(flag for flag in option.opts if flag.startswith("--"))
            variable = f"MINIVLLM_{flag[2:].replace('-', '_').upper()}"
            monkeypatch.setenv(variable, "many")
            result = minivllm(command, *arguments)
            assert result.code == 2 and f"(it comes from: {variable})" in result.message
            monkeypatch.delenv(variable)


def test_variables_of_flags_and_of_options_that_may_be_repeated(minivllm: Run, monkeypatch: pytest.MonkeyPatch):
    for name, value in {
        "MINIVLLM_ENABLE_PREFIX_CACHING": "false",
        "MINIVLLM_BATCH_INVARIANT": "1",
        "MINIVLLM_SERVED_MODEL_NAME": "a b",
        "MINIVLLM_MODEL": "some/model",
        "MINIVLLM_MAX_MODEL_LEN": "",  # docker compose writes this for a variable that is not set
    }.items():
        monkeypatch.setenv(name, value)
    found = given(minivllm("serve", "--print-config", "--json"))
    expected = {"enable-prefix-caching": False, "batch-invariant": True, "served-model-name": ["a", "b"]}
    assert found == expected | {"model": "some/model"}


def test_a_model_on_the_command_line_wins_over_one_from_elsewhere(minivllm: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MINIVLLM_MODEL", "/from/environment")
    assert "/from/line" in minivllm("serve", "/from/line", "--port", "0").message
    assert "/from/environment" in minivllm("serve", "--port", "0").message
    assert printed(minivllm("serve", "/l", "--print-config", "--json"))["model"] == ("/l", "command line")


def test_the_address_that_kubernetes_sets_is_no_port(minivllm: Run, monkeypatch: pytest.MonkeyPatch):
    """A service named minivllm sets MINIVLLM_PORT for every pod."""
    monkeypatch.setenv("MINIVLLM_PORT", "tcp://10.0.0.1:8000")
    result = minivllm("serve", "--print-config", "--json")
    assert printed(result)["port"] == (8000, "default") and "Kubernetes" in result.err


@pytest.mark.parametrize("variable", ["VLLM_API_KEY", "MINIVLLM_API_KEY"])
def test_keys_come_from_the_environment_and_are_never_printed(
    minivllm: Run, monkeypatch: pytest.MonkeyPatch, variable: str
):
    monkeypatch.setenv(variable, "sesame other")
    for options in ((), ("--json",)):
        result = minivllm("serve", "--print-config", *options)
        assert "2 given, hidden" in result.out and variable in result.out
        assert "sesame" not in result.out + result.err


# ------------------------------------------------------------------ --config
CONFIG = """
# as vLLM's
model: org/name
host: 0.0.0.0
port: 8001
api-key:
  - one
  - two
served_model_name: 0123
enable-prefix-caching: no
gpu-memory-utilization: 0.5
allowed-origins: ["http://a.test"]
speculative-config: {method: ngram, num_speculative_tokens: 4}
max-model-len:
"""


def test_a_config_file_as_vllm_has_it(minivllm: Run, tmp_path: Path):
    (tmp_path / "c.yaml").write_text(CONFIG)
    result = minivllm("serve", "--config", tmp_path / "c.yaml", "--print-config", "--json")
    found = given(result)
    assert json.loads(found.pop("speculative-config")) == {"method": "ngram", "num_speculative_tokens": 4}
    assert json.loads(found.pop("allowed-origins")) == ["http://a.test"]
    expected = {"model": "org/name", "host": "0.0.0.0", "port": 8001, "api-key": "2 given, hidden"}
    expected |= {"served-model-name": ["0123"], "enable-prefix-caching": False, "gpu-memory-utilization": 0.5}
    assert found == expected  # an empty value is not given, and 0123 is not 83


def test_the_variable_of_the_config_file(minivllm: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "c.yaml").write_text("port: 8001")
    monkeypatch.setenv("MINIVLLM_CONFIG", str(tmp_path / "c.yaml"))
    assert given(minivllm("serve", "--print-config", "--json")) == {"port": 8001}


def test_what_print_config_prints_can_be_read_again(minivllm: Run, tmp_path: Path):
    options = ("--port", "7", "--no-enable-chunked-prefill", "--served-model-name", 'a "b" é', "--api-key", "k")
    first = minivllm("serve", "org/name", *options, "--print-config")
    (tmp_path / "c.yaml").write_text(first.out)
    again = given(minivllm("serve", "--config", tmp_path / "c.yaml", "--print-config", "--json"))
    for name, value in {"model": "org/name", "port": 7, "served-model-name": ['a "b" é'], "block-size": 16}.items():
        assert again[name] == value
    assert again["enable-chunked-prefill"] is False
    assert "api-key" not in again  # hidden: it must not be read as the key
    assert yaml.safe_load(first.out)["port"] == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("port: 1\nmax-num-seq: 3", "c.yaml:2: there is no option 'max-num-seq'; did you mean max-num-seqs?"),
        ("wholly_unknown: 3", "c.yaml:1: there is no option 'wholly_unknown'"),
        ("no-enable-prefix-caching: true", "did you mean enable-prefix-caching?"),
        ("port: 1\nport: 2", "c.yaml:2: port stands twice"),
        ("config: other.yaml", "c.yaml:1: config is for the command line only"),
        ("port: many", "c.yaml:1)"),
        ("enable-prefix-caching: perhaps", "c.yaml:1)"),
        ("- port", "c.yaml must hold lines of `option: value`"),
        ("port: [", "c.yaml is not YAML"),
        ("port: {a: 1}", "c.yaml:1)"),
        ("port: !!python/object/apply:os.getcwd []", "c.yaml:1: the value of port is more than text"),
        ("port: {a: 2026-01-31}", "c.yaml:1: the value of port is more than text"),
        ("port: &a [*a]", "c.yaml:1: the value of port is more than text"),
    ],
)
def test_a_wrong_config_file_is_wrong_usage_with_the_place(minivllm: Run, tmp_path: Path, text: str, message: str):
    (tmp_path / "c.yaml").write_text(text)
    result = minivllm("serve", "--config", tmp_path / "c.yaml", "--print-config")
    assert result.code == 2 and result.out == "" and message in result.message


def test_a_config_file_that_cannot_be_read(minivllm: Run, tmp_path: Path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for name, reason in {"none": "No such file", "bytes": "is not UTF-8 text", ".": "Is a directory"}.items():
        result = minivllm("serve", "--config", tmp_path / name)
        assert result.code == 2 and reason in result.message


def test_print_config_loads_nothing(minivllm: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("minivllm.llm.LLM.__init__", lambda *_, **__: pytest.fail("a model was loaded"))
    assert minivllm("serve", "no/such-model", "--print-config").code == 0


# ------------------------------------------------------------------ help
@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_names_every_option_whole_at_80_columns(minivllm: Run, monkeypatch: pytest.MonkeyPatch, command: str):
    """typer's own table has --max-num-batched-… there."""
    monkeypatch.setenv("COLUMNS", "80")
    result = minivllm(command, "--help")
    parameters = typer.main.get_command(cli.app).commands[command].params
    names = [name for p in parameters if p.param_type_name == "option" for name in (*p.opts, *p.secondary_opts)]
    assert [name for name in names if name not in result.out] == []
    assert "…" not in result.out and max(map(len, result.out.splitlines())) <= 80


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_with_a_value_has_a_unit_and_every_default_is_shown(minivllm: Run, command: str):
    result = minivllm(command, "--help")
    for option in typer.main.get_command(cli.app).commands[command].params:
        if option.param_type_name == "option" and not option.is_flag:
            assert option.metavar, option.name
            if option.default is not None:
                line = next(line for line in result.out.splitlines() if f" {option.opts[0]}" in line)
                assert f" {option.metavar}  [default: {option.default}]" in line


def test_the_help_of_serve_is_in_panels(minivllm: Run):
    out = minivllm("serve", "--help").out
    for panel in ("Arguments", "Settings", "Server", "Model", "Engine", "Devices", "Accepted, without effect"):
        assert f"╭─ {panel} ─" in out
    assert "--enable-prefix-caching, --no-enable-prefix-caching  [default: on]" in out
    assert "MINIVLLM_MAX_MODEL_LEN" in out
