"""The client for other servers: what it sends, what it makes of good, odd, broken and absent answers."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

from minivllm.errors import InvalidRequestError
from minivllm.openai_client import OpenAIClient, Piece, RemoteError
from tests.scripted_server import chat_event, events, scripted

HELLO = [{"role": "user", "content": "hi"}]
END = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop", "stop_reason": "x"}]}
PATIENCE = 60.0


def pieces(content: str, status: int = 200) -> list[Piece]:
    with scripted(status, content) as server:
        return list(OpenAIClient(server.url).chat(HELLO, model="m"))


def failure(content: str, status: int = 200) -> RemoteError:
    with scripted(status, content) as server, pytest.raises(RemoteError) as caught:
        list(OpenAIClient(server.url).chat(HELLO, model="m"))
    return caught.value


# ------------------------------------------------------------------ requests
def test_a_request_carries_its_fields_its_key_and_asks_for_a_stream_with_usage():
    with scripted(content=events(END)) as server:
        list(OpenAIClient(server.url, "sesame").chat(HELLO, model="m", temperature=0, stop=["a"]))
        list(OpenAIClient(server.url).complete("once", model="m", max_tokens=3))
    stream = {"stream": True, "stream_options": {"include_usage": True}, "model": "m"}
    chat, completion = server.asked
    assert (chat.method, chat.path) == ("POST", "/v1/chat/completions")
    assert chat.body == {**stream, "messages": HELLO, "temperature": 0, "stop": ["a"]}
    assert chat.headers["Authorization"] == "Bearer sesame"
    assert chat.headers["Content-Type"] == "application/json"
    assert (completion.path, completion.body) == ("/v1/completions", {**stream, "prompt": "once", "max_tokens": 3})
    assert "Authorization" not in completion.headers


@pytest.mark.parametrize(
    ("suffix", "path"), [("", "/v1/models"), ("/", "/v1/models"), ("/v1/", "/v1/models"), ("/api/v3", "/api/v3/models")]
)
def test_the_path_of_the_url(suffix: str, path: str):
    with scripted(content='{"data": [{"id": "a"}, {"id": "b"}]}') as server:
        root = server.url.removesuffix("/v1")
        assert OpenAIClient(root + suffix).models() == ["a", "b"]
        assert OpenAIClient((root + suffix).removeprefix("http://")).models() == ["a", "b"]
    assert {asked.path for asked in server.asked} == {path}


@pytest.mark.parametrize("url", ["", "ftp://a/v1", "http://", "http://a:b/v1", "http://u:p@a/v1", "http:///v1"])
def test_a_bad_url_is_refused(url: str):
    with pytest.raises(InvalidRequestError, match="url must be like http://127") as caught:
        OpenAIClient(url)
    assert caught.value.parameter == "url"


@pytest.mark.parametrize("key", ["é", "a\r\nX: y"])
def test_a_key_that_no_header_can_carry_is_refused(key: str):
    with pytest.raises(InvalidRequestError, match="printable ASCII"):
        OpenAIClient("http://a", key)


# ------------------------------------------------------------------ answers
def test_an_answer_comes_in_pieces():
    usage = {"prompt_tokens": 3, "completion_tokens": 2}
    stream = events(
        chat_event(role="assistant", content=""), chat_event(content="Hé"), END, {"choices": [], "usage": usage}
    )
    assert pieces(stream) == [
        Piece(),
        Piece(text="Hé"),
        Piece(finish_reason="stop", stop_reason="x"),
        Piece(usage=usage),
    ]


def test_completions_and_reasoning_have_fields_of_their_own():
    completion = {"choices": [{"index": 0, "text": "abc", "finish_reason": "length"}]}
    stream = events(chat_event(reasoning_content="a"), chat_event(reasoning="b"), completion)
    assert pieces(stream) == [Piece(reasoning="a"), Piece(reasoning="b"), Piece(text="abc", finish_reason="length")]


@pytest.mark.parametrize(
    "content",
    [
        ": keep-alive\n\ndata: EVENT\n\ndata: [DONE]\n\n",
        "event: message\r\nid: 4\r\ndata:EVENT\r\n\r\ndata: [DONE]\r\n\r\n",
        "data: EVENT\n\n",  # some servers send no [DONE]
        "data: EVENT",
        "data: HALF1\ndata: HALF2\n\ndata: [DONE]\n\n",
    ],
    ids=["comment", "crlf", "no-done", "no-blank-line", "two-lines"],
)
def test_the_ways_to_write_a_stream(content: str):
    text = json.dumps(END)
    cut = text.index(" ") + 1
    content = content.replace("EVENT", text).replace("HALF1", text[:cut]).replace("HALF2", text[cut:])
    assert pieces(content) == [Piece(finish_reason="stop", stop_reason="x")]


def test_what_follows_done_is_not_read():
    assert len(pieces(events(END) + "data: nonsense\n\n")) == 1


def test_closing_the_answer_closes_the_connection():
    with scripted(content=events(chat_event(content="a")).removesuffix("data: [DONE]\n\n")) as server:
        server.hold.clear()
        answer = OpenAIClient(server.url, timeout_seconds=PATIENCE).chat(HELLO, model="m")
        assert next(answer).text == "a"
        assert not server.gone.is_set()
        answer.close()
        assert server.gone.wait(PATIENCE)


# ------------------------------------------------------------------ failures
def test_nothing_listens():
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(RemoteError, match=rf"nothing listens at http://127.0.0.1:{port}/v1: start a server"):
        OpenAIClient(f"http://127.0.0.1:{port}").models()


def test_a_host_that_does_not_exist():
    with pytest.raises(RemoteError, match="cannot be asked: "):
        OpenAIClient("http://host.invalid/v1").models()


def test_a_server_that_is_silent():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(RemoteError, match="was silent for"):
            OpenAIClient(url, timeout_seconds=0.05).models()


@pytest.mark.parametrize(
    ("status", "content", "message"),
    [
        (404, {"error": {"message": "no model x", "code": 404}}, "the server says 404: no model x"),
        (401, {"error": "Unauthorized"}, "the server says 401: Unauthorized"),
        (422, {"detail": [{"msg": "bad"}]}, "the server says 422: [{'msg': 'bad'}]"),
        (500, "<h1>\n Oops </h1>", "the server says 500: <h1> Oops </h1>"),
        (503, "", "the server says 503: Service Unavailable"),
        (302, "", "the server says 302: Found"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_a_refusal_is_told_in_the_servers_words(status: int, content: Any, message: str):
    error = failure(content if isinstance(content, str) else json.dumps(content), status)
    assert (str(error), error.status) == (message, status)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"data: {json.dumps(chat_event(content='a'))}\n\n", "ended the answer in the middle"),
        ("", "ended the answer in the middle"),
        ('data: {"error": {"message": "out of memory"}}\n\ndata: [DONE]\n\n', "the server broke off: out of memory"),
        ("data: nonsense\n\n", "no JSON object: 'nonsense'"),
        ("data: [5]\n\n", "no JSON object: '[5]'"),
    ],
    ids=["cut", "empty", "error-event", "nonsense", "list"],
)
def test_a_stream_that_goes_wrong(content: str, message: str):
    assert message in str(failure(content))


@pytest.mark.parametrize("content", ["", "[]", '{"data": [{}]}', '{"data": 5}', "[" * 100_000], ids=len)
def test_a_listing_that_is_none(content: str):
    with scripted(content=content) as server, pytest.raises(RemoteError, match="but not as OpenAI's API does"):
        OpenAIClient(server.url).models()


def test_a_server_that_speaks_no_http():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        import threading

        def talk() -> None:
            connection, _ = listener.accept()
            connection.recv(1000)
            connection.sendall(b"220 mail ready\r\n")
            connection.close()

        thread = threading.Thread(target=talk)
        thread.start()
        with pytest.raises(RemoteError, match="cannot be asked"):
            OpenAIClient(f"http://127.0.0.1:{listener.getsockname()[1]}").models()
        thread.join()
