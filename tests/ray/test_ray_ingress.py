"""The ingress in front of servers that do what a test wants: gone, ending in the middle, slow. No Ray runs here."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from ray_ingress import Ingress, ReplicaGoneError

from minivllm.errors import OverloadedError

MAX_BODY_BYTES = 1 << 16
HEAD = "HTTP/1.1 200 OK\r\nContent-Type: {}\r\n{}Connection: close\r\n\r\n"
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Given:
    """A pool of what it was given, one after the other: a URL or an error."""

    def __init__(self, *servers: str | Exception):
        self.servers = list(servers)
        self.num_leases = 0
        self.prefixes: list[str] = []

    @contextlib.asynccontextmanager
    async def lease(self, prefixes: list[str]) -> AsyncIterator[str]:
        self.prefixes = prefixes
        server = self.servers.pop(0) if len(self.servers) > 1 else self.servers[0]
        if isinstance(server, Exception):
            raise server
        self.num_leases += 1
        try:
            yield server
        finally:
            self.num_leases -= 1

    async def urls(self) -> dict[str, str]:
        return {str(number): url for number, url in enumerate(self.servers) if isinstance(url, str)}


@contextlib.asynccontextmanager
async def endpoint(pool: Given) -> AsyncIterator[tuple[str, Ingress]]:
    ingress = Ingress(pool, MAX_BODY_BYTES)
    runner = web.AppRunner(ingress.app, handler_cancellation=True, shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", ingress
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def server(serve: Serve) -> AsyncIterator[str]:
    """serve: what it does with a connection after the request's head has come."""

    connections: set[Any] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.add(asyncio.current_task())
        with contextlib.suppress(ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            await serve(reader, writer)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    listening = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with listening:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        await asyncio.gather(*connections)


def says(*pieces: str, kind: str = "application/json", length: int | None = None) -> Serve:
    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD.format(kind, "" if length is None else f"Content-Length: {length}\r\n").encode())
        for piece in pieces:
            writer.write(piece.encode())
            await writer.drain()
            await asyncio.sleep(0.02)

    return serve


@pytest.fixture
def nobody() -> Iterator[str]:
    """The URL of a server that has ended: its port is taken, and nobody listens."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{silent.getsockname()[1]}"


async def ask(url: str, path: str = "/v1/completions", **body: Any) -> tuple[int, bytes, Any]:
    async with aiohttp.ClientSession() as session, session.post(url + path, json=body) as answer:
        return answer.status, await answer.read(), answer.headers


def test_a_server_that_is_not_there_any_more_costs_nothing(nobody: str):
    async def run() -> None:
        async with server(says('{"a": 1}', length=8)) as url:
            pool = Given(nobody, ReplicaGoneError(), url)
            async with endpoint(pool) as (address, ingress):
                assert (await ask(address, prompt="x" * 100))[:2] == (200, b'{"a": 1}')
                assert len(pool.prefixes) == 1 and pool.num_leases == ingress.num_in_flight == 0

    asyncio.run(run())


def test_nobody_there_and_too_much_are_errors_that_say_so(nobody: str):
    async def run() -> None:
        for given, status, message in (
            (nobody, 503, "No replica can be reached."),
            (ReplicaGoneError(), 503, "No replica can be reached."),
            (OverloadedError("full"), 429, "full"),
            (RuntimeError("a secret"), 500, "The server failed to answer this request."),
        ):
            async with endpoint(Given(given)) as (address, _):
                found, text, headers = await ask(address)
                assert (found, json.loads(text)["error"]["message"]) == (status, message)
                assert (status == 429) == ("Retry-After" in headers)

    asyncio.run(run())


def test_a_stream_that_ends_in_the_middle_of_an_event_has_whole_events_and_an_error():
    async def run() -> None:
        pieces = ('10\r\ndata: {"a": 1}\n\n\r\n', '9\r\ndata: {"b\r\n')  # chunks; the last one never comes
        head = says(*pieces, kind="text/event-stream\r\nTransfer-Encoding: chunked")
        async with server(head) as url, endpoint(Given(url)) as (address, _):
            status, text, _ = await ask(address)
        first, error, done, nothing = text.split(b"\n\n")
        assert status == 200 and first == b'data: {"a": 1}' and (done, nothing) == (b"data: [DONE]", b"")
        assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == 502

    asyncio.run(run())


def test_half_an_answer_does_not_look_whole_and_none_is_an_error():
    async def run() -> None:
        async with server(says("half", length=8)) as url, endpoint(Given(url)) as (address, _):
            with pytest.raises(aiohttp.ClientError):
                await ask(address)
        async with server(says(length=8)) as url, endpoint(Given(url)) as (address, _):
            assert (await ask(address))[0] == 502

    asyncio.run(run())


def test_a_client_that_leaves_closes_the_servers_connection_and_gives_its_place_back():
    async def run() -> None:
        left = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(HEAD.format("text/event-stream", "").encode() + b": keep-alive\n\n")
            while await reader.read(1024):  # the body, and then nothing until it is closed
                pass
            left.set()

        async with server(serve) as url:
            pool = Given(url)
            async with endpoint(pool) as (address, _), aiohttp.ClientSession() as session:
                async with session.post(address + "/v1/completions", json={}) as answer:
                    assert await answer.content.readline() == b": keep-alive\n" and pool.num_leases == 1
                async with asyncio.timeout(30):
                    await left.wait()
                    while pool.num_leases:
                        await asyncio.sleep(0.01)

    asyncio.run(run())


def test_draining_refuses_what_is_new_and_waits_for_what_runs():
    async def run() -> None:
        async with server(says("1234", "5678", length=8)) as url, endpoint(Given(url)) as (address, ingress):
            running = asyncio.create_task(ask(address))
            while not ingress.num_in_flight:
                await asyncio.sleep(0.001)
            await ingress.drain(30)
            assert (await running)[1] == b"12345678"
            status, text, _ = await ask(address)
            assert status == 503 and "shutting down" in json.loads(text)["error"]["message"]
            assert (await ask(address, "/health"))[0] == 503

    asyncio.run(run())


def test_a_body_that_is_too_long_is_refused_in_words(nobody: str):
    async def run() -> None:
        async with endpoint(Given(nobody)) as (address, _):
            status, text, _ = await ask(address, prompt="x" * 2 * MAX_BODY_BYTES)
            assert status == 413 and json.loads(text)["error"]["message"]

    asyncio.run(run())
