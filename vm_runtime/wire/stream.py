"""A stream of the wire for asyncio, and an OPEN of the peer that waits for its answer. Does no I/O of its own.

Both belong to a Link, which they reach through `StreamOwner`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol

from vm_runtime.wire.errors import LocalProtocolError, StreamResetError, WireError
from vm_runtime.wire.protocol import WireSession


class StreamOwner(Protocol):
    """What a stream needs of its Link."""

    session: WireSession

    def wake_writer(self) -> None:
        """The session has something to send."""

    def forget_stream(self, stream_id: int) -> None:
        """The stream is over on this end."""

    def adopt_stream(self, stream: Stream) -> None:
        """The stream was accepted."""


class Stream:
    """One stream: bytes both ways, each direction ended on its own. One reader and one writer at a time.

    params: what the opener gave; result: what the other end accepted it with. As a context manager it ends our
    direction on the way out, and resets the stream if the block failed or the peer has not ended its direction.
    """

    def __init__(self, owner: StreamOwner, stream_id: int, kind: str, params: Mapping[str, Any]) -> None:
        self.id = stream_id
        self.kind = kind
        self.params = params
        self.result: Mapping[str, Any] = {}
        self._owner = owner
        self._buffer = bytearray()  # bounded by the window: credit is given when it is read
        self._readable = asyncio.Event()
        self._writable = asyncio.Event()
        self._lost = asyncio.Event()
        self._ended_local = False
        self._ended_remote = False
        self._discarding = False
        self._error: WireError | None = None

    @property
    def closed(self) -> bool:
        """Whether both directions are over (what has arrived can still be read)."""
        return self._error is not None or (self._ended_local and self._ended_remote)

    async def read(self, max_bytes: int = 64 * 1024) -> bytes:
        """Up to `max_bytes`, at least one; b"" at the end. Reading is what lets the peer send more.

        Raises StreamResetError or LinkClosedError, after what had arrived before was read.
        """
        while not self._buffer:
            if self._error is not None:
                raise self._error
            if self._ended_remote:
                return b""
            self._readable.clear()
            await self._readable.wait()
        if len(self._buffer) <= max_bytes:
            data = bytes(self._buffer)
            self._buffer.clear()
        else:
            data = bytes(memoryview(self._buffer)[:max_bytes])
            del self._buffer[:max_bytes]
        self._owner.session.acknowledge(self.id, len(data))
        self._owner.wake_writer()
        return data

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Queue all of data, waiting while the peer's window or our queue is full.

        Raises StreamResetError, LinkClosedError, or LocalProtocolError after `end`. Cancelled, a part was queued.
        """
        view = memoryview(data if isinstance(data, bytes) else bytes(data))
        while view:
            if self._error is not None:
                raise self._error
            if self._ended_local:
                raise LocalProtocolError(f"write on stream {self.id} ({self.kind}), which was ended")
            room = self._owner.session.sendable(self.id)
            if room == 0:
                self._writable.clear()
                await self._writable.wait()
                continue
            self._owner.session.send_data(self.id, view[:room])
            self._owner.wake_writer()
            view = view[room:]

    async def wait_lost(self) -> WireError:
        """Wait until the stream is given up or its session is over, even while nothing is read or written; why.

        A stream that ends in both directions never is.
        """
        await self._lost.wait()
        assert self._error is not None
        return self._error

    def end(self) -> None:
        """Send no more, once what is queued has been sent. Ending twice is harmless."""
        if self._ended_local or self._error is not None:
            return
        self._owner.session.end(self.id)
        self._ended_local = True
        self._writable.set()
        self._owner.wake_writer()
        if self._ended_remote:
            self._owner.forget_stream(self.id)

    def reset(self, code: str = "cancelled", reason: str = "") -> None:
        """Give the stream up in both directions. Harmless when it is over."""
        if self.closed:
            return
        self._owner.session.reset(self.id, code, reason)
        self._owner.wake_writer()
        self._owner.forget_stream(self.id)
        self.on_lost(StreamResetError(code, reason or "reset by this end"))
        self._buffer.clear()

    def discard(self) -> None:
        """Drop what arrives from now on, without giving the peer credit for more."""
        self._discarding = True
        self._buffer.clear()

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if exc is None:
            self.end()
        if not self.closed:
            self.reset("cancelled" if exc is None else "failed", "" if exc is None else type(exc).__name__)

    # Called by the Link

    def on_data(self, data: bytes) -> None:
        if not self._discarding:
            self._buffer += data
            self._readable.set()

    def on_writable(self) -> None:
        self._writable.set()

    def on_end(self) -> None:
        self._ended_remote = True
        self._readable.set()
        if self._ended_local:
            self._owner.forget_stream(self.id)

    def on_lost(self, error: WireError) -> None:
        if self._error is None and not self.closed:
            self._error = error
            self._lost.set()
        self._readable.set()
        self._writable.set()


class Incoming:
    """A stream that the peer asks for. A handler answers it once: `accept`, `answer` or `reject`."""

    def __init__(self, owner: StreamOwner, stream_id: int, kind: str, params: Mapping[str, Any]) -> None:
        self.id = stream_id
        self.kind = kind
        self.params = params
        self.stream: Stream | None = None
        self.answered = False
        self._owner = owner
        self._lost: WireError | None = None

    async def accept(self, result: Mapping[str, Any] | None = None) -> Stream:
        """Accept with a result. When the handler returns the stream is ended, and what still comes is dropped.

        Raises LocalProtocolError (answered twice, result too large), StreamResetError or LinkClosedError.
        """
        if self._lost is not None:
            raise self._lost
        if self.answered:
            raise LocalProtocolError(f"Stream {self.id} ({self.kind}) was answered before")
        result = result or {}
        self._owner.session.accept(self.id, result)
        self.answered = True
        self.stream = Stream(self._owner, self.id, self.kind, self.params)
        self.stream.result = result
        self._owner.adopt_stream(self.stream)
        self._owner.wake_writer()
        return self.stream

    async def answer(self, result: Mapping[str, Any] | None = None) -> None:
        """Answer a call: accept with a result, and no data."""
        stream = await self.accept(result)
        stream.discard()
        stream.end()

    def reject(self, code: str, message: str) -> None:
        """Refuse. Harmless where it was answered, or given up by the peer."""
        if self.answered or self._lost is not None:
            return
        self.answered = True
        self._owner.session.reject(self.id, code, message)
        self._owner.wake_writer()

    def on_lost(self, error: WireError) -> None:
        """Called by the Link: the peer gave it up, or the session is over."""
        self._lost = error
        if self.stream is not None:
            self.stream.on_lost(error)
