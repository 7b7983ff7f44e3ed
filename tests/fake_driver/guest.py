"""The process of a fake machine: the guest's agent, with zygote and kernels as its children, behind a UNIX socket.

It plays what a machine has beside the agent: a line that never ends, on which one host after the other connects (a
virtio port), and a kernel that runs already where the machine was restored. It notes the marker of its next session in
its run directory, since that is part of a machine's state.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vm_runtime.guest.agent import Agent, AgentSettings
from vm_runtime.guest.paths import Paths
from vm_runtime.wire.carriers import Buffer
from vm_runtime.wire.greeting import Hello, Welcome

# Descriptor of the listening socket, the first after stderr.
LISTENER = 3
MARKER_FILE = "marker"
_PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>


@dataclass(frozen=True, kw_only=True)
class GuestSettings:
    """run, home: see `Paths`. marker: hex, opens the first session. kernel: whether one runs already."""

    run: str
    home: str
    marker: str
    kernel: bool

    def to_json(self) -> str:
        return json.dumps(asdict(self))


class Line:
    """The host's connections, one after the other, as one byte stream. on_hang_up: called when one has ended."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._connection: socket.socket | None = None
        self.on_hang_up: Callable[[], None] = lambda: None

    async def read(self, max_bytes: int) -> bytes:
        loop = asyncio.get_running_loop()
        while True:
            if self._connection is None:
                self._connection, _ = await loop.sock_accept(self._listener)
                self._connection.setblocking(False)
            try:
                data = await loop.sock_recv(self._connection, max_bytes)
            except OSError:
                data = b""
            if data:
                return data
            self._connection.close()
            self._connection = None
            self.on_hang_up()

    async def write(self, buffers: Sequence[Buffer]) -> None:
        if self._connection is None:
            raise ConnectionResetError("No host is connected")
        await asyncio.get_running_loop().sock_sendall(self._connection, b"".join(buffers))

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self._listener.close()


class FakeAgent(Agent):
    """The agent of a fake machine. marker_path: where the marker of the next session is noted."""

    def __init__(self, settings: AgentSettings, *, marker_path: Path) -> None:
        super().__init__(settings)
        self._marker_path = marker_path

    async def welcome(self, hello: Hello) -> Welcome:
        welcome = await super().welcome(hello)
        self.note_marker(hello)
        return welcome

    def note_marker(self, hello: Hello) -> None:
        temporary = self._marker_path.with_suffix(".new")
        temporary.write_text(hello.next_marker)
        temporary.replace(self._marker_path)

    async def start_kernel(self) -> None:
        """As a machine in whose state one runs. Errors: KernelError."""
        await self._kernel_manager.start(key=None, env={}, cwd=None)


async def _run(settings: GuestSettings, agent_class: type[FakeAgent]) -> None:
    paths = Paths(run=Path(settings.run), home=Path(settings.home))
    listener = socket.socket(fileno=LISTENER)
    listener.setblocking(False)
    line = Line(listener)
    agent_settings = AgentSettings(paths=paths, user=None, owns_machine=False)
    agent = agent_class(agent_settings, marker_path=paths.run / MARKER_FILE)
    async with agent:
        line.on_hang_up = agent.hang_up
        if settings.kernel:
            await agent.start_kernel()
        await agent.serve(line, marker=bytes.fromhex(settings.marker))


def main(agent_class: type[FakeAgent] = FakeAgent) -> None:
    """`argv[1]` holds the settings."""
    settings = GuestSettings(**json.loads(sys.argv[1]))
    # Whatever a cell leaves behind stays below this process, so that it is paused and ended with it.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    logging.basicConfig(level=logging.WARNING, format="hypercell-agent: %(message)s")
    os.environ["PATH"] = os.environ.get("PATH", "/usr/bin:/bin")
    asyncio.run(_run(settings, agent_class))
