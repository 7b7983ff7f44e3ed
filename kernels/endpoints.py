"""A kernel's five ZMQ sockets as `ipc://` endpoints on the host, for Jupyter clients of the same user.

Each connection is a client of one channel (kernels/channels.py): the handshake is answered here, messages pass as they
are. So a connection outlives machines and kernels, and any Jupyter client library works.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import shutil
import termios
from contextlib import suppress
from pathlib import Path
from typing import Any

from kernels.channel_socket import READ_BYTES
from kernels.channels import KernelChannels, KernelClients
from kernels.errors import LimitError
from kernels.zmtp import Message, Ready, ZmtpConnection, ZmtpError

log = logging.getLogger(__name__)

# Port numbers of the "ipc" transport: the socket of channel n is `<directory>/k-<n>` (jupyter_client.connect).
CHANNELS = {"shell": 1, "iopub": 2, "stdin": 3, "control": 4, "hb": 5}
# What an endpoint claims to be.
SOCKET_TYPES = {"shell": b"ROUTER", "iopub": b"XPUB", "stdin": b"ROUTER", "control": b"ROUTER", "hb": b"REP"}
# Clients that read are waited for as long as this; nothing signals that the other end of a socket has read it empty.
READ_LIMIT_S = 2.0
LOOK_INTERVAL_S = 0.005


class Endpoints:
    """The listening sockets of one kernel. `await start()` opens them in a directory of mode 0700; `await close()` ends
    all (twice is harmless), and leaves the directory for those who will listen there again."""

    def __init__(self, directory: Path, clients: KernelClients) -> None:
        self._directory = directory
        self._clients = clients
        self._servers: list[asyncio.Server] = []
        self._connections: dict[asyncio.Task[None], _Connection] = {}

    async def start(self) -> None:
        """Given up half-way, it leaves no socket."""
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir(mode=0o700, parents=True)
        try:
            for name, number in CHANNELS.items():

                async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str = name) -> None:
                    await self._accept(_Connection(name, reader, writer, self._clients))

                self._servers.append(await asyncio.start_unix_server(accept, self._directory / f"k-{number}"))
        except BaseException:
            await self.close()
            raise

    async def until_read(self) -> None:
        """Until clients have read what they were sent; of those that do not read for a while, no longer."""
        with suppress(TimeoutError):
            async with asyncio.timeout(READ_LIMIT_S):
                await asyncio.gather(*(each.until_read() for each in self._connections.values()))

    async def close(self) -> None:
        servers, self._servers = self._servers, []
        for server in servers:
            server.close()
        tasks = list(self._connections)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for number in CHANNELS.values():
            (self._directory / f"k-{number}").unlink(missing_ok=True)

    async def _accept(self, connection: _Connection) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections[task] = connection
        try:
            await connection.run()
        except* (ZmtpError, LimitError, OSError) as errors:
            log.info("A client's %s connection was ended: %s", connection.channel, errors.exceptions[0])
        except* asyncio.CancelledError:
            pass  # by `close`: nothing else awaits this task
        finally:
            del self._connections[task]

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


class _Connection:
    """A client's connection to one endpoint. `await run()` serves it until the client goes."""

    def __init__(
        self, channel: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, clients: KernelClients
    ) -> None:
        self.channel = channel
        self._reader = reader
        self._writer = writer
        self._clients = clients
        self._zmtp = ZmtpConnection(SOCKET_TYPES[channel])
        self._channels: KernelChannels | None = None

    async def run(self) -> None:
        """Errors: ZmtpError, LimitError, OSError, also in groups."""
        try:
            self._flush()
            async with asyncio.TaskGroup() as group:
                while data := await self._reader.read(READ_BYTES):
                    for event in self._zmtp.receive_data(data):
                        match event:
                            case Ready(identity):
                                self._channels = self._clients.channels(identity, (self.channel,))
                                sending = group.create_task(self._pass_to_client(self._channels))
                            case Message(parts) if self._channels is not None:
                                await self._pass_to_kernel(self._channels, parts)
                    self._flush()
                if self._channels is not None:
                    sending.cancel()
        finally:
            if self._channels is not None:
                self._channels.close()
            self._writer.close()

    async def _pass_to_kernel(self, channels: KernelChannels, parts: list[bytes]) -> None:
        if self.channel == "iopub":
            channels.subscribe(parts[0])
        elif self.channel == "hb" and not self._clients.is_attached:
            # A sleeping kernel is well. The answer to a heart beat is its own bytes: REQ and REP have one envelope.
            self._zmtp.send_message(parts)
        else:
            await channels.send(self.channel, parts)

    async def _pass_to_client(self, channels: KernelChannels) -> None:
        async for _, parts in channels:
            self._zmtp.send_message(parts)
            self._flush()
            await self._writer.drain()

    def _flush(self) -> None:
        if data := self._zmtp.data_to_send():
            self._writer.write(data)

    async def until_read(self) -> None:
        """Until the client has read all that it was sent."""
        transport = self._writer.transport
        fd, unread = transport.get_extra_info("socket").fileno(), bytearray(4)
        while not transport.is_closing():
            fcntl.ioctl(fd, termios.TIOCOUTQ, unread)  # bytes that the other end has not read (unix(7), SIOCOUTQ)
            has_unread = self._channels is not None and self._channels.has_unread
            if not any(unread) and not has_unread and not transport.get_write_buffer_size():
                return
            await asyncio.sleep(LOOK_INTERVAL_S)
