"""A real agent with zygote and kernels as ordinary processes of this host, and real Jupyter clients."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.connect import KernelConnectionInfo

from vm_runtime.guest.agent import Agent, AgentSettings
from vm_runtime.guest.paths import CHANNEL_PORTS, Paths
from vm_runtime.wire.carriers import SocketCarrier
from vm_runtime.wire.errors import LinkClosedError
from vm_runtime.wire.greeting import Hello
from vm_runtime.wire.link import Link
from vm_runtime.wire.protocol import BOOT_MARKER
from vm_runtime.wire.stream import Incoming

KEY = "first-key"
_CONNECTED = "03"  # in /proc/net/unix


@dataclass
class Host:
    """The host's end: a session with the agent, and what its `events` stream has said."""

    agent: Agent
    paths: Paths
    link: Link | None = None
    serving: asyncio.Task[None] | None = None
    events: list[bytes] = field(default_factory=list)
    event_came: asyncio.Event = field(default_factory=asyncio.Event)

    async def hello(self, **fields: Any) -> Link:
        """Begin a session, as a new gateway would after the old one has died."""
        await self.hang_up()
        ours, theirs = [SocketCarrier(*await asyncio.open_unix_connection(sock=end)) for end in socket.socketpair()]
        self.serving = asyncio.create_task(self.agent.serve(theirs))
        hello = Hello(identity={"sandbox_id": "s-1", "hostname": "box"}, **fields)
        self.link = await Link.connect(ours, hello, marker=BOOT_MARKER, on_open=self._on_open, timeout_s=60)
        return self.link

    async def hang_up(self) -> None:
        if self.link is not None and self.serving is not None:
            await self.link.close()
            await self.serving

    async def call(self, kind: str, **params: Any) -> dict[str, Any]:
        assert self.link is not None
        return dict(await self.link.call(kind, params, timeout_s=60))

    async def wait_event(self, part: bytes) -> bytes:
        """Wait until an event has come that contains `part`; it and all before it are then forgotten."""
        async with asyncio.timeout(60):
            while True:
                for at, event in enumerate(self.events):
                    if part in event:
                        del self.events[: at + 1]
                        return event
                self.event_came.clear()
                await self.event_came.wait()

    async def _on_open(self, incoming: Incoming) -> None:
        stream = await incoming.accept()
        rest = b""
        try:
            while data := await stream.read():
                *lines, rest = (rest + data).split(b"\n")
                self.events.extend(lines)
                self.event_came.set()
        except LinkClosedError:
            pass


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    """A host with a session; no kernel yet."""
    (tmp_path / "home").mkdir()
    paths = Paths(run=tmp_path, home=tmp_path / "home")
    async with Agent(AgentSettings(paths=paths, user=None, owns_machine=False)) as agent:
        host = Host(agent=agent, paths=paths)
        await host.hello()
        yield host
        await host.hang_up()


async def no_client(host: Host, channel: str) -> None:
    """Wait until the kernel has seen that no client is connected to that socket of it any more."""
    path = str(host.paths.kernel_socket(CHANNEL_PORTS[channel]))
    async with asyncio.timeout(60):
        while _has_connections(path):  # noqa: ASYNC110 (nothing tells)
            await asyncio.sleep(0.01)


def _has_connections(path: str) -> bool:
    """Whether the one that listens at this path has a connection that it has not closed."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    return any(line.endswith(path) and line.split()[5] == _CONNECTED for line in lines)


def waits_for(path: Path) -> str:
    """Lines of a cell that wait until there is a file at that path."""
    return f"import os, time\nwhile not os.path.exists({str(path)!r}): time.sleep(0.01)\n"


@asynccontextmanager
async def client(host: Host, *, key: str = KEY) -> AsyncIterator[AsyncKernelClient]:
    """A Jupyter client on the kernel's own sockets."""
    jupyter = AsyncKernelClient()
    ports = {f"{channel}_port": port for channel, port in CHANNEL_PORTS.items()}
    ip = str(host.paths.kernel_dir / "k")
    info = {"transport": "ipc", "ip": ip, "key": key, "signature_scheme": "hmac-sha256", **ports}
    jupyter.load_connection_info(cast(KernelConnectionInfo, info))
    jupyter.start_channels()
    try:
        await jupyter.wait_for_ready(timeout=120)
        yield jupyter
    finally:
        jupyter.stop_channels()


async def run(jupyter: AsyncKernelClient, code: str, **options: Any) -> tuple[str, dict[str, Any]]:
    """Run a cell; return all its text output (streams, results, the error's name) and the reply's content."""
    texts: list[str] = []

    def output(message: dict[str, Any]) -> None:
        content = message["content"]
        if message["msg_type"] == "stream":
            texts.append(content["text"])
        elif message["msg_type"] in ("execute_result", "display_data"):
            texts.append(content["data"]["text/plain"])

    reply = await jupyter.execute_interactive(code, timeout=60, output_hook=output, **options)
    return "".join(texts), reply["content"]
