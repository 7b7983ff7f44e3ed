"""A kernel's five ZMQ sockets as `ipc://` endpoints on the host, each connection a stream on the wire.

Bytes pass through as they are (ZMTP included), so any Jupyter client library works against them unchanged. Knows
nothing of what the bytes mean.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from vm_runtime.wire.errors import WireError
from vm_runtime.wire.relay import relay
from vm_runtime.wire.stream import Stream

# Port numbers of the "ipc" transport: the socket of channel n is `<directory>/k-<n>` (jupyter_client.connect).
CHANNELS = {"shell": 1, "iopub": 2, "stdin": 3, "control": 4, "hb": 5}
# Each client opens four or five connections; the wire carries at most 256 streams; others need some too.
MAX_CONNECTIONS = 200

OpenChannel = Callable[[str], Awaitable[Stream]]


class Endpoints:
    """The listening sockets of one kernel. `open_channel(name)` is called for each connection and may wait.

    Use `await start()`, and `await close()` when the kernel is gone; closing twice is harmless. The directory (mode
    0700) is made by `start` and removed by `close`.
    """

    def __init__(self, directory: Path, open_channel: OpenChannel) -> None:
        self._directory = directory
        self._open_channel = open_channel
        self._servers: list[asyncio.Server] = []
        self._relays: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir(mode=0o700, parents=True)
        for name, number in CHANNELS.items():

            async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str = name) -> None:
                await self._accept(name, reader, writer)

            self._servers.append(await asyncio.start_unix_server(accept, self._directory / f"k-{number}"))

    async def _accept(self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._relays) >= MAX_CONNECTIONS:
            writer.close()
            return
        self._relays.add(task)
        try:
            # One that cannot be opened (kernel restarting) closes the connection: ZMQ tries again.
            stream = await self._open_channel(name)
            await relay(stream, reader, writer)
        except (WireError, OSError, asyncio.CancelledError):
            # The connection's own task, which nothing awaits: cancelled only by `drop_connections`.
            pass
        finally:
            self._relays.discard(task)
            writer.close()

    async def drop_connections(self) -> None:
        """Ends every connection, keeps listening: clients connect anew (their ZMQ sockets do so by themselves)."""
        relays = list(self._relays)
        for task in relays:
            task.cancel()
        await asyncio.gather(*relays, return_exceptions=True)

    async def close(self) -> None:
        servers, self._servers = self._servers, []
        for server in servers:
            server.close()
        await self.drop_connections()
        shutil.rmtree(self._directory, ignore_errors=True)

    def connection_info(self, key: str) -> dict[str, Any]:
        """Jupyter's connection file for these endpoints, `transport: ipc`."""
        ports = {f"{name}_port": number for name, number in CHANNELS.items()}
        return {
            "transport": "ipc",
            "ip": str(self._directory / "k"),
            "key": key,
            "signature_scheme": "hmac-sha256",
            **ports,
        }
