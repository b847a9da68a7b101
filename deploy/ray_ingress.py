"""One endpoint in front of several servers: each call is passed on to one of them, byte for byte, as it comes.

    call ─▶ whose prompt begins like this? ─▶ a place at one of the servers ─▶ its bytes ─▶ client

A client that leaves closes the call, and with it the server's. A server that ends in the middle of an answer costs that
answer: an error event in a stream, else 502. One that is not there any more costs nothing: the call goes to another.

Knows no Ray and no engine: where the servers are, and who takes what, is its pool's business. Called by ray_serve.py.
Twin in vLLM: none (the router of vllm-project/production-stack).
"""

import asyncio
import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

import aiohttp
from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from minivllm.entrypoints.protocol import describe_error, error_body, to_json
from minivllm.entrypoints.service import ShuttingDownError
from minivllm.entrypoints.sse import DONE, frame
from minivllm.errors import MiniVLLMError

CHUNK_CHARS, MAX_CHUNKS = 64, 256  # of a prompt, for its beginnings; 64 characters are about one block of the cache
ATTEMPTS = 5  # to reach a server, before the client hears of it
PROBES = ("/health", "/v1/health", "/ready", "/ping")
PROBE_SECONDS = 5.0
# Between two machines only; the rest of a message is passed on.
HOP_BY_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "host"})
OWN_HEADERS = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")  # that are not added to what a client says
EVENT_END = b"\n\n"


class ReplicaGoneError(Exception):
    """This server has ended before it was asked; another one may be there."""


class Pool(Protocol):
    """The servers."""

    def lease(self, prefixes: list[str]) -> AbstractAsyncContextManager[str]:
        """The URL of the server that takes this call, and a place there until the call has ended.

        Raises ReplicaGoneError, MiniVLLMError.
        """

    async def urls(self) -> dict[str, str]:
        """name -> URL of all servers that are there."""


def prefixes_of(body: bytes) -> list[str]:
    """Keys of the beginnings of a prompt, the longest last: equal keys, equal beginnings. None for what has no prompt.

    Chained hashes as of blocks (core/block_hash.py), of characters: the ingress has no tokenizer.
    """
    try:
        given = json.loads(body)
    except ValueError:  # the server says it better
        return []
    if not isinstance(given, dict):
        return []
    prompt = next((given[name] for name in ("messages", "prompt", "input") if name in given), "")
    text = json.dumps(prompt, ensure_ascii=False).removesuffix("]").encode("utf-8", "replace")
    keys: list[str] = []
    for start in range(0, min(len(text), CHUNK_CHARS * MAX_CHUNKS) - CHUNK_CHARS + 1, CHUNK_CHARS):
        parent = keys[-1] if keys else ""
        keys.append(hashlib.sha256(parent.encode() + text[start : start + CHUNK_CHARS]).hexdigest()[:32])
    return keys


class Ingress:
    """max_body_bytes: of a call; a little more than the servers take, so that they say it."""

    def __init__(self, pool: Pool, max_body_bytes: int):
        self._pool = pool
        self._draining = False
        self.num_in_flight = 0
        self.app = web.Application(client_max_size=max_body_bytes + 4096, middlewares=[self._count, describe])
        self.app.router.add_get("/metrics", self._show_metrics)
        self.app.router.add_get("/live", self._show_alive)
        for path in PROBES:
            self.app.router.add_route("*", path, self._probe)
        self.app.router.add_route("*", "/{path:.*}", self._forward)
        self.app.cleanup_ctx.append(self._open_session)

    async def _open_session(self, app: web.Application) -> Any:
        """A connection per call: one that a server which has ended left behind would look like a lost answer."""
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=PROBE_SECONDS)
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=timeout, auto_decompress=False, skip_auto_headers=OWN_HEADERS
        )
        yield
        await self._session.close()

    async def drain(self, timeout_seconds: float) -> None:
        """Refuse new calls, and wait for those that run."""
        self._draining = True
        async with asyncio.timeout(timeout_seconds):
            while self.num_in_flight:
                await asyncio.sleep(0.05)

    @web.middleware
    async def _count(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.num_in_flight += 1
        try:
            return await handler(request)
        finally:
            self.num_in_flight -= 1

    # ------------------------------------------------------------------ calls
    async def _forward(self, request: web.Request) -> web.StreamResponse:
        if self._draining:
            raise ShuttingDownError("The server is shutting down.")
        body = await request.read()
        prefixes = prefixes_of(body)
        for _ in range(ATTEMPTS):
            try:
                async with self._pool.lease(prefixes) as url, await self._ask(request, url, body) as answer:
                    return await self._pass_on(request, answer)
            except (ReplicaGoneError, aiohttp.ClientConnectorError):
                continue
            except aiohttp.ClientError:  # it was asked, so nobody knows what it has done
                return json_error("The replica that had this request has ended.", 502)
        return json_error("No replica can be reached.", 503)

    async def _ask(self, request: web.Request, url: str, body: bytes) -> aiohttp.ClientResponse:
        headers = [(name, value) for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP]
        return await self._session.request(
            request.method, url + request.raw_path, headers=headers, data=body or None, allow_redirects=False
        )

    async def _pass_on(self, request: web.Request, answer: aiohttp.ClientResponse) -> web.StreamResponse:
        """The answer as it comes; a stream of events in whole events, so that an error can follow any of them."""
        response = web.StreamResponse(status=answer.status, reason=answer.reason)
        response.headers.extend(
            (name, value) for name, value in answer.headers.items() if name.lower() not in HOP_BY_HOP
        )
        has_events = answer.content_type == "text/event-stream"
        first = b"" if has_events else await answer.content.readany()  # none: 502 can still be said
        await response.prepare(request)
        await response.write(first)
        rest = b""
        try:
            async for data in answer.content.iter_any():
                if has_events:
                    whole, end, rest = (rest + data).rpartition(EVENT_END)
                    data = whole + end
                await response.write(data)
            await response.write(rest)
        except aiohttp.ClientError:
            if has_events:
                await response.write(frame(error_body("The replica that had this request has ended.", 502)) + DONE)
            elif request.transport is not None:
                request.transport.abort()  # or half an answer would look whole
        await response.write_eof()
        return response

    # ------------------------------------------------------------------ what watchers ask
    async def _show_alive(self, _: web.Request) -> web.Response:
        return web.Response(body=to_json({"status": "ok"}), content_type="application/json")

    async def _probe(self, request: web.Request) -> web.Response:
        """Healthy with one server that is."""
        answers = [] if self._draining else await self._ask_all(request)
        for _, status, text in answers:
            if status == 200:
                return web.Response(text=text, content_type="application/json")
        return json_error("No replica is ready.", 503, {"Retry-After": "5"})

    async def _show_metrics(self, request: web.Request) -> web.Response:
        """Of all servers; the label `replica` tells them apart."""
        answers = await self._ask_all(request)
        for _, status, text in answers:
            if status != 200:  # a key is wanted
                return web.Response(text=text, status=status, content_type="application/json")
        registry = CollectorRegistry(auto_describe=False)
        registry.register(Labelled({name: text for name, _, text in answers}))
        return web.Response(body=generate_latest(registry), headers={"Content-Type": "text/plain; version=0.0.4"})

    async def _ask_all(self, request: web.Request) -> list[tuple[str, int, str]]:
        """(name, status, text) of every server that answers."""
        headers = {"Accept-Encoding": "identity"}
        headers |= {name: request.headers[name] for name in ("Authorization",) if name in request.headers}

        async def ask(name: str, url: str) -> tuple[str, int, str] | None:
            try:
                async with (
                    asyncio.timeout(PROBE_SECONDS),
                    self._session.get(url + request.path, headers=headers) as got,
                ):
                    return name, got.status, await got.text()
            except (aiohttp.ClientError, TimeoutError):
                return None

        found = await asyncio.gather(*(ask(name, url) for name, url in (await self._pool.urls()).items()))
        return [one for one in found if one is not None]


class Labelled:
    """Several servers' metrics as one page. texts: name of the server -> its page."""

    def __init__(self, texts: dict[str, str]):
        self._texts = texts

    def collect(self) -> Iterator[Any]:
        """Every family once, with the samples of all."""
        families: dict[str, Any] = {}
        for replica, text in sorted(self._texts.items()):
            for family in text_string_to_metric_families(text):
                samples = [one._replace(labels={**one.labels, "replica": replica}) for one in family.samples]
                if family.name in families:
                    families[family.name].samples += samples
                else:
                    family.samples = samples
                    families[family.name] = family
        yield from families.values()


@web.middleware
async def describe(request: web.Request, handler: Any) -> web.StreamResponse:
    """Errors in the one shape that they have everywhere."""
    try:
        return await handler(request)
    except MiniVLLMError as error:
        status, body, headers = describe_error(error)
        return web.Response(body=to_json(body), status=status, headers=headers, content_type="application/json")
    except web.HTTPException as error:
        return json_error(error.reason, error.status)
    except Exception as error:
        logging.getLogger(__name__).exception("%s %s failed", request.method, request.path)
        status, body, _ = describe_error(error)
        return web.Response(body=to_json(body), status=status, content_type="application/json")


def json_error(message: str, status: int, headers: dict[str, str] | None = None) -> web.Response:
    """OpenAI's error body."""
    body = to_json(error_body(message, status))
    return web.Response(body=body, status=status, headers=headers, content_type="application/json")
