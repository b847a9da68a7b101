"""Packed answers for those who ask, nothing packed for streams, and no packed questions."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable
from typing import Any

import pytest

from minivllm.entrypoints.compression import MIN_BYTES, choose_coding
from tests.entrypoints.helpers import CHAT, COMPLETIONS, HELLO, Web

UNPACK: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.decompress, "deflate": zlib.decompress}
LONG = {"path": "/v1/engine/capabilities"}  # some kilobytes


@pytest.mark.parametrize(
    ("wish", "coding"),
    [
        ("", None),
        ("identity", None),
        ("br", None),
        ("gzip", "gzip"),
        ("GZIP", "gzip"),
        ("x-gzip", "gzip"),
        ("deflate", "deflate"),
        ("gzip, deflate, br, zstd", "gzip"),
        ("deflate, gzip;q=0.5", "deflate"),
        ("deflate;q=0.4 , gzip;q=0.5", "gzip"),
        ("gzip;q=0", None),
        ("gzip;q=0.000, deflate", "deflate"),
        ("*", "gzip"),
        ("gzip;q=0, *", "deflate"),
        ("gzip;q=0, *;q=1", "deflate"),
        ("*;q=0", None),
        ("identity, gzip;q=0.5", None),
        ("identity;q=0.5, gzip", "gzip"),
        ("identity;q=0", None),
        ("gzip;q=x, deflate;q=nan", None),
        ("gzip;q=2", None),
        ("gzip;level=9", None),
        (";q=1,,=,", None),
    ],
    ids=lambda text: str(text) or "nothing",
)
def test_the_coding_is_the_one_that_the_client_likes_best(wish: str, coding: str | None):
    assert choose_coding(wish) == coding


def fetch(web: Web, coding: str | None, method: str = "GET", path: str = LONG["path"], **options: Any) -> Any:
    headers = {"Accept-Encoding": coding} if coding is not None else {}
    return web.client.open(path, method=method, headers=headers, **options)


@pytest.mark.parametrize("coding", UNPACK)
def test_a_long_answer_is_packed_and_says_so(web: Web, coding: str):
    plain = fetch(web, None)
    packed = fetch(web, coding)
    assert packed.headers["Content-Encoding"] == coding and "Content-Encoding" not in plain.headers
    assert len(plain.data) > MIN_BYTES and len(packed.data) < len(plain.data)
    assert UNPACK[coding](packed.data) == plain.data
    assert packed.headers["Content-Length"] == str(len(packed.data))
    for reply in (plain, packed):  # a cache must keep both
        assert "Accept-Encoding" in reply.headers["Vary"]


def test_a_short_answer_and_a_refusal_are_not_packed(web: Web):
    for path in ("/version", "/nothing"):
        reply = fetch(web, "gzip", path=path)
        assert "Content-Encoding" not in reply.headers and json.loads(reply.data)


def test_a_whole_completion_is_packed(web: Web):
    body = {"prompt": "the value is", "temperature": 0, "max_tokens": 40, "ignore_eos": True, "logprobs": 5}
    plain = fetch(web, None, "POST", COMPLETIONS, json=body)
    packed = fetch(web, "deflate, gzip", "POST", COMPLETIONS, json=body)
    assert json.loads(gzip.decompress(packed.data))["choices"] == json.loads(plain.data)["choices"]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_stream_is_never_packed(web: Web, path: str):
    body = {"messages": HELLO} if path == CHAT else {"prompt": "the"}
    body |= {"stream": True, "max_tokens": 60, "ignore_eos": True, "logprobs": path == CHAT or 1}
    reply = fetch(web, "gzip, deflate", "POST", path, json=body)
    assert "Content-Encoding" not in reply.headers and len(reply.data) > MIN_BYTES
    assert b"data: {" in reply.data[:40] and reply.data.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "GZIP", "gzip, gzip"])
def test_a_packed_question_is_refused_by_name(web: Web, coding: str):
    packed = gzip.compress(json.dumps({"messages": HELLO}).encode())
    headers = {"Content-Encoding": coding, "Content-Type": "application/json"}
    reply = web.call("POST", CHAT, data=packed, headers=headers)
    assert reply.status == 415 and repr(coding.lower()) in reply.error["message"]
    assert "Content-Encoding" in reply.error["message"] and reply.headers["Accept-Encoding"] == "identity"


def test_a_question_that_says_it_is_not_packed_is_read(web: Web):
    reply = web.call("POST", CHAT, {"messages": HELLO, "max_tokens": 1}, headers={"Content-Encoding": "identity"})
    assert reply.status == 200
