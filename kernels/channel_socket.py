"""A client's end of one of a kernel's ZMQ sockets, which stays while machines come and go.

    WAITING <--> JOINED --> (closed: what is left to send, then the end)
                   |
                STANDING                 nothing more goes to this machine's kernel

Whole messages wait here while it is not JOINED; one that was cut off is sent again, since no kernel has received it.
Knows ZMTP; nothing of what messages mean.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from kernels.zmtp import Event, Message, Parts, Pong, Ready, ZmtpConnection, ZmtpError, size_of
from vm_runtime.wire.errors import WireError
from vm_runtime.wire.stream import Stream

log = logging.getLogger(__name__)

SOCKET_TYPES = {"shell": b"DEALER", "iopub": b"SUB", "stdin": b"DEALER", "control": b"DEALER", "hb": b"REQ"}
# Where a message is a request: not on iopub (subscriptions), not on hb (every second), not on stdin (answers).
REQUEST_CHANNELS = frozenset({"shell", "control"})
# What XPUB takes for a subscription to everything, and for its end.
SUBSCRIBE_ALL = b"\x01"
UNSUBSCRIBE_ALL = b"\x00"
READ_BYTES = 64 * 1024
# Kept of a client that sends while there is no machine, or a kernel that does not read: beyond it the client waits.
MAX_WAITING_BYTES = 256 * 1024
# Kept for a client that takes less than its kernel sends: one stream message of the largest size.
HIGH_WATER_BYTES = 1 << 20
# The same while its machine is left: what libzmq holds for it there (16 messages of 1 MiB) and the wire's window.
MAX_PARTING_BYTES = 32 << 20
# After a kernel's socket has hung up, as libzmq (zmq_setsockopt(3), ZMQ_RECONNECT_IVL); each time twice as long, so
# that a machine whose kernel is dead is at rest. A kernel that is started anew is connected to at once.
RECONNECT_S = 0.1
MAX_RECONNECT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class KernelEnd:
    """A connection to a kernel's socket that has no identity yet. received: what has come from the socket. topics:
    those it is subscribed to."""

    stream: Stream
    zmtp: ZmtpConnection
    received: Sequence[Event] = ()
    topics: Sequence[bytes] = ()


Connect = Callable[[str], Awaitable[KernelEnd]]


class Inbox:
    """What has come for one client, of all its sockets, in that order: (channel, parts)."""

    def __init__(self) -> None:
        self.closed = False
        self.byte_count = 0
        self._messages: deque[tuple[str, list[bytes], int]] = deque()
        self._changed = asyncio.Event()

    def __bool__(self) -> bool:
        return bool(self._messages)

    def put(self, channel: str, parts: list[bytes]) -> None:
        """What comes for a client that has disconnected is dropped."""
        if not self.closed:
            size = size_of(parts)
            self.byte_count += size
            self._messages.append((channel, parts, size))
            self.wake()

    def pop(self) -> tuple[str, list[bytes]] | None:
        """The oldest, None if there is none."""
        if not self._messages:
            return None
        channel, parts, size = self._messages.popleft()
        self.byte_count -= size
        self.wake()
        return channel, parts

    def is_full(self, limit_bytes: int) -> bool:
        """Whether what waits here is beyond the limit, and someone may yet take it."""
        return self.byte_count >= limit_bytes and not self.closed

    def close(self) -> None:
        """Nothing more comes; what has come can be taken."""
        self.closed = True
        self.wake()

    def wake(self) -> None:
        """Whoever waits looks again."""
        self._changed.set()

    async def change(self) -> None:
        """Until something is different; who calls it looks again at what it needs."""
        self._changed.clear()
        await self._changed.wait()


class ChannelSocket:
    """`join` when there is a machine, `leave` when it goes; `send` at any time; what comes goes into the inbox.

    on_traffic: called when the client has sent something, or iopub has.
    may_send: awaited in each machine before the first request.
    on_over: called when it was closed and has nothing left to send.
    known: the kernel's socket knows the client: its subscriptions, or that it can be asked for input.
    """

    def __init__(
        self,
        channel: str,
        identity: bytes,
        inbox: Inbox,
        *,
        on_traffic: Callable[[ChannelSocket], None],
        may_send: Callable[[], Awaitable[None]],
        on_over: Callable[[ChannelSocket], None],
    ) -> None:
        self.channel = channel
        self.known = asyncio.Event()
        self._identity = identity
        self._inbox = inbox
        self._on_traffic = on_traffic
        self._may_send = may_send
        self._on_over = on_over
        self._outbox: deque[Parts] = deque()
        self._outbox_bytes = 0
        self._topics: dict[bytes, None] = {}
        self._zmtp: ZmtpConnection | None = None
        self._stream: Stream | None = None
        self._pings = 0
        self._pong = 0
        self._is_sending = False
        self._is_standing = False
        self._is_closed = False
        self._changed = asyncio.Event()
        self._serving: asyncio.Task[None] | None = None

    @property
    def has_request(self) -> bool:
        """Whether the client has sent something that should reach a kernel, and has not."""
        return self.channel in REQUEST_CHANNELS and bool(self._outbox)

    async def send(self, parts: Parts) -> None:
        """To the kernel; waits while too much waits already. On a closed socket the message is dropped."""
        while self._outbox_bytes >= MAX_WAITING_BYTES and not self._is_closed:
            await self._change()
        if not self._is_closed:
            self._put(parts)
            self._on_traffic(self)

    def forget_requests(self) -> None:
        """Drops what has not been passed on, on shell and control."""
        if self.channel in REQUEST_CHANNELS:
            self._outbox.clear()
            self._outbox_bytes = 0
            self._changed.set()

    def subscribe(self, message: bytes) -> None:
        """To a topic, or no longer, as an XPUB socket takes it; also in machines to come. On iopub."""
        if message[:1] == SUBSCRIBE_ALL:
            self._topics[message] = None
        else:
            self._topics.pop(SUBSCRIBE_ALL + message[1:], None)
        if self._stream is not None:
            self._put([message])

    def _put(self, parts: Parts) -> None:
        self._outbox.append(parts)
        self._outbox_bytes += size_of(parts)
        self._changed.set()

    async def _change(self) -> None:
        """Until something is different that one of the waits here is for; each looks again at what it needs."""
        self._changed.clear()
        await self._changed.wait()

    def join(self, connect: Connect) -> None:
        """There is a machine, to whose kernel `connect` leads. Again after `leave` only."""
        self._serving = asyncio.create_task(self._serve(connect))

    async def _serve(self, connect: Connect) -> None:
        wait_s = RECONNECT_S
        while not self._is_closed or self.has_request:
            try:
                await self._converse(await connect(self.channel))
            except* (WireError, ZmtpError) as errors:
                # A kernel that is not there, or restarts: it is tried again. A guest may do anything.
                log.info("A kernel's %s socket is tried again: %s", self.channel, errors.exceptions[0])
            if not self._is_standing:
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, MAX_RECONNECT_S)
            if self._is_standing:
                return
        self._on_over(self)

    async def _converse(self, kernel: KernelEnd) -> None:
        self._stream, self._zmtp, self._pong = kernel.stream, kernel.zmtp, 0
        if self.channel == "iopub":
            self._outbox.clear()
            self._outbox_bytes = 0
            for topic in self._topics:
                if topic not in kernel.topics:
                    self._put([topic])
        elif self.channel == "stdin":
            self._pings += 1
        kernel.zmtp.introduce(self._identity)
        try:
            async with asyncio.TaskGroup() as group:
                sending = group.create_task(self._send_all(kernel))
                await self._receive_all(kernel)
                sending.cancel()
        finally:
            self._stream = self._zmtp = None
            self._is_sending = False
            self.known.clear()
            self._changed.set()
            kernel.stream.reset()

    async def _send_all(self, kernel: KernelEnd) -> None:
        stream, zmtp = kernel.stream, kernel.zmtp
        may_send = self.channel not in REQUEST_CHANNELS
        pinged = self._pings - (self.channel == "stdin")
        while True:
            if data := zmtp.data_to_send():
                await stream.write(data)
            elif zmtp.is_open and self._outbox and not self._is_standing:
                if not may_send:
                    await self._may_send()
                    may_send = True
                    continue
                self._is_sending = True
                parts = self._outbox[0]
                zmtp.send_message(parts)
                await stream.write(zmtp.data_to_send())
                self._is_sending = False
                if self._outbox and self._outbox[0] is parts:  # it was not forgotten
                    self._outbox_bytes -= size_of(self._outbox.popleft())
                if self.channel == "iopub":
                    self._pings += 1
                self._changed.set()
            elif zmtp.is_open and pinged != self._pings:
                pinged = self._pings
                zmtp.ping(str(pinged).encode())
            elif self._is_closed and not self._outbox:
                stream.end()
                return
            else:
                await self._change()

    async def _receive_all(self, kernel: KernelEnd) -> None:
        events: Sequence[Event] = kernel.received
        if kernel.topics:
            self.known.set()
        while True:
            for event in events:
                self._on_event(event)
            self._changed.set()
            if self.channel == "iopub" and events and not self._is_standing:
                self._on_traffic(self)
            while self._inbox.is_full(MAX_PARTING_BYTES if self._is_standing else HIGH_WATER_BYTES):
                await self._inbox.change()
            data = await kernel.stream.read(READ_BYTES)
            if not data:
                return
            events = kernel.zmtp.receive_data(data)

    def _on_event(self, event: Event) -> None:
        match event:
            case Message(parts):
                self._inbox.put(self.channel, parts)
            case Ready():
                return
            case Pong(context):
                self._pong = int(context) if context.isdigit() else 0
        self.known.set()

    async def settle(self) -> None:
        """Until the kernel's socket has taken in what it was sent, and sent out what its owner had sent before that."""
        self._pings += 1
        ping, zmtp = self._pings, self._zmtp
        self._changed.set()
        while zmtp is not None and zmtp.is_open and self._zmtp is zmtp and self._pong < ping:
            await self._change()

    async def wait_known(self, holds: Callable[[], bool]) -> None:
        """Until `known`, or something no longer holds that ends with a `leave`."""
        while holds() and not self.known.is_set() and not self._is_closed:
            await self._change()

    # Leaving a machine that runs on later: `stand`, `finish`, `settle`, `part`, each after the one before has returned,
    # then `leave`. Where there is no machine they do nothing.

    def stand(self) -> None:
        """Begins to pass no further message on to the kernel."""
        self._is_standing = self._serving is not None
        self._changed.set()
        self._inbox.wake()

    async def finish(self) -> None:
        """Until the message that is under way to the kernel is passed on."""
        while self._is_sending:
            await self._change()

    async def unsubscribe(self) -> None:
        """The kernel keeps its output from now on, for the next subscriber. Errors: WireError."""
        if self.channel == "iopub" and self._stream is not None and self._zmtp is not None and self._zmtp.is_open:
            self._zmtp.send_message([UNSUBSCRIBE_ALL])
            self._changed.set()

    async def part(self) -> None:
        """Until the kernel's socket knows that this client has disconnected."""
        if self._stream is not None:
            self._stream.end()
        while self._stream is not None:
            await self._change()

    async def leave(self) -> None:
        """The machine goes, the client stays."""
        serving, self._serving = self._serving, None
        if serving is not None:
            serving.cancel()
            await asyncio.wait({serving})
        self._is_standing = False
        self._changed.set()
        if self._is_closed and not self.has_request:
            self._on_over(self)

    def close(self) -> None:
        """The client has disconnected; its requests still reach the kernel."""
        self._is_closed = True
        self._changed.set()
        if self._serving is None and not self.has_request:
            self._on_over(self)
