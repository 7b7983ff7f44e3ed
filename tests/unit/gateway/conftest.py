"""A sandbox behind the HTTP API, twice: with a real machine, and with a real agent that runs as a process of this host.

The second is there for speed and for what would take a machine long (gigabytes). Its service has only what the handlers
of commands and files call; they cannot tell.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.websocket import WebSocketClientConnection

from gateway.app import make_application
from gateway.listener import make_server
from gateway.metrics import Metrics
from gateway.settings import GatewaySettings
from gateway.state import Gateway
from kernels.errors import UnknownSandboxError
from kernels.exec import SandboxCommands
from kernels.files import SandboxFiles
from kernels.service import SandboxService
from kernels.session import GuestSession
from tests.gateways import RunningGateway
from tests.unit.gateway.client import request
from vm_runtime.guest.agent import Agent, AgentSettings
from vm_runtime.guest.paths import Paths
from vm_runtime.wire.carriers import SocketCarrier
from vm_runtime.wire.greeting import Hello
from vm_runtime.wire.link import Link
from vm_runtime.wire.protocol import BOOT_MARKER

BOX_ID = "00000000-0000-4000-8000-000000000001"
TOKEN = "box"


@dataclass(frozen=True, kw_only=True)
class Box:
    """Where a sandbox is reached. home: its kernel user's. pid: whose memory to watch, the gateway's process.
    sockets: those that tests have opened; they are closed at the end."""

    url: str
    token: str
    sandbox_id: str
    home: str
    pid: int
    sockets: list[WebSocketClientConnection] = field(default_factory=list)

    @property
    def path(self) -> str:
        return f"/api/sandboxes/{self.sandbox_id}"


class AgentService:
    """As much of a SandboxService as commands and files need, over one agent."""

    def __init__(self, link: Link) -> None:
        self.registry = self  # of which it is told what is in use
        self._session = GuestSession(link, next_marker="")

    async def commands(self, sandbox_id: str) -> SandboxCommands:
        return SandboxCommands(self._open(sandbox_id))

    async def files(self, sandbox_id: str) -> SandboxFiles:
        return SandboxFiles(self._open(sandbox_id))

    def touch(self, sandbox_id: str) -> None:
        pass

    def _open(self, sandbox_id: str) -> GuestSession:
        if sandbox_id != BOX_ID:
            raise UnknownSandboxError(sandbox_id)
        return self._session


@asynccontextmanager
async def agent_box(directory: Path) -> AsyncIterator[Box]:
    home = directory / "home"
    home.mkdir()
    paths = Paths(run=directory, home=home)
    async with Agent(AgentSettings(paths=paths, user=None, owns_machine=False)) as agent:
        ours, theirs = [SocketCarrier(*await asyncio_connection(end)) for end in socket.socketpair()]
        serving = asyncio.create_task(agent.serve(theirs))
        link = await Link.connect(ours, Hello(), marker=BOOT_MARKER, timeout_s=20)
        gateway = Gateway(
            settings=GatewaySettings(token=TOKEN, state_dir=directory),
            url="",
            token=TOKEN,
            service=cast(SandboxService, AgentService(link)),
            sessions=cast(Any, None),
            clients=cast(Any, None),
            metrics=Metrics(states=list, pool_ready=int),
        )
        server = make_server(make_application(gateway))
        sockets = bind_sockets(0, "127.0.0.1")
        server.add_sockets(sockets)
        try:
            url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
            yield Box(url=url, token=TOKEN, sandbox_id=BOX_ID, home=str(home), pid=os.getpid())
        finally:
            await stop(server)
            await link.close()
            await serving


async def asyncio_connection(end: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_unix_connection(sock=end)


async def stop(server: HTTPServer) -> None:
    server.stop()
    await server.close_all_connections()


@asynccontextmanager
async def machine_box(gateway: RunningGateway) -> AsyncIterator[Box]:
    created = await request(gateway, "POST", "/api/sandboxes", {})
    assert created.code == 201, created.body
    sandbox_id = json.loads(created.body)["id"]
    try:
        yield Box(
            url=gateway.url,
            token=gateway.token,
            sandbox_id=sandbox_id,
            home="/home/user",
            pid=gateway.process.pid,
        )
    finally:
        await request(gateway, "DELETE", f"/api/sandboxes/{sandbox_id}")


@pytest.fixture(params=["agent", "machine"])
async def box(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Box]:
    if request.param == "agent":
        async with agent_box(tmp_path) as box:
            yield box
            close(box)
    else:
        async with machine_box(request.getfixturevalue("gateway")) as box:
            yield box
            close(box)


def close(box: Box) -> None:
    for opened in box.sockets:
        opened.close()
