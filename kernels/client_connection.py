"""One client's connection to one of a kernel's sockets, which stays while machines come and go.

    GREETING --> WAITING <--> JOINED --> ENDED         what the client sends while it is not JOINED waits here
                                 |
                              STANDING                 nothing more goes to this machine's kernel

The handshake is answered here and repeated to each machine's kernel, so the client sees none of this. Knows ZMTP's
frames; nothing of what messages mean.
"""

from __future__ import annotations

import asyncio
import fcntl
import termios
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from kernels.zmtp import GREETING, UNSUBSCRIBE, Frames, Handshake, ping, ready
from vm_runtime.wire.stream import Stream

# What an endpoint claims to be.
SOCKET_TYPES = {"shell": b"ROUTER", "iopub": b"XPUB", "stdin": b"ROUTER", "control": b"ROUTER", "hb": b"REP"}
# Where a message is a request: not on iopub (subscriptions), not on hb (every second), not on stdin (answers).
REQUEST_CHANNELS = frozenset({"shell", "control"})
READ_BYTES = 64 * 1024
# Kept of a client that sends while there is no machine: beyond it nothing more is read.
MAX_WAITING_BYTES = 256 * 1024
# Kept for a client that takes nothing while its machine is left: what libzmq holds for it there (16 messages of 1 MiB)
# and the wire's window.
MAX_PARTING_BYTES = 32 << 20
# Nothing signals that the other end of a socket has read it empty.
LOOK_INTERVAL_S = 0.005


class ClientConnection:
    """`await run(...)` serves the client. on_traffic: called when the client has sent something, or iopub has.

    known: the kernel's socket knows the client: its subscription, or that it can be asked for input.
    """

    def __init__(
        self,
        channel: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        on_traffic: Callable[[ClientConnection], None],
    ) -> None:
        self.channel = channel
        self.handshake = Handshake()
        self.known = asyncio.Event()
        self._reader = reader
        self._writer = writer
        self._on_traffic = on_traffic
        self._waiting = bytearray()
        self._client_ended = False
        self._subscriptions = bytearray()
        self._stream: Stream | None = None
        self._to_kernel = Frames()
        self._to_client = Frames()
        self._is_writing = False
        self._kernel_ended = False
        self._pings = 0
        self._standing = asyncio.Event()
        self._changed = asyncio.Event()
        self._serving: asyncio.Task[None] | None = None
        self._is_leaving = False

    @property
    def is_joined(self) -> bool:
        return self._stream is not None

    @property
    def has_request(self) -> bool:
        """Whether the client has sent something that should reach a kernel, and has not."""
        return self.channel in REQUEST_CHANNELS and bool(self._waiting)

    async def run(
        self,
        join: Callable[[ClientConnection], Awaitable[tuple[Stream, Handshake]]],
        may_send: Callable[[], Awaitable[None]],
    ) -> None:
        """Until the client or a kernel's socket ends the connection.

        join: waits for a machine; a stream to its kernel's socket and the socket's side of the handshake. may_send: is
        awaited before requests are passed on to it. Errors: WireError, OSError, HandshakeError and MessageTooLongError,
        also in groups.
        """
        try:
            if not await self._greet():
                return
            async with asyncio.TaskGroup() as group:
                reading = group.create_task(self._read())
                while not self._client_ended or self.has_request:
                    self._serving = group.create_task(self._serve(join, may_send))
                    await asyncio.wait({self._serving})
                    if not self._is_leaving or not self._can_stay():
                        break
                    self._is_leaving = False
                    self._standing.clear()
                    self._waiting[:0] = self._subscriptions
                    self._subscriptions.clear()
                reading.cancel()
        finally:
            self.known.set()
            self._writer.close()

    def _can_stay(self) -> bool:
        """Whether no message was cut off when the machine was left."""
        whole = self._to_kernel.at_end and self._to_client.at_end and not self._is_writing
        return whole and len(self._subscriptions) < MAX_WAITING_BYTES

    async def _greet(self) -> bool:
        """Answers the handshake in the kernel's place. False if the client has disconnected."""
        self._writer.write(GREETING)
        while not self.handshake.done:
            data = await self._reader.read(READ_BYTES)
            if not data:
                return False
            self.handshake.feed(data)
        self._writer.write(ready(SOCKET_TYPES[self.channel]))
        self._received(self.handshake.rest)
        return True

    async def _read(self) -> None:
        with suppress(OSError):
            while data := await self._reader.read(READ_BYTES):
                self._received(data)
                while len(self._waiting) >= MAX_WAITING_BYTES:
                    await self._change()
        self._client_ended = True
        self._changed.set()
        if not self.is_joined and not self.has_request:
            await self.leave()

    def _received(self, data: bytes | bytearray) -> None:
        if not data:
            return
        if self.channel == "hb" and (not self.is_joined or self._standing.is_set()):
            # A sleeping kernel is well. The answer to a heart beat is its own bytes: REQ and REP have one envelope.
            self._writer.write(data)
            return
        self._waiting += data
        self._changed.set()
        self._on_traffic(self)

    async def _change(self) -> None:
        """Until something is different that one of the loops here waits for; each looks again at what it needs."""
        self._changed.clear()
        await self._changed.wait()

    async def _serve(
        self,
        join: Callable[[ClientConnection], Awaitable[tuple[Stream, Handshake]]],
        may_send: Callable[[], Awaitable[None]],
    ) -> None:
        stream, kernel = await join(self)
        self._stream, self._kernel_ended, self._to_kernel, self._to_client = stream, False, Frames(), Frames()
        try:
            if self.channel == "stdin":
                await stream.write(ping(b"known"))  # iopub sends that by itself
            async with asyncio.TaskGroup() as group:
                sending = group.create_task(self._pass_to_kernel(stream, may_send))
                await self._pass_to_client(stream, bytes(kernel.rest))
                sending.cancel()
                self._kernel_ended = True
                self._changed.set()
                if self._standing.is_set():
                    await asyncio.Event().wait()  # `leave` ends it
        finally:
            self._stream = None
            self.known.clear()
            self._changed.set()
            stream.reset()

    async def _pass_to_kernel(self, stream: Stream, may_send: Callable[[], Awaitable[None]]) -> None:
        if self.channel in REQUEST_CHANNELS:
            await may_send()
        while True:
            standing = self._standing.is_set()
            if self._waiting and not (standing and self._to_kernel.at_end):
                taken = self._to_kernel.feed(self._waiting, to_end=standing)
                data = bytes(self._waiting[:taken])
                del self._waiting[:taken]
                if self.channel == "iopub":
                    self._subscriptions += data
                self._is_writing = True
                await stream.write(data)
                self._is_writing = False
                self._changed.set()
            elif self._client_ended and not self._waiting:
                stream.end()
                return
            else:
                await self._change()

    async def _pass_to_client(self, stream: Stream, data: bytes) -> None:
        while True:
            if data:
                self._to_client.feed(data)
                self._writer.write(data)
                self.known.set()
                self._changed.set()
                if self.channel == "iopub" and not self._standing.is_set():
                    self._on_traffic(self)
                await self._drained()
            data = await stream.read(READ_BYTES)
            if not data:
                return

    async def _drained(self) -> None:
        """Waits while the client takes no more; while the machine is left only for one that is far behind."""
        size = self._writer.transport.get_write_buffer_size()
        if size <= READ_BYTES or (self._standing.is_set() and size < MAX_PARTING_BYTES):
            return
        waits: list[asyncio.Task[Any]] = [asyncio.create_task(self._writer.drain())]
        if size < MAX_PARTING_BYTES:
            waits.append(asyncio.create_task(self._standing.wait()))
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    async def rejoined(self) -> None:
        """On iopub: until the kernel's socket has the client's subscription. Errors: WireError."""
        if self.channel == "iopub":
            while not self._subscriptions and not self._client_ended:
                await self._change()
            await self.settle()

    async def settle(self) -> None:
        """Until the kernel's socket has taken in what it was sent, and sent out what its owner had sent before that.
        Errors: WireError."""
        self._pings += 1
        context = str(self._pings).encode()
        if self._stream is not None:
            await self._stream.write(ping(context))
        while self.is_joined and not self._kernel_ended and self._to_client.pong != context:
            await self._change()

    # Leaving a machine that runs on later: `stand`, `finish`, `settle`, `part`, each after the one before has returned,
    # then `leave`. Where there is no machine they do nothing.

    def stand(self) -> None:
        """Begins to pass no further message on to the kernel."""
        self._standing.set()
        self._changed.set()

    async def finish(self) -> None:
        """Until the message that is under way to the kernel is passed on."""
        while self.is_joined and (self._is_writing or not self._to_kernel.at_end):
            await self._change()

    async def unsubscribe(self) -> None:
        """The kernel keeps its output from now on, for the next subscriber. Errors: WireError."""
        if self.channel == "iopub" and self._stream is not None:
            await self._stream.write(UNSUBSCRIBE)

    async def part(self) -> None:
        """Until the kernel's socket knows that this client has disconnected."""
        if self._stream is not None:
            self._stream.end()
        while self.is_joined and not self._kernel_ended:
            await self._change()

    async def until_read(self) -> None:
        """Until the client has read all that it was sent."""
        transport = self._writer.transport
        fd, unread = transport.get_extra_info("socket").fileno(), bytearray(4)
        while not transport.is_closing():
            fcntl.ioctl(fd, termios.TIOCOUTQ, unread)  # bytes that the other end has not read (unix(7), SIOCOUTQ)
            if not any(unread) and not transport.get_write_buffer_size():
                return
            await asyncio.sleep(LOOK_INTERVAL_S)

    async def leave(self) -> None:
        """The machine goes, the client stays; where a message was cut off it must connect anew."""
        if self._serving is not None and not self._serving.done():
            self._is_leaving = True
            self._serving.cancel()
            await asyncio.wait({self._serving})

    def close(self) -> None:
        """Ends the connection, which its client may open anew."""
        if self._serving is not None:
            self._serving.cancel()
