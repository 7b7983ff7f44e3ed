"""A kernel's five ZMQ sockets as `ipc://` endpoints on the host, each connection a stream on the wire.

Bytes pass through as they are (ZMTP included), so any Jupyter client library works against them unchanged. Knows
nothing of what the bytes mean.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from kernels.client_connection import REQUEST_CHANNELS, ClientConnection
from kernels.zmtp import GREETING, GREETING_BYTES, Handshake, HandshakeError, MessageTooLongError
from vm_runtime.wire.errors import WireError
from vm_runtime.wire.stream import Stream

log = logging.getLogger(__name__)

# Port numbers of the "ipc" transport: the socket of channel n is `<directory>/k-<n>` (jupyter_client.connect).
CHANNELS = {"shell": 1, "iopub": 2, "stdin": 3, "control": 4, "hb": 5}
# Each client opens four or five connections; the wire carries at most 256 streams; others need some too.
MAX_CONNECTIONS = 200
# Every client has these; heart beats are for those that watch a process of their own.
GREETED_CHANNELS = ("iopub", "shell", "control", "stdin")
# Requests wait until the kernel knows who listens, and whom to ask for input. One whose threads get no turn (a C
# extension holds the interpreter lock) greets no subscriber, and does nothing else either.
KNOWN_LIMIT_S = 1.0
# What all connections do at the same time takes milliseconds, on a busy host more. A guest may hang.
STEP_LIMIT_S = 2.0

OpenChannel = Callable[[str], Awaitable[Stream]]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Greeted:
    """A connection to a kernel's socket that no client has yet: greetings are exchanged, the socket has sent READY and
    waits for the client's, which names it. kernel: the socket's side."""

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

    `attach(open_channel)` when there is a machine, `detach()` when it goes; connections of clients outlive it. While
    there is none their handshakes and heart beats are answered, and a message on shell or control calls `on_request`,
    which should see to it that a machine is attached soon. on_traffic: called when a client sends something and when
    the kernel has output. asked_at: when a client last sent a request (event loop time).
    `await start()` opens the sockets; `await close()` ends all (twice is harmless) and removes the directory, which has
    mode 0700.

    A first client's handshakes take an emulated guest longer than its first cell does, so a machine may bring
    connections with them behind it (`greet_ahead`): whoever connects first is given them.
    """

    def __init__(
        self, directory: Path, on_request: Callable[[], None], on_traffic: Callable[[], None] = lambda: None
    ) -> None:
        self._directory = directory
        self._on_request = on_request
        self._on_traffic = on_traffic
        self._open_channel: OpenChannel | None = None
        self._attached = asyncio.Event()
        self._servers: list[asyncio.Server] = []
        self._connections: dict[ClientConnection, asyncio.Task[None]] = {}
        self._greeted: dict[str, Greeted] = {}
        self.asked_at = float("-inf")

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

    @property
    def has_request(self) -> bool:
        """Whether a client has sent something that has not been passed on to a kernel."""
        return any(connection.has_request for connection in self._connections)

    def attach(self, open_channel: OpenChannel, greeted: Mapping[str, Greeted] | None = None) -> None:
        """There is a machine: connections go to its kernel. greeted: from `greet_ahead`, owned by this from now on."""
        self._open_channel = open_channel
        self._greeted = dict(greeted or {})
        self._attached.set()

    async def rejoined(self) -> None:
        """After `attach`: until the kernel's iopub socket has the subscriptions of all that were connected before."""
        await self._all(ClientConnection.rejoined)

    async def quiesce(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Before `detach` from a machine that runs on later: what is under way between clients and kernel arrives, and
        what clients send from now on waits here.

        ask: awaited when the kernel's sockets have all that clients have sent; its answer. It must have the kernel keep
        what it has for clients from then on. Errors: what `ask` raises.
        """
        self._hide_machine()
        for connection in self._connections:
            connection.stand()
        await self._all(ClientConnection.finish)
        await self._all(ClientConnection.settle)
        answer = await ask()
        # Twice: a socket answers the first before it sends what it was given at the same moment.
        await self._all(ClientConnection.settle)
        await self._all(ClientConnection.settle)
        await self._all(ClientConnection.part)
        return answer

    async def until_read(self) -> None:
        """Until clients have read what they were sent; of those that do not read for a while, no longer."""
        await self._all(ClientConnection.until_read)

    async def unsubscribe(self) -> None:
        """The kernel keeps its output from some moment on, since it believes that nobody listens."""
        await self._all(ClientConnection.unsubscribe)

    async def _all(self, step: Callable[[ClientConnection], Awaitable[None]]) -> None:
        """Does something with each connection; with one that is lost meanwhile, or hangs, it is not done."""

        async def tried(connection: ClientConnection) -> None:
            try:
                await step(connection)
            except (WireError, OSError):
                pass
            except Exception:
                log.exception("A step with a client's %s connection failed", connection.channel)

        with suppress(TimeoutError):
            async with asyncio.timeout(STEP_LIMIT_S):
                await asyncio.gather(*map(tried, list(self._connections)))

    async def detach(self) -> None:
        """The machine has ended, or is about to. Twice is harmless."""
        self._hide_machine()
        await asyncio.gather(*(connection.leave() for connection in self._connections))

    def _hide_machine(self) -> None:
        self._open_channel = None
        self._attached.clear()
        while self._greeted:
            self._greeted.popitem()[1].stream.reset()

    async def drop_connections(self) -> None:
        """Ends every connection to a kernel, keeps listening: clients connect anew (their ZMQ sockets do so by
        themselves). Those that wait for a machine stay: what their clients have sent already would be lost."""
        while self._greeted:
            self._greeted.popitem()[1].stream.reset()
        joined = [connection for connection in self._connections if connection.is_joined]
        for connection in joined:
            connection.close()
        await asyncio.gather(*(self._connections[each] for each in joined), return_exceptions=True)

    async def close(self) -> None:
        servers, self._servers = self._servers, []
        for server in servers:
            server.close()
        self._hide_machine()
        tasks = list(self._connections.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        shutil.rmtree(self._directory, ignore_errors=True)

    async def _accept(self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._connections) >= MAX_CONNECTIONS:
            writer.close()
            return
        connection = ClientConnection(name, reader, writer, on_traffic=self._on_bytes)
        self._connections[connection] = task
        try:
            await connection.run(self._join, self._all_known)
        except* (WireError, OSError, HandshakeError, asyncio.CancelledError):
            # A socket that cannot be opened (kernel restarting) ends the connection: ZMQ tries again. And the
            # connection's own task, which nothing awaits, is cancelled only by `close`.
            pass
        except* MessageTooLongError as errors:
            log.warning("A kernel's %s connection was ended: %s", name, errors.exceptions[0])
        finally:
            del self._connections[connection]

    def _on_bytes(self, connection: ClientConnection) -> None:
        self._on_traffic()
        if connection.channel in REQUEST_CHANNELS:
            self.asked_at = asyncio.get_running_loop().time()
            if self._open_channel is None:
                self._on_request()

    async def _all_known(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(KNOWN_LIMIT_S):
                for connection in list(self._connections):
                    if connection.channel in ("iopub", "stdin"):
                        await connection.known.wait()

    async def _join(self, connection: ClientConnection) -> tuple[Stream, Handshake]:
        while self._open_channel is None:
            await self._attached.wait()
        received = connection.handshake.received
        greeted = self._greeted.pop(connection.channel, None)
        if greeted is not None:
            stream, kernel = greeted.stream, greeted.kernel
        else:
            stream, kernel = await self._open_channel(connection.channel), Handshake()
        try:
            # Step by step: libzmq takes no READY before its own greeting has been sent.
            if greeted is None:
                await stream.write(bytes(received[:GREETING_BYTES]))
                while len(kernel.received) < GREETING_BYTES:
                    kernel.feed(await _some(stream))
            await stream.write(bytes(received[GREETING_BYTES:]))
            while not kernel.done:
                kernel.feed(await _some(stream))
        except BaseException:
            stream.reset()
            raise
        return stream, kernel

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
