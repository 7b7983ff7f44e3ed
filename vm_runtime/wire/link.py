"""The asyncio shell of one session: a Link moves the bytes of a Session over a Carrier and hands out Streams.

The host makes one with `Link.connect`. In the guest `serving.serve` makes one per session, and feeds it what it reads.
All tasks of a link live in one task group, which ends with the link; nothing outlives `close` or `wait_closed`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Any

from vm_runtime.wire.carriers import Carrier
from vm_runtime.wire.errors import (
    LinkClosedError,
    LocalProtocolError,
    OpenRejectedError,
    RemoteProtocolError,
    SessionResetError,
    StreamResetError,
    VersionError,
    WireError,
)
from vm_runtime.wire.events import (
    DataReceived,
    Event,
    GoodbyeReceived,
    HelloReceived,
    PongReceived,
    StreamAccepted,
    StreamEnded,
    StreamOpened,
    StreamRejected,
    StreamReset,
    WelcomeReceived,
    WindowOpened,
)
from vm_runtime.wire.greeting import Hello, Welcome
from vm_runtime.wire.protocol import WireSession
from vm_runtime.wire.states import SessionState
from vm_runtime.wire.stream import Incoming, Stream

logger = logging.getLogger(__name__)

# Per read: a few frames. A read full of the smallest frames is some 5000 of them, 10 ms in the event loop.
READ_BYTES = 64 * 1024
# Per write: what a control frame may have to wait for; 2 ms of a 31 MB/s wire.
WRITE_BYTES = 64 * 1024
# A reader that got this many events at once lets others run before it reads again.
MANY_EVENTS = 64
# How long a GOODBYE may take to be written to a peer that does not read.
GOODBYE_TIMEOUT_S = 1.0

Handler = Callable[[Incoming], Awaitable[None]]


class _OverError(Exception):
    """Ends a link's task group."""


class Link:
    """One session with the peer. An async context manager; its end closes it.

    `hello` and `welcome` are the greetings. Set `on_open` to a coroutine function to serve streams that the peer opens:
    they wait until it is set. A handler gets an Incoming and answers it; raising OpenRejectedError refuses, any other
    exception is logged and refuses with the code `internal`.
    """

    def __init__(self, session: WireSession, carrier: Carrier, *, reads: bool, on_open: Handler | None = None) -> None:
        self.session = session
        self.hello: Hello | None = None
        self.welcome: Welcome | None = None
        self.error: WireError | None = None
        self._carrier = carrier
        self._reads = reads
        self._on_open = on_open
        self._early: list[Incoming] = []  # bounded by max_pending_opens
        self._streams: dict[int, Stream] = {}
        self._opening: dict[int, tuple[Stream, asyncio.Future[None]]] = {}
        self._incoming: dict[int, Incoming] = {}
        self._handlers: dict[int, asyncio.Task[None]] = {}
        self._pongs: dict[int, asyncio.Future[None]] = {}
        self._wake = asyncio.Event()
        self._slot_free = asyncio.Event()
        self._greeted = asyncio.Event()
        self._over = asyncio.Event()
        self._group: asyncio.TaskGroup | None = None
        self._main: asyncio.Task[None] | None = None

    @classmethod
    async def connect(
        cls,
        carrier: Carrier,
        hello: Hello,
        *,
        marker: bytes,
        timeout_s: float | None = None,
        on_open: Handler | None = None,
    ) -> Link:
        """The host's end: begin a session and wait for WELCOME. Owns the carrier, and closes it in every case.

        marker: BOOT_MARKER for a freshly booted guest, else the `next_marker` of the last HELLO that was answered. On
        return store `hello.next_marker` (with every snapshot taken from now on, too) before doing anything else.

        Raises TimeoutError, VersionError, RemoteProtocolError, or LinkClosedError with the guest's reason.
        """
        link = cls(WireSession.host(hello, marker=marker), carrier, reads=True, on_open=on_open)
        link.hello = hello
        link.start()
        try:
            async with asyncio.timeout(timeout_s):
                await link._greeted.wait()
        except BaseException as error:
            await link.close("timeout" if isinstance(error, TimeoutError) else "cancelled", "No WELCOME")
            raise
        if link.welcome is None:
            await link.wait_closed()
            if isinstance(link.error, LinkClosedError) and link.error.code == "no_common_version":
                raise VersionError(link.error.reason)
            assert link.error is not None
            raise link.error
        return link

    # Using a link

    @property
    def on_open(self) -> Handler | None:
        """The handler of streams that the peer opens."""
        return self._on_open

    @on_open.setter
    def on_open(self, handler: Handler) -> None:
        self._on_open = handler
        early, self._early = self._early, []
        for incoming in early:
            self._handle(incoming)

    @property
    def closed(self) -> bool:
        """Whether the session is over; `error` says why."""
        return self.error is not None

    async def open(
        self, kind: str, params: Mapping[str, Any] | None = None, *, timeout_s: float | None = None
    ) -> Stream:
        """Open a stream, waiting for the peer's answer (`stream.result`) and before that for a free slot.

        Raises OpenRejectedError, TimeoutError, LinkClosedError, or LocalProtocolError for a bad kind or params.
        """
        async with asyncio.timeout(timeout_s):
            while not self.closed and not self.session.can_open:
                self._slot_free.clear()
                await self._slot_free.wait()
            if self.error is not None:
                raise self._closed_error()
            stream = Stream(self, self.session.open_stream(kind, params or {}), kind, params or {})
            answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._opening[stream.id] = (stream, answered)
            self.wake_writer()
            try:
                await answered
            except asyncio.CancelledError:
                # Given up by the caller, or by its time limit; the answer may have come in the same moment.
                if not stream.closed:
                    stream.reset("cancelled", "The opener gave up")
                raise
            finally:
                self._opening.pop(stream.id, None)
        return stream

    async def call(
        self, kind: str, params: Mapping[str, Any] | None = None, *, timeout_s: float | None = None
    ) -> Mapping[str, Any]:
        """A remote call: open a stream for its result alone. Raises what `open` raises."""
        stream = await self.open(kind, params, timeout_s=timeout_s)
        stream.discard()
        stream.end()
        return stream.result

    async def ping(self) -> float:
        """Seconds until the peer answered. Raises LinkClosedError, or LocalProtocolError with too many in flight."""
        if self.error is not None:
            raise self._closed_error()
        loop = asyncio.get_running_loop()
        begin = loop.time()
        token = self.session.ping()
        self._pongs[token] = answered = loop.create_future()
        self.wake_writer()
        try:
            await answered
        finally:
            self._pongs.pop(token, None)
        return loop.time() - begin

    async def close(self, code: str = "closed", reason: str = "") -> None:
        """Send GOODBYE, drop all streams and wait until every task is done. Closing twice is harmless."""
        self._finish(LinkClosedError(code, reason or "Closed by this end"))
        await self.wait_closed()

    async def wait_closed(self) -> None:
        """Wait until the session is over and cleaned up; `error` says why. Raises nothing of its own."""
        if self._main is not None and asyncio.current_task() is not self._main:
            await asyncio.wait([self._main])

    async def __aenter__(self) -> Link:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    # For streams (StreamOwner)

    def wake_writer(self) -> None:
        self._wake.set()

    def forget_stream(self, stream_id: int) -> None:
        self._streams.pop(stream_id, None)
        self._slot_free.set()

    def adopt_stream(self, stream: Stream) -> None:
        self._streams[stream.id] = stream

    # For serve()

    def start(self) -> None:
        """Start the link's tasks."""
        self._main = asyncio.create_task(self._run(), name="wire link")

    def feed(self, data: bytes) -> None:
        """What has been read from the carrier, where the link does not read it itself."""
        if self.closed:
            return
        try:
            self._dispatch_all(self.session.receive_data(data))
        except RemoteProtocolError as error:
            self._finish(error)
        self._wake.set()

    async def wait_greeted(self) -> bool:
        """Whether HELLO has come (guest); False when the session is over before it did."""
        await self._greeted.wait()
        return self.hello is not None and not self.closed

    def send_welcome(self, welcome: Welcome) -> None:
        """Guest: answer HELLO."""
        self.session.welcome(welcome)
        self.welcome = welcome
        self._wake.set()

    async def abandon(self) -> None:
        """The host began a new session: end this one without a GOODBYE, and at once."""
        self._finish(SessionResetError())
        await self.wait_closed()

    # Tasks

    async def _run(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                if self._reads:
                    group.create_task(self._read_loop(), name="wire reader")
                writer = group.create_task(self._write_loop(), name="wire writer")
                await self._over.wait()
                if not isinstance(self.error, SessionResetError):
                    await asyncio.wait([writer], timeout=GOODBYE_TIMEOUT_S)
                raise _OverError
        except* _OverError:
            pass
        finally:
            self._finish(LinkClosedError("cancelled", "The link's task was cancelled"))
            if self._reads:
                self._carrier.close()

    async def _read_loop(self) -> None:
        try:
            while not self.closed:
                data = await self._carrier.read(READ_BYTES)
                if not data:
                    self._finish(LinkClosedError("connection_lost", "The peer's end of the wire is closed"))
                    return
                events = self.session.receive_data(data)
                self._dispatch_all(events)
                self._wake.set()
                if len(events) > MANY_EVENTS:
                    await asyncio.sleep(0)
        except RemoteProtocolError as error:
            self._finish(error)
        except OSError as error:
            self._finish(LinkClosedError("connection_lost", str(error)))

    async def _write_loop(self) -> None:
        session = self.session
        try:
            while True:
                buffers = session.data_to_send(WRITE_BYTES)
                if buffers:
                    for stream in list(self._streams.values()):
                        stream.on_writable()
                    self._slot_free.set()
                    await self._carrier.write(buffers)
                elif session.state is SessionState.CLOSED:
                    return
                else:
                    self._wake.clear()
                    await self._wake.wait()
        except OSError as error:
            self._finish(LinkClosedError("connection_lost", str(error)))

    # Events

    def _dispatch_all(self, events: list[Event]) -> None:
        for event in events:
            if self.closed:
                return
            self._dispatch(event)

    def _dispatch(self, event: Event) -> None:
        match event:
            case DataReceived(stream_id, data):
                if stream := self._streams.get(stream_id):
                    stream.on_data(data)
            case WindowOpened(stream_id):
                if stream := self._streams.get(stream_id):
                    stream.on_writable()
            case StreamEnded(stream_id):
                if stream := self._streams.get(stream_id):
                    stream.on_end()
            case StreamReset(stream_id, code, reason):
                self._lose(stream_id, StreamResetError(code, reason))
            case StreamOpened(stream_id, kind, params):
                self._incoming[stream_id] = incoming = Incoming(self, stream_id, kind, params)
                self._handle(incoming)
            case StreamAccepted(stream_id, result):
                stream, answered = self._opening[stream_id]
                stream.result = result
                self._streams[stream_id] = stream
                self._slot_free.set()
                if not answered.done():
                    answered.set_result(None)
            case StreamRejected(stream_id, code, message):
                stream, answered = self._opening[stream_id]
                stream.on_lost(OpenRejectedError(code, message))
                self._slot_free.set()
                if not answered.done():
                    answered.set_exception(OpenRejectedError(code, message))
            case PongReceived(token):
                answered_ping = self._pongs.get(token)
                if answered_ping is not None and not answered_ping.done():
                    answered_ping.set_result(None)
            case HelloReceived(hello):
                self.hello = hello
                self._greeted.set()
            case WelcomeReceived(welcome):
                self.welcome = welcome
                self._greeted.set()
            case GoodbyeReceived(code, reason):
                self._finish(LinkClosedError(code, reason or "Closed by the peer"))

    def _lose(self, stream_id: int, error: WireError) -> None:
        if incoming := self._incoming.pop(stream_id, None):
            incoming.on_lost(error)
            if incoming in self._early:
                self._early.remove(incoming)
            if not incoming.answered and (handler := self._handlers.get(stream_id)):
                handler.cancel()
        if stream := self._streams.pop(stream_id, None):
            stream.on_lost(error)
        self._slot_free.set()

    def _handle(self, incoming: Incoming) -> None:
        if self._on_open is None:
            self._early.append(incoming)
            return
        assert self._group is not None
        task = self._group.create_task(self._run_handler(self._on_open, incoming), name=f"wire {incoming.kind}")
        self._handlers[incoming.id] = task
        task.add_done_callback(lambda _: self._handlers.pop(incoming.id, None))

    async def _run_handler(self, handler: Handler, incoming: Incoming) -> None:
        # Also where the handler is closed instead of cancelled.
        code, reason = "cancelled", "The handler was cancelled"
        try:
            await handler(incoming)
            incoming.reject("unanswered", "The handler returned without an answer")
            code, reason = "handler_returned", ""
            if incoming.stream is not None:
                incoming.stream.end()
                incoming.stream.discard()
        except OpenRejectedError as error:
            code, reason = error.code, error.reason
        except (StreamResetError, LinkClosedError) as error:
            code, reason = error.code, error.reason
        except Exception as error:
            logger.exception("Handler of %s failed", incoming.kind)
            code, reason = "internal", f"{type(error).__name__}: {error}"
        finally:
            self._incoming.pop(incoming.id, None)
            if not self.closed:
                self._give_up(incoming, code, reason)

    @staticmethod
    def _give_up(incoming: Incoming, code: str, reason: str) -> None:
        try:
            incoming.reject(code, reason)
            if incoming.stream is not None and not incoming.stream.closed and code != "handler_returned":
                incoming.stream.reset(code, reason)
        except LocalProtocolError:  # a code of the handler's that is none
            logger.exception("Handler of %s gave up badly", incoming.kind)
            incoming.reject("internal", reason)

    def _closed_error(self) -> LinkClosedError:
        """A new LinkClosedError, as one exception must not be raised in several tasks."""
        error = self.error
        if isinstance(error, SessionResetError):
            return SessionResetError()
        if isinstance(error, LinkClosedError):
            return LinkClosedError(error.code, error.reason)
        if isinstance(error, RemoteProtocolError):
            return LinkClosedError(error.code, str(error))
        return LinkClosedError("closed", str(error))

    def _finish(self, error: WireError) -> None:
        """End the session, once: nothing can be sent or received any more but our GOODBYE."""
        if self.error is not None:
            return
        self.error = error
        lost = self._closed_error()
        with contextlib.suppress(LocalProtocolError):
            self.session.close(lost.code, lost.reason)
        for incoming in list(self._incoming.values()):
            incoming.on_lost(lost)
        for stream in list(self._streams.values()):
            stream.on_lost(self._closed_error())
        for stream, answered in list(self._opening.values()):
            stream.on_lost(lost)
            if not answered.done():
                answered.set_exception(self._closed_error())
        for pong in self._pongs.values():
            if not pong.done():
                pong.set_exception(self._closed_error())
        self._streams.clear()
        self._early.clear()
        for event in (self._wake, self._slot_free, self._greeted, self._over):
            event.set()
