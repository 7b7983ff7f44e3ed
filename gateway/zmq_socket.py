"""A ZMQ socket on the event loop, with reading that can be paused.

zmq's own descriptor is edge-triggered: after it has fired, and after every send, the socket must be drained or asked
again. Callbacks straight from the event loop cost half of what zmq.asyncio's futures do per message. Knows nothing of
Jupyter.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

import zmq

from gateway.frames import Part

# Messages taken in one turn of the event loop, so that one flooding kernel leaves turns to the others.
MESSAGES_PER_TURN = 64
# Messages that zmq itself holds for a socket that is not read. They have no size limit of their own, so few: two
# of them keep the reader busy, more would only be memory.
RECEIVE_HIGH_WATER = 4
# Messages on their way to a kernel that does not read (busy in a cell); beyond it the client is made to wait.
SEND_HIGH_WATER = 32
# zmq allocates the length that a message announces before its bytes come, so a hostile guest must not announce
# terabytes. Beyond it zmq drops the connection.
MAX_MESSAGE_BYTES = 512 * 1024 * 1024


class ZmqSocket:
    """A connected DEALER or SUB socket. `on_message(frames)` is called for each message while not paused.

    Frames are memoryviews on zmq's memory where they are large: whoever keeps them for long copies them.
    `close()` may be called twice; what was not yet sent is dropped.
    """

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], kind: int, address: str, *, identity: bytes = b""
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._socket = context.socket(kind)
        self._socket.linger = 0
        self._socket.rcvhwm = RECEIVE_HIGH_WATER
        self._socket.sndhwm = SEND_HIGH_WATER
        self._socket.maxmsgsize = MAX_MESSAGE_BYTES
        if identity:
            self._socket.identity = identity
        if kind == zmq.SUB:
            self._socket.subscribe(b"")
        self._socket.connect(address)
        self._fd = self._socket.fileno()
        self._turn: asyncio.Handle | None = None
        self._paused = False
        self._writable: asyncio.Event | None = None
        self._readable = asyncio.Event()
        self.on_message: Callable[[Sequence[Part]], None] | None = None
        self._loop.add_reader(self._fd, self._on_readable)

    @property
    def closed(self) -> bool:
        return bool(self._socket.closed)

    @property
    def has_unread(self) -> bool:
        """Whether a message has arrived that was not delivered yet."""
        return not self._socket.closed and bool(self._events() & zmq.POLLIN)

    def pause(self) -> None:
        """No more messages until `resume`; zmq, the wire and in the end the kernel wait."""
        self._paused = True

    def resume(self) -> None:
        """Ends a pause."""
        if self._paused:
            self._paused = False
            self._soon()

    def start(self, on_message: Callable[[Sequence[Part]], None]) -> None:
        """Sets the receiver (replacing the one before) and begins to read."""
        self.on_message = on_message
        self._soon()

    async def wait_readable(self) -> None:
        """Until a message has come, before `start`; or the socket is closed."""
        self._soon()
        await self._readable.wait()

    async def send(self, frames: Sequence[Part]) -> None:
        """Sends one message; waits while the kernel takes none. On a closed socket the message is dropped."""
        while not self._socket.closed:
            try:
                self._socket.send_multipart(frames, zmq.NOBLOCK, copy=True)
            except zmq.Again:
                self._writable = self._writable or asyncio.Event()
                self._writable.clear()
                await self._writable.wait()
                continue
            # Sending may have swallowed the edge that announces a message.
            self._soon()
            return

    def drain(self) -> None:
        """Delivers at once what has already arrived, paused or not: the last messages of a kernel that has ended."""
        paused, self._paused = self._paused, False
        self._receive(limit=MESSAGES_PER_TURN)
        self._paused = self._paused or paused

    def close(self) -> None:
        if self._socket.closed:
            return
        self._loop.remove_reader(self._fd)
        if self._turn is not None:
            self._turn.cancel()
        self._socket.close()
        self._readable.set()
        if self._writable is not None:
            self._writable.set()

    def _soon(self) -> None:
        if self._turn is None and not self._socket.closed:
            self._turn = self._loop.call_soon(self._on_turn)

    def _on_turn(self) -> None:
        self._turn = None
        self._on_readable()

    def _on_readable(self) -> None:
        if self._socket.closed:
            return
        self._receive(limit=MESSAGES_PER_TURN)
        if self._socket.closed:
            return
        events = self._events()
        if self._writable is not None and events & zmq.POLLOUT:
            self._writable.set()
        if events & zmq.POLLIN:
            self._readable.set()
            if self.on_message is not None and not self._paused:
                self._soon()

    def _events(self) -> int:
        events = self._socket.getsockopt(zmq.EVENTS)
        assert isinstance(events, int)
        return events

    def _receive(self, *, limit: int) -> None:
        with suppress(zmq.Again):
            for _ in range(limit):
                if self._paused or self.on_message is None or self._socket.closed:
                    return
                frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
                self.on_message([frame.buffer for frame in frames])
