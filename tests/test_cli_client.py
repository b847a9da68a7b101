"""chat and complete against a server: the same answers as here, the /commands, and what goes wrong in words."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from minivllm import LLM, AsyncEngine, SamplingParams
from minivllm.entrypoints.server import make_server
from minivllm.entrypoints.service import ServerConfig
from tests.command import Result, Run
from tests.scripted_server import ScriptedServer, chat_event, events, scripted

ROOT = Path(__file__).parents[1]
GREEDY = ("-t", "0", "--max-tokens", "5")
PATIENCE = 60.0
END = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
ANSWER = events(chat_event(content="one "), chat_event(content="two"), END)


@pytest.fixture(scope="module")
def llm(tiny_model: Callable[[str], Path]) -> LLM:
    return LLM(tiny_model("llama"), num_gpu_blocks_override=64, dtype="float32")


@pytest.fixture(scope="module")
def url(llm: LLM) -> Iterator[str]:
    """A server with a key."""
    engine = AsyncEngine(llm.llm_engine, max_queue=4)
    server = make_server(engine, ServerConfig(port=0, served_model_names=("tiny", "other"), api_keys=("sesame",)))
    server.start()
    yield f"{server.url}/v1"
    server.stop()
    engine.shutdown()


def offline(tiny_model: Callable[[str], Path], run: Run, *arguments: str, stdin: str = "") -> Result:
    """The same command with the same model, loaded by the command itself."""
    small = ("--dtype", "float32", "--kv-cache-memory-bytes", "400000")
    return run(*arguments, "-m", tiny_model("llama"), *small, stdin=stdin)


def contents(server: ScriptedServer) -> list[list[tuple[str, str]]]:
    """The messages of every chat that the server was asked for."""
    bodies = [asked.body for asked in server.asked if asked.path.endswith("/chat/completions")]
    return [[(message["role"], message["content"]) for message in body["messages"]] for body in bodies]


# ------------------------------------------------------------------ against our own server
def test_complete_says_the_same_here_and_at_a_server(
    minivllm: Run, llm: LLM, url: str, tiny_model: Callable[[str], Path]
):
    here = offline(tiny_model, minivllm, "complete", "the value", *GREEDY)
    there = minivllm("complete", "the value", "--url", url, "--api-key", "sesame", *GREEDY)
    assert here.code == there.code == 0 and there.out == here.out
    assert "5 tokens, " in there.err and "tok/s, first token after" in there.err and "ended by length" in there.err
    piped = minivllm("complete", "-", "--url", url, "--api-key", "sesame", *GREEDY, stdin="the value")
    assert piped.out == here.out


def test_complete_is_generate_when_no_server_is_named(minivllm: Run, llm: LLM, tiny_model: Callable[[str], Path]):
    options = ("the", "-t", "1.5", "--top-p", "0.9", "--top-k", "40", "--seed", "7", "--stop", "zzz", *GREEDY[2:])
    complete = offline(tiny_model, minivllm, "complete", *options, "--json")
    generate = offline(tiny_model, minivllm, "generate", *options, "--json")
    assert complete.lines[0]["token_ids"] == generate.lines[0]["token_ids"]


def test_complete_json_from_a_server(minivllm: Run, llm: LLM, url: str):
    [found] = minivllm("complete", "the value", "--url", url, "--api-key", "sesame", *GREEDY, "--json").lines
    params = SamplingParams(temperature=0, max_tokens=5)
    expected = llm.generate("the value", params, use_tqdm=False)[0]
    assert set(found) == {"text", "finish_reason", "stop_reason", "usage"}
    assert (found["text"], found["finish_reason"]) == (expected.outputs[0].text, "length")
    assert found["usage"]["prompt_tokens"] == len(expected.prompt_token_ids)
    assert found["usage"]["completion_tokens"] == 5


def test_a_conversation_with_a_server_is_the_one_with_the_model(
    minivllm: Run, llm: LLM, url: str, tiny_model: Callable[[str], Path]
):
    turns = "the\nand\n/reset\nand\n"
    here = offline(tiny_model, minivllm, "chat", *GREEDY, "--json", "--system", "be", stdin=turns)
    there = minivllm("chat", "--url", url, "--api-key", "sesame", *GREEDY, "--json", "--system", "be", stdin=turns)
    assert [turn["text"] for turn in there.lines] == [turn["text"] for turn in here.lines]
    counts = [turn["usage"]["prompt_tokens"] for turn in there.lines]
    assert counts == [turn["usage"]["prompt_tokens"] for turn in here.lines] and counts[1] > counts[0]


def test_the_model_is_the_first_of_the_server_or_the_one_that_is_named(minivllm: Run, url: str):
    assert f"tiny at {url}. /help lists" in minivllm("chat", "--url", url, "--api-key", "sesame").err
    assert minivllm("chat", "hi", "-m", "other", "--url", url, "--api-key", "sesame", *GREEDY).code == 0
    result = minivllm("chat", "hi", "-m", "unknown", "--url", url, "--api-key", "sesame")
    assert result.code == 1 and "error: the server says 404: The model 'unknown' does not exist" in result.message


def test_the_key_comes_from_the_environment_as_well(minivllm: Run, url: str, monkeypatch: pytest.MonkeyPatch):
    for variable in ("MINIVLLM_API_KEY", "VLLM_API_KEY"):
        monkeypatch.setenv(variable, "sesame second")  # the server may read several, a client sends one
        assert minivllm("complete", "the", "--url", url, *GREEDY).code == 0
        monkeypatch.delenv(variable)
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")  # never without https
    result = minivllm("complete", "the", "--url", url, *GREEDY)
    assert result.code == 1 and "the server says 401" in result.message


def test_a_turn_that_a_server_refuses_is_forgotten(minivllm: Run, url: str):
    result = minivllm("chat", "--url", url, "--api-key", "sesame", *GREEDY, "--json", stdin=f"{'the ' * 5000}\nand\n")
    assert result.code == 0 and "the server says 400" in result.err and "(/reset starts afresh)" in result.err
    assert len(result.lines) == 1


# ------------------------------------------------------------------ commands
def test_the_conversation_that_a_server_is_told(minivllm: Run):
    turns = "a\n/system be brief\nb\n/system\n/reset\nc\n/etc/hosts is what?\n/exit\nd\n"
    with scripted(content=ANSWER) as server:
        result = minivllm("chat", "--url", server.url, "-m", "m", "--system", "be", stdin=turns)
    system, brief, answer = ("system", "be"), ("system", "be brief"), ("assistant", "one two")
    assert contents(server) == [
        [system, ("user", "a")],
        [brief, ("user", "a"), answer, ("user", "b")],
        [("user", "c")],
        [("user", "c"), answer, ("user", "/etc/hosts is what?")],
    ]
    assert result.out == "one two\n" * 4 and result.code == 0


def test_sampling_options_reach_the_server_and_nothing_else_does(minivllm: Run):
    options = ("-t", "0.5", "--top-p", "0.9", "--top-k", "3", "--seed", "4", "--stop", "x", "--stop", "y")
    with scripted(content=ANSWER) as server:
        minivllm("chat", "hi", "--url", server.url, "-m", "m", *options, "--max-tokens", "7")
        minivllm("chat", "hi", "--url", server.url, "-m", "m")
    wanted = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "seed": 4, "stop": ["x", "y"], "max_tokens": 7}
    plain = {"model", "messages", "stream", "stream_options"}
    first, second = (asked.body for asked in server.asked)
    assert {name: value for name, value in first.items() if name not in plain} == wanted
    assert set(second) == plain


def test_save_writes_the_conversation_once(minivllm: Run, tmp_path: Path):
    file = tmp_path / "talk 1.json"
    with scripted(content=ANSWER) as server:
        arguments = ("chat", "--url", server.url, "-m", "m", "--system", "bé")
        result = minivllm(*arguments, stdin=f"a\n/save {file}\n/save\nb\n/save {file}\n/save {tmp_path}/no/x\n")
    saved = json.loads(file.read_text(encoding="utf-8"))
    assert [message["content"] for message in saved["messages"]] == ["bé", "a", "one two"]
    assert "3 messages are in" in result.err and "/save needs the name of a file" in result.err
    assert f"cannot write {file}: File exists" in result.message and "No such file or directory" in result.message


def test_help_lists_the_commands_and_a_mistyped_one_is_not_sent(minivllm: Run):
    with scripted(content=ANSWER) as server:
        result = minivllm("chat", "--url", server.url, "-m", "m", stdin="/help\n/rest\n/ hm\n")
    assert contents(server) == []
    for command in ("/reset", "/system TEXT", "/save FILE", "/exit"):
        assert command in result.err
    assert "/rest is no command (/help lists them)" in result.err


def test_reasoning_is_shown_apart_and_not_sent_back(minivllm: Run):
    answer = events(
        chat_event(reasoning_content="hm"), chat_event(reasoning_content="m"), chat_event(content="yes"), END
    )
    with scripted(content=answer) as server:
        result = minivllm("chat", "--url", server.url, "-m", "m", stdin="a\nb\n")
    assert result.out == "<think>hmm</think>\nyes\n" * 2
    assert contents(server)[1][1] == ("assistant", "yes")


@pytest.fixture
def heard_interrupts() -> Iterator[None]:
    """A job in the background inherits that SIGINT is ignored, and would hand it on to the client."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard_interrupts")
def test_ctrl_c_stops_the_answer_and_not_the_program():
    """The connection is closed, so that the server stops; the turn is forgotten; the next line is answered."""
    with scripted(content=events(chat_event(content="one ")).removesuffix("data: [DONE]\n\n")) as server:
        server.hold.clear()
        command = [sys.executable, "-m", "minivllm.cli", "chat", "--url", server.url, "-m", "m"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        client = subprocess.Popen(command, cwd=ROOT, text=True, env={**os.environ, "COLUMNS": "200"}, **pipes)
        try:
            client.stdin.write("a\n")
            client.stdin.flush()
            assert client.stdout.read(4) == "one "
            client.send_signal(signal.SIGINT)
            assert server.gone.wait(PATIENCE)
            server.content = ANSWER.encode()
            server.hold.set()
            out, err = client.communicate("b\n", timeout=PATIENCE)
        finally:
            client.kill()
            client.wait()
    assert client.returncode == 0 and out.endswith("one two\n") and "stopped" in err
    assert contents(server) == [[("user", "a")], [("user", "b")]]


# ------------------------------------------------------------------ what goes wrong
def free_url() -> str:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        return f"http://127.0.0.1:{unused.getsockname()[1]}/v1"


@pytest.mark.parametrize("arguments", [("chat",), ("chat", "hi"), ("complete", "hi")], ids=" ".join)
def test_nothing_listens(minivllm: Run, arguments: tuple[str, ...]):
    url = free_url()
    result = minivllm(*arguments, "--url", url)
    assert (result.code, result.out) == (1, "")
    assert (
        result.message
        == f"error: nothing listens at {url}: start a server there (`minivllm serve`), or give its --url."
    )


def test_a_server_that_goes_away_ends_no_conversation(minivllm: Run):
    with scripted(content=ANSWER) as server:
        pass
    result = minivllm("chat", "--url", server.url, "-m", "m", stdin="a\nb\n")
    assert result.code == 0 and result.err.count("nothing listens at") == 2


def test_an_answer_that_breaks_off_is_an_error_behind_what_came(minivllm: Run):
    content = events(chat_event(content="one"), {"error": {"message": "out of memory"}})
    with scripted(content=content) as server:
        result = minivllm("chat", "hi", "--url", server.url, "-m", "m")
    assert (result.code, result.out) == (1, "one\n")
    assert result.message == "error: the server broke off: out of memory"


def test_a_server_without_models(minivllm: Run):
    with scripted(content='{"data": []}') as server:
        result = minivllm("chat", "hi", "--url", server.url)
    assert result.code == 1 and "serves no model" in result.message


def test_half_a_character_is_printed_escaped(minivllm: Run):
    with scripted(content=ANSWER.replace("one ", "\\ud800")) as server:
        assert minivllm("chat", "hi", "--url", server.url, "-m", "m").out == "\\ud800two\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--url", "http://a", "--dtype", "float32"), "--dtype is for a model that is loaded here"),
        (("--url", "http://a", "--max-model-len", "5"), "--max-model-len is for a model that is loaded here"),
        (("--api-key", "k"), "--api-key needs --url"),
    ],
    ids=["dtype", "max-model-len", "api-key"],
)
@pytest.mark.parametrize("command", ["chat", "complete"])
def test_options_of_the_other_way_are_wrong_usage(
    minivllm: Run, command: str, arguments: tuple[str, ...], message: str
):
    result = minivllm(command, "hi", *arguments)
    assert result.code == 2 and message in result.message


def test_a_url_that_is_none(minivllm: Run):
    result = minivllm("chat", "hi", "--url", "ftp://a")
    assert result.code == 1 and "url must be like http://127.0.0.1:8000/v1, got 'ftp://a'" in result.message


def test_asking_a_server_needs_no_torch(minivllm: Run):
    """A client starts in a fraction of a second."""
    code = "import sys; from minivllm.cli import app; sys.exit('torch' in sys.modules or 'flask' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
