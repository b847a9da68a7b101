"""What `minivllm serve` prints when it answers is true, and what its flags say reaches the engine."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from minivllm import LLM, AsyncEngine, ConfigError, InvalidRequestError
from minivllm.cli.ready import announce, curl_example, key_variable, sdk_example
from minivllm.config import DeviceConfig
from minivllm.entrypoints.server import make_server
from minivllm.entrypoints.service import ServerConfig, Service
from tests.command import Run
from tests.entrypoints.helpers import Web
from tests.scripted_server import scripted
from tests.test_cli_settings import GUIDE_OPTIMISED, GUIDE_PRODUCTION, words_of

ROOT = Path(__file__).parents[1]
PATIENCE = 60.0
HELLO = [{"role": "user", "content": "Hello"}]
SDK = re.compile(
    r"""  import \{ createOpenAI \} from '@ai-sdk/openai';
  import \{ (?P<call>\w+) \} from 'ai';
  const minivllm = createOpenAI\(\{ baseURL: (?P<url>".*"), apiKey: (?P<key>.*) \}\);
  const answer = await (?P=call)\(\{ model: minivllm\.(?P<model>\w+)\((?P<name>".*")\), (?P<argument>\w+): 'Hello' \}\);
  console\.log\(answer\.(?P<result>\w+)\);"""
)


class Started(NamedTuple):
    process: subprocess.Popen[str]
    lines: list[str]  # of standard output until the examples are there

    @property
    def url(self) -> str:
        return self.lines[0].split()[2]

    @property
    def curl(self) -> str:
        return self.lines[1].removeprefix("try: ")

    def stop(self) -> tuple[int, str]:
        """Exit code and standard error."""
        self.process.send_signal(signal.SIGTERM)
        _, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, err


@contextlib.contextmanager
def started(*arguments: str, num_lines: int = 8, **environment: str) -> Iterator[Started]:
    """`minivllm serve ARGUMENTS` as a process that answers."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MINIVLLM_", "VLLM_"))}
    process = subprocess.Popen(
        [sys.executable, "-m", "minivllm.cli", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**clean, "COLUMNS": "200", **environment},
    )
    try:
        lines = [process.stdout.readline().rstrip("\n") for _ in range(num_lines)]
        assert lines[0], process.stderr.read()
        yield Started(process, lines)
    finally:
        process.kill()
        process.communicate()


def run_curl(command: str, **environment: str) -> Any:
    """The JSON that the printed command gets: by curl itself where a shell has it, else read as a shell reads it."""
    if shutil.which("curl"):
        done = subprocess.run(
            ["sh", "-c", f"{command} --silent --fail --max-time {PATIENCE:.0f}"],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, **environment},
        )
        return json.loads(done.stdout)
    for name, value in environment.items():
        command = command.replace(f"${name}", value)
    program, url, *options = shlex.split(command)
    assert program == "curl"
    pairs = list(zip(options[::2], options[1::2], strict=True))
    headers = dict(value.split(": ", 1) for flag, value in pairs if flag == "-H")
    [body] = [value for flag, value in pairs if flag == "-d"]
    with urllib.request.urlopen(urllib.request.Request(url, body.encode(), headers), timeout=PATIENCE) as response:
        return json.loads(response.read())


# ------------------------------------------------------------------ the guide, started
def test_the_guides_optimised_command_line_starts_and_its_examples_are_true(tiny_model: Callable[[str], Path]):
    """All its flags; the model is a tiny one, and the memory what a test may take."""
    words = [*words_of(GUIDE_OPTIMISED), "--port", "0", "--num-gpu-blocks-override", "64"]
    words[1] = str(tiny_model("llama"))
    with started(*words) as server:
        assert re.fullmatch(
            r"minivllm ready: http://127\.0\.0\.1:\d+/v1  model llama  max_model_len 128  KV blocks 63", server.lines[0]
        )
        answer = run_curl(server.curl)
        assert answer["model"] == "llama" and answer["choices"][0]["message"]["role"] == "assistant"
        found = SDK.fullmatch("\n".join(server.lines[3:8]))
        assert server.lines[2] == "AI SDK:" and found
        assert (json.loads(found["url"]), json.loads(found["name"])) == (server.url, "llama")
        assert (found["call"], found["model"], found["key"]) == ("generateText", "chat", "'none'")
        code, err = server.stop()
    assert code == 0 and "--use-v2-block-manager has no effect" in err and "Traceback" not in err


def test_the_guides_production_command_line_starts_on_one_device(tiny_model: Callable[[str], Path], tmp_path: Path):
    """With its key and its name; 8192 tokens are more than the tiny model was made for. A file says the rest."""
    file = tmp_path / "serve.yaml"
    file.write_text("num-gpu-blocks-override: 64\nport: 1\nmax-logprobs: 2\nserved-model-name: never\n")
    command = GUIDE_PRODUCTION.replace("tensor-parallel-size 4", "tensor-parallel-size 1").replace("8192", "128")
    words = [*words_of(command, VLLM_API_KEY="sesame"), "--port", "0", "--config", str(file)]
    words[1] = str(tiny_model("llama"))
    with started(*words, num_lines=9) as server:
        assert server.lines[0].endswith("model llama-3-70b  max_model_len 128  KV blocks 63")
        assert "http://127.0.0.1:" in server.lines[0]  # 0.0.0.0 is no address to call
        assert "sesame" not in "\n".join(server.lines)
        assert server.lines[8] == "(both read the key from $VLLM_API_KEY: put one of yours there)"
        assert run_curl(server.curl, VLLM_API_KEY="sesame")["model"] == "llama-3-70b"
        found = SDK.fullmatch("\n".join(server.lines[3:8]))
        assert found and found["key"] == "process.env.VLLM_API_KEY"
        assert "is open to everybody" not in server.stop()[1]


@contextlib.contextmanager
def announced(llm: LLM, config: ServerConfig, as_json: bool = False) -> Iterator[None]:
    """A server in this process that has said that it is ready."""
    engine = AsyncEngine(llm.llm_engine, max_queue=4)
    server = make_server(engine, config)
    server.start()
    try:
        announce(server, as_json)
        yield
    finally:
        server.stop()
        engine.shutdown()


def test_an_embedding_model_has_other_examples_and_an_open_server_says_so(
    tiny_model: Callable[[str], Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "200")
    with announced(LLM(tiny_model("bert-mean")), ServerConfig(host="0.0.0.0", port=0)):
        out, err = capsys.readouterr()
        lines = out.splitlines()
        assert len(run_curl(lines[1].removeprefix("try: "))["data"][0]["embedding"]) == 64
    found = SDK.fullmatch("\n".join(lines[3:8]))
    assert found and (found["call"], found["model"]) == ("embed", "textEmbeddingModel")
    assert (found["argument"], found["result"]) == ("value", "embedding")
    assert "warning: 0.0.0.0 is open to everybody who can reach it: set --api-key" in err


def test_the_ready_line_as_json(tiny_model: Callable[[str], Path], capsys: pytest.CaptureFixture[str]):
    llm = LLM(tiny_model("llama"), num_gpu_blocks_override=64)
    with announced(llm, ServerConfig(port=0, served_model_names=("a", "b")), as_json=True):
        out, err = capsys.readouterr()
    facts = json.loads(out)
    assert facts.pop("url").startswith("http://127.0.0.1:") and err == ""
    assert facts == {"model": "a", "max_model_len": 128, "blocks": 63}


def test_the_token_of_the_hub_is_sent_to_the_hub(tmp_path: Path):
    """HF_TOKEN, as in the guide's containers."""
    with scripted(status=401) as hub:
        variables = {"HF_ENDPOINT": hub.url.removesuffix("/v1"), "HF_TOKEN": "hf_sesame", "HF_HOME": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-m", "minivllm.cli", "pull", "org/gated"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
            env={**os.environ, **variables, "HF_HUB_OFFLINE": "0"},
        )
    assert done.returncode == 1 and "org/gated" in done.stderr and "Traceback" not in done.stderr
    about_the_model = [asked for asked in hub.asked if "org/gated" in asked.path]
    assert {asked.headers.get("Authorization") for asked in about_the_model} == {"Bearer hf_sesame"}
    assert "hf_sesame" not in done.stdout + done.stderr


# ------------------------------------------------------------------ the examples
@pytest.mark.parametrize("name", ["tiny", "it's", 'a "b" $c `d`', "é\\n"])
def test_any_name_survives_shell_and_javascript(name: str):
    words = shlex.split(curl_example("http://h/v1", name, False, None))
    assert words[:2] == ["curl", "http://h/v1/chat/completions"]
    assert json.loads(words[-1]) == {"model": name, "messages": HELLO}
    echoed = subprocess.run(
        ["sh", "-c", curl_example("http://h/v1", name, False, None).replace("curl", "printf %s\\\\n", 1)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(echoed.stdout.splitlines()[-1])["model"] == name
    found = SDK.fullmatch(sdk_example("http://h/v1", name, False, None))
    assert found and json.loads(found["name"]) == name


def test_the_examples_read_the_key_from_the_variable_that_has_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.delenv("MINIVLLM_API_KEY", raising=False)
    assert key_variable(("one", "two")) == "VLLM_API_KEY"
    monkeypatch.setenv("MINIVLLM_API_KEY", "two")
    assert key_variable(("one", "two")) == "MINIVLLM_API_KEY"
    monkeypatch.setenv("MINIVLLM_API_KEY", "one two")  # several: no client can send that
    assert key_variable(("one", "two")) == "VLLM_API_KEY"


# ------------------------------------------------------------------ refused before a model is looked for
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ("--distributed-executor-backend", "uni"),
            1,
            "distributed_executor_backend must be one of mp, ray, got 'uni'",
        ),
        (("--pipeline-parallel-size", "2"), 1, "pipeline_parallel_size must be 1, got 2"),
        (("--data-parallel-size", "2"), 1, "data_parallel_size must be 1, got 2"),
        (("-tp", "0"), 1, "tensor_parallel_size must be an integer in [1, "),
        (("--speculative-config", '{"method": "ngram"}'), 1, "speculative_config.num_speculative_tokens is missing"),
        (
            ("--speculative-config", '{"method": "eagle", "num_speculative_tokens": 3}'),
            1,
            "ngram, draft_model, got 'eagle'",
        ),
        (("--speculative-config", "ngram"), 2, "--speculative-config must be a JSON object or null, got 'ngram'"),
        (("--device", "gpu"), 1, "device must be auto, cpu, cuda or cuda:NUMBER, got 'gpu'"),
        (("--max-logprobs", "21"), 1, "max_logprobs must be in [0, 20], got 21"),
        (("--tool-call-parser", "luck"), 1, "tool_call_parser must be one of auto, "),
        (("--reasoning-parser", "luck"), 1, "reasoning_parser must be one of "),
        (("--client-timeout", "0"), 1, "client_timeout must be more than 0 seconds"),
        (("--max-num-sequences", "4"), 2, "--max-num-seqs"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_not_built_is_refused_in_words(minivllm: Run, arguments: tuple[str, ...], code: int, message: str):
    result = minivllm("serve", "no/such-model", *arguments)
    assert (result.code, result.out) == (code, "") and message in result.message and "Traceback" not in result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--quantization", "awq"), "quantization must be one of int8, int4, gguf, int4+bf16, gguf+bf16, got 'awq'."),
        (("-q", "gguf"), "quantization gguf is for .gguf files, and this model is none"),
        (("--generation-config", "mine"), "generation_config must be one of auto, vllm, got 'mine'"),
        (("--chat-template", "/no/such/file"), "cannot read '/no/such/file': No such file or directory"),
        (("--chat-template", "{% for %}"), "chat_template must be a jinja template or a file with one: line 1: "),
        (("--scheduling-policy", "luck"), "scheduling_policy must be one of fcfs, priority, got 'luck'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_the_model_decides_is_refused_before_the_weights_are_read(
    minivllm: Run,
    tiny_model: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
):
    monkeypatch.setattr("minivllm.models.loader.load_model", lambda *_, **__: pytest.fail("weights were read"))
    result = minivllm("serve", tiny_model("llama"), "--port", "0", *arguments)
    assert (result.code, result.out) == (1, "") and message in result.message


def test_what_asks_for_nothing_is_accepted_with_a_word(minivllm: Run):
    flags = ("--trust-remote-code", "--swap-space", "4", "--enable-auto-tool-choice")
    result = minivllm("serve", "--print-config", *flags, "--disable-log-requests", "-tp", "1", "-q", "none")
    lines = result.err.splitlines()
    assert [line.split()[1] for line in lines] == [
        "--swap-space",
        "--enable-auto-tool-choice",
        "--trust-remote-code",
        "--disable-log-requests",
    ]
    assert all(line.startswith("warning: ") and " has no effect (" in line for line in lines)


# ------------------------------------------------------------------ settings reach the engine
SMALL = {"num_gpu_blocks_override": 32, "dtype": "float32"}


def test_the_models_own_sampling_defaults_can_be_switched_off(tiny_model: Callable[[str], Path], tmp_path: Path):
    """What ends an answer is no default: it stays."""
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "m")
    (folder / "generation_config.json").write_text(
        json.dumps({"temperature": 0.25, "top_k": 3, "eos_token_id": [0, 9]})
    )
    own = LLM(folder, **SMALL)
    api = LLM(folder, **SMALL, generation_config="vllm")
    assert (own.get_default_sampling_params().temperature, own.get_default_sampling_params().top_k) == (0.25, 3)
    assert (api.get_default_sampling_params().temperature, api.get_default_sampling_params().top_k) == (1.0, 0)
    assert own.llm_engine.eos_token_ids == api.llm_engine.eos_token_ids >= {0, 9}


def test_a_chat_template_from_a_file_or_as_text(tiny_model: Callable[[str], Path], tmp_path: Path):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    file = tmp_path / "t.jinja"
    file.write_text(template)
    for value in (file, str(file), template):
        llm = LLM(tiny_model("llama"), **SMALL, chat_template=value)
        prompt = llm.llm_engine.render_chat(HELLO)
        assert prompt["prompt_token_ids"] == llm.get_tokenizer().encode("<user>Hello", add_special_tokens=False)


def test_a_chat_template_that_is_no_text(tiny_model: Callable[[str], Path], tmp_path: Path):
    (tmp_path / "t.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not UTF-8 text") as caught:
        LLM(tiny_model("llama"), **SMALL, chat_template=tmp_path / "t.jinja")
    assert caught.value.parameter == "chat_template"


def test_one_device_and_no_quantisation_may_be_said(tiny_model: Callable[[str], Path]):
    LLM(tiny_model("llama"), **SMALL, tensor_parallel_size=1, quantization="none")
    with pytest.raises(ConfigError, match="tensor_parallel_size must be an integer in .1, 1024., got 0"):
        LLM(tiny_model("llama"), **SMALL, tensor_parallel_size=0)


def test_a_gpu_that_is_not_there_is_refused_in_words(minivllm: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = minivllm("serve", "no/such-model", "--port", "0", "--device", "cuda:1")
    assert (result.code, result.out) == (1, "") and "Traceback" not in result.err
    assert "device cuda:1 is not here: this machine has no GPU that torch can use" in result.message


def test_device_and_eager_steps_reach_the_engine(tiny_model: Callable[[str], Path]):
    llm = LLM(tiny_model("llama"), **SMALL, device="cpu", enforce_eager=True)
    assert llm.llm_engine.config.device == DeviceConfig("cpu", True)
    assert LLM(tiny_model("llama"), **SMALL).llm_engine.config.cache.gpu_memory_utilization == 0.25


def test_more_logprobs_than_the_server_gives_are_refused(tiny_model: Callable[[str], Path]):
    llm = LLM(tiny_model("llama"), **SMALL)
    engine = AsyncEngine(llm.llm_engine, max_queue=4)
    try:
        web = Web(engine, ServerConfig(max_logprobs=2))
        for fields in ({"logprobs": 3}, {"prompt_logprobs": 3}):
            reply = web.complete(max_tokens=1, **fields)
            assert reply.status == 400 and reply.error["param"] == next(iter(fields))
            assert "must be at most 2 on this server, got 3" in reply.error["message"]
        assert web.complete(max_tokens=1, logprobs=2).status == 200
        assert web.chat(max_tokens=1, logprobs=True, top_logprobs=3).status == 400
        assert web.chat(max_tokens=1, logprobs=True, top_logprobs=2).status == 200
        beams = web.complete(max_tokens=2, use_beam_search=True, best_of=3, temperature=0)
        assert beams.status == 200  # its own logprobs are nobody's wish
        none = Service(engine, ServerConfig(max_logprobs=0))
        with pytest.raises(InvalidRequestError, match="at most 0"):
            none.check_logprobs(llm.get_default_sampling_params().__class__(logprobs=1))
    finally:
        engine.shutdown()
