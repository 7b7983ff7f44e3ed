"""A kernel's five ZMQ sockets as `ipc://` endpoints on the host, each connection a stream on the wire.

Bytes pass through as they are (ZMTP included), so any Jupyter client library works against them unchanged. Knows
nothing of what the bytes mean.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.zmtp import (
    GREETING,
    GREETING_BYTES,
    Handshake,
    HandshakeError,
    MessageMeter,
    MessageTooLongError,
    ready,
)
from vm_runtime.wire.errors import WireError
from vm_runtime.wire.relay import relay
from vm_runtime.wire.stream import Stream

log = logging.getLogger(__name__)

# Port numbers of the "ipc" transport: the socket of channel n is `<directory>/k-<n>` (jupyter_client.connect).
CHANNELS = {"shell": 1, "iopub": 2, "stdin": 3, "control": 4, "hb": 5}
# Each client opens four or five connections; the wire carries at most 256 streams; others need some too.
MAX_CONNECTIONS = 200

# What an endpoint claims to be while it holds a connection, and where a message is a request that wakes a kernel: not
# on iopub (subscriptions), not on hb (every second), not on stdin (answers).
SOCKET_TYPES = {"shell": b"ROUTER", "iopub": b"XPUB", "stdin": b"ROUTER", "control": b"ROUTER", "hb": b"REP"}
REQUEST_CHANNELS = frozenset({"shell", "control"})
# Every client has these; heart beats are for those that watch a process of their own.
GREETED_CHANNELS = ("iopub", "shell", "control", "stdin")
READ_BYTES = 64 * 1024
# Kept of a client that talks while there is no machine (subscriptions): beyond it nothing more is read.
MAX_HELD_BYTES = 256 * 1024
# ZMTP's message that takes back the subscription to everything, which is what Jupyter's clients have.
UNSUBSCRIBE = b"\x00\x01\x00"
# From the kernel's last output to a subscriber until it has arrived here: milliseconds, emulated some more.
QUIET_S = 0.03

OpenChannel = Callable[[str], Awaitable[Stream]]


@dataclass(frozen=True, kw_only=True)
class Greeted:
    """A connection to a kernel's socket that no client has yet: greetings are exchanged, the socket has said READY and
    waits for the client's, which tells who it is. kernel: the socket's side."""

    stream: Stream
    kernel: Handshake


async def greet_ahead(open_channel: OpenChannel) -> dict[str, Greeted]:
    """A connection for each channel of a first client, by name; for `Endpoints.attach`. Errors: WireError,
    HandshakeError."""
    greeted = {}
    for name in GREETED_CHANNELS:
        stream, kernel = await open_channel(name), Handshake()
        await stream.write(GREETING)
        while not kernel.done:
            kernel.feed(await _some(stream))
        greeted[name] = Greeted(stream=stream, kernel=kernel)
    return greeted


class Endpoints:
    """The listening sockets of one kernel, for as long as its sandbox exists, with or without a machine.

    `attach(open_channel)` when there is a machine, `detach()` when it goes: while there is none, connections are held,
    their handshakes and heart beats answered, and the first message on shell or control calls `on_request`, which
    should see to it that a machine is attached soon. `await start()` opens the sockets; `await close()` ends all (twice
    is harmless) and removes the directory, which has mode 0700.

    A first client's handshakes take an emulated guest longer than its first cell does, so a machine may bring
    connections with them behind it (`greet_ahead`): whoever connects first is given them.
    """

    def __init__(self, directory: Path, on_request: Callable[[], None]) -> None:
        self._directory = directory
        self._on_request = on_request
        self._open_channel: OpenChannel | None = None
        self._attached = asyncio.Event()
        self._servers: list[asyncio.Server] = []
        self._connections: set[asyncio.Task[None]] = set()
        self._held: set[asyncio.Task[None]] = set()
        self._iopub: set[Stream] = set()
        self._greeted: dict[str, Greeted] = {}

    async def start(self) -> None:
        """Given up half-way, it leaves nothing."""
        try:
            await self._listen()
        except BaseException:
            await self.close()
            raise

    async def _listen(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir(mode=0o700, parents=True)
        for name, number in CHANNELS.items():

            async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str = name) -> None:
                await self._accept(name, reader, writer)

            self._servers.append(await asyncio.start_unix_server(accept, self._directory / f"k-{number}"))

    def attach(self, open_channel: OpenChannel, greeted: Mapping[str, Greeted] | None = None) -> None:
        """A machine is there: connections, new and held, go to its kernel. greeted: from `greet_ahead`, owned by this
        from now on."""
        self._open_channel = open_channel
        self._greeted = dict(greeted or {})
        self._attached.set()

    async def detach(self) -> None:
        """The machine is gone, or is about to be: connections to it end; clients connect anew and are held. Twice is
        harmless: what is held stays so."""
        self._open_channel = None
        self._attached.clear()
        await self.drop_connections()

    async def quiesce(self) -> None:
        """Before `detach` from a machine that goes on later: its kernel keeps what it says from now on for the next
        subscriber, and what is on its way to clients arrives."""
        if self._iopub:
            await asyncio.gather(*(stream.write(UNSUBSCRIBE) for stream in self._iopub), return_exceptions=True)
            await asyncio.sleep(QUIET_S)

    async def drop_connections(self) -> None:
        """Ends every connection to a kernel, keeps listening: clients connect anew (their ZMQ sockets do so by
        themselves). Those that are held stay: what their clients have said already would be lost."""
        while self._greeted:
            self._greeted.popitem()[1].stream.reset()
        await self._end(self._connections - self._held)

    @staticmethod
    async def _end(tasks: Iterable[asyncio.Task[None]]) -> None:
        connections = list(tasks)
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def close(self) -> None:
        servers, self._servers = self._servers, []
        for server in servers:
            server.close()
        await self.detach()
        await self._end(self._connections)
        shutil.rmtree(self._directory, ignore_errors=True)

    async def _accept(self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._connections) >= MAX_CONNECTIONS:
            writer.close()
            return
        self._connections.add(task)
        try:
            # One that cannot be opened (kernel restarting) closes the connection: ZMQ tries again.
            greeted = self._greeted.pop(name, None)
            if greeted is not None:
                await self._introduce(name, greeted, reader, writer)
                return
            if self._open_channel is not None:
                await self._relay(name, await self._open_channel(name), reader, writer, kernel=Handshake())
                return
            self._held.add(task)
            client = await self._hold(name, reader, writer)
            self._held.discard(task)
            if client is not None and self._open_channel is not None:
                stream = await self._open_channel(name)
                kernel = await self._replay(client, stream, writer)
                await self._relay(name, stream, reader, writer, kernel=kernel)
        except* (WireError, OSError, HandshakeError, asyncio.CancelledError):
            # The connection's own task, which nothing awaits: cancelled only by `drop_connections` and `close`.
            pass
        except* MessageTooLongError as errors:
            log.warning("A kernel's %s connection was ended: %s", name, errors.exceptions[0])
        finally:
            self._connections.discard(task)
            self._held.discard(task)
            writer.close()

    async def _introduce(
        self, name: str, greeted: Greeted, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """A client takes over a connection: the kernel's socket only has to hear who it is."""
        try:
            client = await self._shake(name, reader, writer)
            if client is None:
                return
            await greeted.stream.write(bytes(client.said[GREETING_BYTES:] + client.rest))
            writer.write(bytes(greeted.kernel.rest))
            await self._relay(name, greeted.stream, reader, writer, kernel=greeted.kernel)
        finally:
            greeted.stream.reset()

    async def _relay(
        self,
        name: str,
        stream: Stream,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        kernel: Handshake,
    ) -> None:
        """kernel: the kernel's side of the handshake as far as it has come. Errors: MessageTooLongError, in a group."""
        meter = MessageMeter()
        meter.feed(bytes(kernel.rest))

        def inspect(data: bytes) -> None:
            if kernel.done:
                meter.feed(data)
            else:
                kernel.feed(data)
                meter.feed(bytes(kernel.rest))

        if name == "iopub":
            self._iopub.add(stream)
        try:
            await relay(stream, reader, writer, inspect=inspect)
        finally:
            self._iopub.discard(stream)

    async def _hold(self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Handshake | None:
        """Answers the handshake and waits for a machine, asking for one once a request is there. None if the client has
        gone, else what it said."""
        client = await self._shake(name, reader, writer)
        if client is None:
            return None
        while not self._attached.is_set():
            if name == "hb":
                # A sleeping kernel is well. The answer to a heart beat is its own bytes: REQ and REP have one envelope.
                writer.write(bytes(client.rest))
                client.rest.clear()
            request = bool(client.rest) and name in REQUEST_CHANNELS
            if request:
                self._on_request()
            if not await self._more_or_attached(client, reader, read=not request):
                return None
        return client

    @staticmethod
    async def _shake(name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Handshake | None:
        """Answers the handshake in the kernel's place. None if the client has gone, else what it said."""
        client = Handshake()
        writer.write(GREETING)
        while not client.done:
            data = await reader.read(READ_BYTES)
            if not data:
                return None
            client.feed(data)
        writer.write(ready(SOCKET_TYPES[name]))
        return client

    async def _more_or_attached(self, client: Handshake, reader: asyncio.StreamReader, *, read: bool) -> bool:
        """Waits for a machine, or (if `read`) for more from the client. False when the client has gone."""
        attached = asyncio.create_task(self._attached.wait())
        more = asyncio.create_task(reader.read(READ_BYTES)) if read and len(client.rest) < MAX_HELD_BYTES else None
        try:
            await asyncio.wait([task for task in (attached, more) if task], return_when=asyncio.FIRST_COMPLETED)
            if more is not None and more.done():
                data = more.result()
                client.feed(data)
                return bool(data)
            return True
        finally:
            for task in (attached, more):
                if task is not None:
                    task.cancel()
            await asyncio.gather(*(task for task in (attached, more) if task), return_exceptions=True)

    @staticmethod
    async def _replay(client: Handshake, stream: Stream, writer: asyncio.StreamWriter) -> Handshake:
        """Says to the kernel's socket what the client said, step by step (libzmq takes no READY before its own
        greeting has gone out), and drops the kernel's side of the handshake, which the client has had from us."""
        kernel = Handshake()
        await stream.write(bytes(client.said[:GREETING_BYTES]))
        while len(kernel.said) < GREETING_BYTES:
            kernel.feed(await _some(stream))
        await stream.write(bytes(client.said[GREETING_BYTES:]))
        while not kernel.done:
            kernel.feed(await _some(stream))
        await stream.write(bytes(client.rest))
        writer.write(bytes(kernel.rest))
        return kernel

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


async def _some(stream: Stream) -> bytes:
    data = await stream.read()
    if not data:
        raise HandshakeError("the kernel's socket hung up")
    return data
