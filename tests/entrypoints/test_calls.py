"""What every call has: an id of its own, a line in the log without secrets, an end that is counted. And probes."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest

from minivllm import LLM, AsyncEngine
from minivllm.entrypoints.front import Front
from minivllm.entrypoints.logs import logging_to
from minivllm.entrypoints.request_ids import make_request_id
from minivllm.entrypoints.server import make_server
from minivllm.entrypoints.service import ServerConfig
from tests.engine.test_async_engine import Gate
from tests.entrypoints.helpers import CHAT, COMPLETIONS, EMBEDDINGS, HELLO, Web
from tests.entrypoints.test_lifecycle import running
from tests.entrypoints.test_server import get, raw

SHORT = {"temperature": 0, "max_tokens": 2, "ignore_eos": True}
OURS = r"[0-9a-f]{16}"


# ------------------------------------------------------------------ ids
@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ("", OURS),
        ("abc-1", f"abc-1-{OURS}"),
        ("() => crypto.randomUUID()", f"crypto.randomUUID-{OURS}"),  # what the AI SDK guide's code really sends
        ("a\r\nSet-Cookie: x\u00fc\u2028<b>", f"aSet-Cookiexb-{OURS}"),
        ("\u00e9\u00e8", OURS),
        ("x" * 100_000, f"x{{64}}-{OURS}"),
        ("\x00" * 100_000 + "tail", OURS),
    ],
    ids=["nothing", "plain", "source text", "injection", "no letters", "long", "late"],
)
def test_an_id_is_harmless_bounded_and_new(sent: str, expected: str):
    made = {make_request_id(sent) for _ in range(100)}
    assert len(made) == 100 and all(re.fullmatch(expected, one) for one in made)


def test_every_answer_bears_its_id_and_bodies_are_named_after_it(web: Web):
    seen = set()
    for path, body, prefix in (
        (CHAT, {"messages": HELLO, **SHORT}, "chatcmpl"),
        (COMPLETIONS, {"prompt": "the", **SHORT}, "cmpl"),
        (EMBEDDINGS, {"input": "the"}, "embd"),
    ):
        for _ in range(2):  # the same header, as a client may send it with every call
            reply = web.call("POST", path, body, headers={"X-Request-Id": "mine"})
            request_id = reply.headers["X-Request-Id"]
            assert re.fullmatch(f"mine-{OURS}", request_id) and reply.body["id"] == f"{prefix}-{request_id}"
            seen.add(request_id)
    assert len(seen) == 6
    stream = web.chat(stream=True, **SHORT)
    assert {event["id"] for event in stream.events[:-1]} == {f"chatcmpl-{stream.headers['X-Request-Id']}"}


def test_refusals_bear_an_id_too(engine: AsyncEngine):
    web = Web(engine, ServerConfig(api_keys=("key",), allowed_origins=("http://a.test",)))
    asks = {"Origin": "http://a.test", "Access-Control-Request-Method": "POST"}
    for reply in (
        web.get("/nothing"),
        web.get("/health"),
        web.call("OPTIONS", CHAT, headers=asks),
        web.get("/nothing", headers={"Authorization": "Bearer key"}),
        web.call("POST", CHAT, data=b"{", headers={"Authorization": "Bearer key", "Content-Type": "application/json"}),
    ):
        assert re.fullmatch(OURS, reply.headers["X-Request-Id"])
    reply = web.get("/health", headers={"Origin": "http://a.test"})
    assert "X-Request-Id" in reply.headers["Access-Control-Expose-Headers"]


def test_what_the_socket_layer_refuses_bears_an_id(engine: AsyncEngine):
    with running(make_server(engine, ServerConfig(port=0))) as server:
        reply = raw(server, b"GET /health HTTP/1.1\r\nX: " + b"x" * 70_000 + b"\r\n\r\n")
        assert reply.status == 431 and re.fullmatch(OURS, reply.headers["X-Request-Id"]) and reply.error
        assert get(server, "/health").headers.get_all("X-Request-Id") is not None


# ------------------------------------------------------------------ logs
@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """Lines as JSON, everything from debug on."""
    stream = io.StringIO()
    with logging_to(stream, "debug", "json"):
        yield stream


def lines(log: io.StringIO, logger: str = "minivllm.access") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in log.getvalue().splitlines()]
    return [line for line in found if line["logger"] == logger]


def test_one_line_for_each_call(web: Web, log: io.StringIO):
    replies = [
        web.complete(**SHORT),
        web.chat(stream=True, **SHORT),
        web.chat(temperature=9),
        web.get("/none?key=a-query-word"),
    ]
    found = lines(log)
    assert [(one["method"], one["path"], one["status"]) for one in found] == [
        ("POST", COMPLETIONS, 200),
        ("POST", CHAT, 200),
        ("POST", CHAT, 400),
        ("GET", "/none", 404),
    ]
    for one, reply in zip(found, replies, strict=True):
        assert one["request_id"] == reply.headers["X-Request-Id"] and one["level"] == "info" and one["whole"]
        assert one["bytes"] == len(reply.text.encode()) and 0 < one["seconds"] < 60
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", one["time"])
    assert "a-query-word" not in log.getvalue()


def test_probes_are_told_at_debug_only(web: Web):
    for level, count in (("info", 0), ("debug", 5)):
        stream = io.StringIO()
        with logging_to(stream, level, "json"):
            for path in ("/health", "/ready", "/live", "/metrics", "/load"):
                web.get(path)
        assert len(lines(stream)) == count


def test_a_client_that_leaves_in_the_middle_is_seen(web: Web, log: io.StringIO, gate: Gate):
    response = web.streamed(CHAT, messages=HELLO, **SHORT)
    next(iter(response.response))
    response.close()
    gate.open()
    (one,) = lines(log)
    assert (one["status"], one["whole"]) == (200, False) and one["message"].endswith(", cut")


SECRET, PROMPT = "sk-very-secret", "the vault opens with mnemosyne"


@pytest.mark.parametrize("form", ["text", "json"])
def test_neither_keys_nor_prompts_are_logged(engine: AsyncEngine, form: str):
    stream = io.StringIO()
    web = Web(engine, ServerConfig(api_keys=(SECRET,)))
    with logging_to(stream, "debug", form):
        for headers in ({"Authorization": f"Bearer {SECRET}"}, {"Authorization": f"Bearer {SECRET}x"}, {}):
            for body in (
                {"max_tokens": 2},
                {"max_tokens": 500, "made_up": 1},
                {"temperature": 9},
                {"stop": [PROMPT] * 9},
            ):
                web.call("POST", CHAT, {"messages": [{"role": "user", "content": PROMPT}], **body}, headers=headers)
                web.call("POST", COMPLETIONS, {"prompt": PROMPT, **body}, headers=headers)
    text = stream.getvalue()
    assert text.count("\n") >= 24 and "made_up" in text  # something was logged
    assert SECRET not in text and "mnemosyne" not in text


def test_bodies_are_logged_on_request(engine: AsyncEngine, log: io.StringIO):
    web = Web(engine, ServerConfig(log_requests=True, api_keys=(SECRET,)))
    reply = web.call("POST", COMPLETIONS, {"prompt": PROMPT, **SHORT}, headers={"Authorization": f"Bearer {SECRET}"})
    (one,) = lines(log, "minivllm.requests")
    assert PROMPT in one["message"] and one["request_id"] == reply.headers["X-Request-Id"]
    assert SECRET not in log.getvalue()


def test_a_path_cannot_forge_a_line(web: Web):
    for form in ("text", "json"):
        stream = io.StringIO()
        with logging_to(stream, "info", form):
            web.get("/x%0A2026-01-01T00:00:00.000Z%20INFO%20all%20is%20well%1B%5B2J%E2%80%A8")
        assert len(stream.getvalue().splitlines()) == 1 and "\x1b" not in stream.getvalue()


def test_an_exception_is_one_json_line_or_a_block_of_text(web: Web, monkeypatch: pytest.MonkeyPatch):
    def fail() -> None:
        raise ZeroDivisionError("inside")

    monkeypatch.setitem(web.app.view_functions, "version", fail)
    for form in ("json", "text"):
        stream = io.StringIO()
        with logging_to(stream, "info", form):
            reply = web.get("/version")
        assert reply.status == 500 and "inside" not in reply.text
        assert "ZeroDivisionError: inside" in stream.getvalue()
        if form == "json":
            (one,) = lines(stream, "minivllm.entrypoints.app")
            assert one["level"] == "error" and one["request_id"] == reply.headers["X-Request-Id"]


def test_access_lines_can_be_left_out_and_loggers_are_as_before(web: Web):
    loggers = [logging.getLogger(name) for name in ("minivllm", "waitress", "minivllm.access")]
    before = [(one.level, list(one.handlers)) for one in loggers]
    stream = io.StringIO()
    with logging_to(stream, "info", "text", access=False):
        web.get("/nothing")
        logging.getLogger("minivllm.other").warning("this one")
        logging.getLogger("minivllm.other").debug("not this one")
    assert stream.getvalue().count("\n") == 1 and "this one" in stream.getvalue()
    assert [(one.level, list(one.handlers)) for one in loggers] == before


# ------------------------------------------------------------------ around the application
def test_an_application_that_fails_is_still_counted_out(web: Web, engine: AsyncEngine):
    def fail(environ: Any, start_response: Any) -> Any:
        raise RuntimeError("before an answer began")

    broken = Front(fail, web.service, web.app.wsgi_app._metrics)
    with pytest.raises(RuntimeError):
        broken({"REQUEST_METHOD": "GET"}, lambda *_: None)
    assert web.service.num_in_flight == 0


def test_closing_twice_counts_once(web: Web):
    def answer(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [])
        return [b"one", b"two"]

    call = Front(answer, web.service, web.app.wsgi_app._metrics)({"REQUEST_METHOD": "GET"}, lambda *_: None)
    assert web.service.num_in_flight == 1
    assert list(call) == [b"one", b"two"] and web.service.num_in_flight == 1
    call.close()
    call.close()
    assert web.service.num_in_flight == 0


# ------------------------------------------------------------------ probes
def test_tokenizer_info_is_what_harnesses_read(web: Web, llm: LLM):
    body = web.get("/tokenizer_info").body
    tokenizer = llm.get_tokenizer()
    assert (body["eos_token"], body["bos_token"]) == ("<|endoftext|>", "<|im_start|>")
    assert body["chat_template"] == tokenizer.chat_template and isinstance(body["tokenizer_class"], str)
    assert body["model_max_length"] == 128 and body["added_tokens_decoder"]["0"] == "<|endoftext|>"
    assert "/tmp" not in json.dumps(body) and "name_or_path" not in body  # no path of ours


def test_tokenizer_info_without_a_tokenizer_is_refused(web: Web, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine.engine, "tokenizer", None)
    assert web.get("/tokenizer_info").status == 400
