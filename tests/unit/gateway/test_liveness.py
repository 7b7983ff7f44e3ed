"""Which clients of a WebSocket are taken for dead: those that neither answer nor take anything."""

from __future__ import annotations

import asyncio
import base64
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest
from tornado.netutil import bind_sockets
from tornado.web import Application

from gateway.listener import make_server
from gateway.liveness import WatchedSocket
from gateway.metrics import Metrics
from gateway.settings import GatewaySettings
from gateway.state import Gateway
from tests.unit.gateway.conftest import stop

TIMEOUT_S, PINGS_S = 0.6, 0.2


class Socket(WatchedSocket):
    """Sends a few bytes every moment, if asked for."""

    ended: asyncio.Event
    is_open = False

    def initialize(self, gateway: Gateway) -> None:
        self.gateway = gateway

    async def open(self, *args: str, **kwargs: str) -> None:
        Socket.ended, Socket.is_open = asyncio.Event(), True
        self.begin_watching()
        if self.get_query_argument("sends", ""):
            self._sending = asyncio.create_task(self._send())

    async def _send(self) -> None:
        for _ in range(30):
            self.write_message(b"some output", binary=True)
            await asyncio.sleep(0.1)

    def on_close(self) -> None:
        self.end_watching()
        Socket.is_open = False
        Socket.ended.set()


@pytest.fixture
async def port(tmp_path: Path) -> AsyncIterator[int]:
    settings = GatewaySettings(token="t", state_dir=tmp_path, client_timeout_s=TIMEOUT_S, ping_interval_s=PINGS_S)
    nothing = cast(Any, None)
    gateway = Gateway(
        settings=settings, url="", token="t", service=nothing, sessions=nothing, clients=nothing,
        metrics=Metrics(states=list, pool_ready=int),
    )  # fmt: skip
    server = make_server(Application([("/", Socket, {"gateway": gateway})]))
    sockets = bind_sockets(0, "127.0.0.1")
    server.add_sockets(sockets)
    yield sockets[0].getsockname()[1]
    await stop(server)


async def silent_client(port: int, path: str) -> asyncio.StreamWriter:
    """One that opens a WebSocket and then never reads; its TCP takes what fits."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    key = base64.b64encode(os.urandom(16)).decode()
    writer.write(
        f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n".encode()
    )
    assert b" 101 " in await reader.readline()
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    return writer


async def test_one_that_takes_nothing_and_answers_nothing_is_cut_off(port: int) -> None:
    writer = await silent_client(port, "/")
    async with asyncio.timeout(20):
        await Socket.ended.wait()
    writer.close()


async def test_one_whose_tcp_acknowledges_what_is_sent_is_not(port: int) -> None:
    writer = await silent_client(port, "/?sends=1")
    await asyncio.sleep(3 * TIMEOUT_S)  # more than one that is silent is left
    assert Socket.is_open
    async with asyncio.timeout(20):  # until nothing is sent any more
        await Socket.ended.wait()
    writer.close()
