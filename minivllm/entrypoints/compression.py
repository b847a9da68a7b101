"""Answers made smaller when the client asks for it: gzip or deflate, above 1 KB, never a stream.

A stream is many small pieces, each wanted at once; a compressor would hold them back.
Called by app.py. Twin in vLLM: none.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Mapping
from types import MappingProxyType

from flask import Response

MIN_BYTES = 1024
LEVEL = 6
CODINGS: Mapping[str, Callable[[bytes], bytes]] = MappingProxyType(
    {
        "gzip": lambda body: gzip.compress(body, LEVEL, mtime=0),
        "deflate": lambda body: zlib.compress(body, LEVEL),
    }
)


def compress(response: Response, accept_encoding: str) -> None:
    """Encode the body as the client likes it best; plain when it likes that better, or says nothing."""
    if response.is_streamed or response.direct_passthrough or "Content-Encoding" in response.headers:
        return
    body = response.get_data()
    if len(body) <= MIN_BYTES:
        return
    response.vary.add("Accept-Encoding")
    coding = choose_coding(accept_encoding)
    if coding is not None:
        response.set_data(CODINGS[coding](body))
        response.headers["Content-Encoding"] = coding


def choose_coding(accept_encoding: str) -> str | None:
    """A key of CODINGS. A client that refuses everything, identity too, gets identity: better than nothing."""
    wishes = dict(_wish(part) for part in accept_encoding.lower().split(","))
    anything = wishes.get("*", 0.0)
    weights = {name: wishes.get(name, wishes.get(f"x-{name}", anything)) for name in CODINGS}
    best = max(CODINGS, key=lambda name: weights[name])  # gzip when both are equal
    return best if weights[best] > wishes.get("identity", 0.0) else None


def _wish(part: str) -> tuple[str, float]:
    """`gzip;q=0.5` -> ("gzip", 0.5). What cannot be read is not wished."""
    name, _, rest = part.partition(";")
    key, _, value = rest.partition("=")
    if not rest.strip():
        return name.strip(), 1.0
    try:
        weight = float(value) if key.strip() == "q" else 0.0
    except ValueError:
        weight = 0.0
    return name.strip(), weight if 0.0 <= weight <= 1.0 else 0.0
