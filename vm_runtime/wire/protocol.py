"""One session of the wire as a pure state machine: bytes in, events and bytes out. No I/O, clock or randomness.

The states and their theory of operation are in states.py, the format in docs/wire.md. How to drive it:

* give what has come to `receive_data`, act on the events; after any call, write what `data_to_send` hands out;
* the guest makes a session when its MarkerScanner finds a marker, and gives it what follows the marker;
* when `receive_data` raises RemoteProtocolError the session is over; write what `data_to_send` still has (a GOODBYE).

What a peer can make this object hold is bounded: unread data by the windows (the owner holds it), opens by the limits
of the greeting, answers by MAX_PENDING_CONTROL_BYTES, queued data by MAX_QUEUED_BYTES, one partial frame.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vm_runtime.wire.errors import LocalProtocolError, RemoteProtocolError, VersionError
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
from vm_runtime.wire.frames import (
    HEADER,
    HEADER_BYTES,
    MAX_STREAM_ID,
    PING_BYTES,
    SESSION_FRAMES,
    FrameType,
    check_header,
    encode_frame,
)
from vm_runtime.wire.greeting import Hello, Limits, Welcome, choose_version, parse_session, parse_versions
from vm_runtime.wire.marker import MarkerScanner
from vm_runtime.wire.payloads import encode_coded, encode_json, is_name, parse_coded, parse_json
from vm_runtime.wire.states import (
    SESSION_RECEIVE,
    STREAM_RECEIVE,
    STREAM_SEND,
    Role,
    SessionState,
    StreamState,
)

# The marker of the first session of a freshly booted guest, which has had no HELLO that could name one.
BOOT_MARKER = bytes.fromhex("c1d7a90e5b8842f3b6ef10437f9a2c66")

# A guest's queues (device, agent, VMM) hold less than 1 MiB; what sends 8 MiB before its greeting is no guest of ours.
MAX_SKIPPED_BYTES = 8 * 1024 * 1024

# Control frames waiting to be written. A well-behaved peer reads: 64 pending opens in each direction at 32 KiB are
# 4 MiB. One that makes us answer and doesn't read (a flood of PING or OPEN; compare CVE-2019-9512) passes it. Each
# frame counts 64 bytes more than it has, for the object that holds it.
MAX_PENDING_CONTROL_BYTES = 5 * 1024 * 1024
FRAME_OVERHEAD_BYTES = 64

# Opens which the peer takes back before they were answered cost us a handler each and it nothing (HTTP/2's "rapid
# reset", CVE-2023-44487). Each answered open pays one back; an honest peer that times out calls stays far below.
MAX_UNANSWERED_RESETS = 256

# Data a stream holds for writing, whatever window the peer grants.
MAX_QUEUED_BYTES = 256 * 1024

# Pieces of queued data below this size are joined: many tiny writes must not cost an object each.
SMALL_PIECE_BYTES = 4096

# Streams take turns in pieces of this size, what one write to a virtio port takes.
CHUNK_BYTES = 32 * 1024

# Pings in flight; PING is for one keep-alive and a measurement or two.
MAX_PINGS = 16

_MAX_WINDOW = 2**31 - 1
_WINDOW = struct.Struct("!I")
_PING = struct.Struct("!Q")


@dataclass(slots=True)
class _StreamRecord:
    """The session's side of one stream. Windows are in bytes: what we may still send, what the peer may."""

    state: StreamState
    send_window: int
    receive_window: int
    received: int = 0  # delivered to the owner and not acknowledged
    credit: int = 0  # acknowledged and not yet sent to the peer
    queue: deque[memoryview] = field(default_factory=deque)
    queued: int = 0
    ending: bool = False


class WireSession:
    """One session, from the greeting to its end. Use `WireSession.host` or `WireSession.guest`."""

    def __init__(self, role: Role, *, limits: Limits) -> None:
        self.role = role
        self.state = SessionState.SEARCHING if role is Role.HOST else SessionState.AWAIT_HELLO
        self.version: int | None = None
        self.limits = limits
        self.peer_limits = Limits()
        self._hello: Hello | None = None
        self._session = b""
        self._scanner: MarkerScanner | None = None
        self._skipped = 0
        self._partial = bytearray()
        self._needed = HEADER_BYTES
        self._control: deque[bytes] = deque()
        self._control_bytes = 0
        self._streams: dict[int, _StreamRecord] = {}
        self._ready: deque[int] = deque()
        self._next_id = 1 if role is Role.HOST else 2
        self._last_peer_id = 0
        self._counts = {"own": 0, "own_pending": 0, "peer": 0, "peer_pending": 0}
        self._unanswered_resets = 0
        self._next_ping = 0
        self._pings: deque[int] = deque()

    @classmethod
    def host(cls, hello: Hello, *, marker: bytes) -> WireSession:
        """The host's end. `marker` is BOOT_MARKER, or the next marker of the last HELLO that was answered."""
        session = cls(Role.HOST, limits=hello.limits)
        session._hello = hello
        session._scanner = MarkerScanner(bytes.fromhex(hello.session))
        session._push(marker)
        session._push(encode_frame(FrameType.HELLO, 0, encode_json(hello.to_json())))
        return session

    @classmethod
    def guest(cls, *, limits: Limits | None = None) -> WireSession:
        """The guest's end; give it what follows a marker."""
        return cls(Role.GUEST, limits=limits or Limits())

    # Receiving

    def receive_data(self, data: bytes) -> list[Event]:
        """What the peer did. Raises RemoteProtocolError, after which the session is CLOSED. [] when it is closed.

        Look at all events before you answer one: a later one may be that its stream, or the session, is over.
        """
        events: list[Event] = []
        if self.state is SessionState.CLOSED:
            return events
        try:
            if self.state is SessionState.SEARCHING:
                data = self._search(data)
            self._parse(data, events)
        except RemoteProtocolError as error:
            self._close(error.code, str(error))
            raise
        return events

    def _search(self, data: bytes) -> bytes:
        assert self._scanner is not None
        found, rest = self._scanner.feed(data)
        if found:
            self._scanner = None
            self.state = SessionState.AWAIT_WELCOME
            return rest
        self._skipped += len(data)
        if self._skipped > MAX_SKIPPED_BYTES:
            raise RemoteProtocolError(f"No greeting in the first {MAX_SKIPPED_BYTES} bytes")
        return b""

    def _parse(self, data: bytes, events: list[Event]) -> None:
        partial = self._partial
        if partial:
            # A frame that trickles in is looked at once it is whole, so that a byte costs the same however it comes.
            partial += data
            if len(partial) < self._needed:
                return
            data = bytes(partial)
            partial.clear()
        offset, size = 0, len(data)
        self._needed = HEADER_BYTES
        while size - offset >= HEADER_BYTES:
            frame_type, flags, reserved, stream_id, length = HEADER.unpack_from(data, offset)
            check_header(frame_type, flags, reserved, stream_id, length)
            start = offset + HEADER_BYTES
            if start + length > size:
                self._needed = HEADER_BYTES + length
                break
            offset = start + length
            event = self._receive_frame(FrameType(frame_type), stream_id, data[start:offset])
            if event is not None:
                events.append(event)
                if self.state is SessionState.CLOSED:
                    return
            if self._control_bytes > MAX_PENDING_CONTROL_BYTES:
                raise RemoteProtocolError("The peer asks for answers and does not read them", code="flood")
        partial += data[offset:] if offset else data

    def _receive_frame(self, frame_type: FrameType, stream_id: int, payload: bytes) -> Event | None:
        if frame_type in SESSION_FRAMES:
            state = SESSION_RECEIVE.get((self.state, frame_type))
            if state is None:
                raise RemoteProtocolError(f"{frame_type.name} frame in a session that is {self.state.value}")
            event = self._SESSION_HANDLERS[frame_type](self, payload)
            self.state = state
            if state is SessionState.CLOSED:
                self._forget()
            return event
        if self.state is not SessionState.OPEN:
            raise RemoteProtocolError(f"{frame_type.name} frame in a session that is {self.state.value}")
        if frame_type is FrameType.OPEN:
            return self._on_open(stream_id, payload)
        record = self._streams.get(stream_id)
        if record is None:
            own = (stream_id % 2 == 1) == (self.role is Role.HOST)
            if stream_id >= self._next_id if own else stream_id > self._last_peer_id:
                raise RemoteProtocolError(f"{frame_type.name} frame on stream {stream_id}, which never was opened")
            return None  # closed here while the frame was on its way
        state_after = STREAM_RECEIVE.get((record.state, frame_type))
        if state_after is None:
            raise RemoteProtocolError(f"{frame_type.name} frame on stream {stream_id}, which is {record.state.value}")
        return self._STREAM_HANDLERS[frame_type](self, stream_id, record, state_after, payload)

    def _on_hello(self, payload: bytes) -> Event:
        value = parse_json(payload)
        self._session = bytes.fromhex(parse_session(value))
        offered = parse_versions(value)
        self.version = choose_version(offered)
        if self.version is None:
            raise VersionError(
                f"The host speaks versions {offered[0]} to {offered[1]} of the wire, this guest does not"
            )
        hello = Hello.from_json(value)
        self.peer_limits = hello.limits
        return HelloReceived(hello)

    def _on_welcome(self, payload: bytes) -> Event:
        welcome = Welcome.from_json(parse_json(payload))
        assert self._hello is not None
        if not self._hello.versions[0] <= welcome.version <= self._hello.versions[1]:
            raise VersionError(f"The guest chose version {welcome.version} of the wire, which was not offered")
        self.version = welcome.version
        self.peer_limits = welcome.limits
        return WelcomeReceived(welcome)

    def _on_ping(self, payload: bytes) -> None:
        self._push(encode_frame(FrameType.PONG, 0, payload))

    def _on_pong(self, payload: bytes) -> Event:
        token: int = _PING.unpack(payload)[0]
        if not self._pings or self._pings.popleft() != token:
            raise RemoteProtocolError("PONG without its PING")
        return PongReceived(token)

    def _on_goodbye(self, payload: bytes) -> Event:
        return GoodbyeReceived(*parse_coded(payload, "reason"))

    def _on_open(self, stream_id: int, payload: bytes) -> Event:
        own = (stream_id % 2 == 1) == (self.role is Role.HOST)
        if own or stream_id <= self._last_peer_id:
            raise RemoteProtocolError(f"OPEN with id {stream_id}, which the peer may not use (now)")
        # The peer's own count is never below ours, as each close passes through us in order: it can't err innocently.
        if self._counts["peer"] >= self.limits.max_streams:
            raise RemoteProtocolError(f"More than {self.limits.max_streams} streams", code="too_many_streams")
        if self._counts["peer_pending"] >= self.limits.max_pending_opens:
            raise RemoteProtocolError(f"More than {self.limits.max_pending_opens} pending opens", code="too_many_opens")
        value = parse_json(payload)
        kind, params = value.get("kind"), value.get("params", {})
        if not isinstance(kind, str) or not is_name(kind) or not isinstance(params, dict):
            raise RemoteProtocolError("OPEN without a valid kind and params")
        self._last_peer_id = stream_id
        self._add(stream_id, StreamState.INCOMING)
        return StreamOpened(stream_id, kind, params)

    def _on_accept(self, stream_id: int, record: _StreamRecord, after: StreamState, payload: bytes) -> Event:
        event = StreamAccepted(stream_id, parse_json(payload))
        self._move(stream_id, record, after)
        return event

    def _on_reject(self, stream_id: int, record: _StreamRecord, after: StreamState, payload: bytes) -> Event:
        event = StreamRejected(stream_id, *parse_coded(payload, "message"))
        self._move(stream_id, record, after)
        return event

    def _on_data(self, stream_id: int, record: _StreamRecord, after: StreamState, payload: bytes) -> Event:
        record.receive_window -= len(payload)
        if record.receive_window < 0:
            raise RemoteProtocolError(f"More data on stream {stream_id} than its window", code="window_exceeded")
        record.received += len(payload)
        return DataReceived(stream_id, payload)

    def _on_window(self, stream_id: int, record: _StreamRecord, after: StreamState, payload: bytes) -> Event:
        more: int = _WINDOW.unpack(payload)[0]
        record.send_window += more
        if more == 0 or record.send_window > _MAX_WINDOW:
            raise RemoteProtocolError(f"WINDOW of {more} bytes on stream {stream_id}")
        return WindowOpened(stream_id)

    def _on_end(self, stream_id: int, record: _StreamRecord, after: StreamState, payload: bytes) -> Event:
        self._move(stream_id, record, after)
        return StreamEnded(stream_id)

    def _on_reset(self, stream_id: int, record: _StreamRecord, after: StreamState, payload: bytes) -> Event:
        event = StreamReset(stream_id, *parse_coded(payload, "reason"))
        if record.state is StreamState.INCOMING:
            self._unanswered_resets += 1
            if self._unanswered_resets > MAX_UNANSWERED_RESETS:
                raise RemoteProtocolError("Too many opens taken back before they were answered", code="flood")
        self._move(stream_id, record, after)
        return event

    _SESSION_HANDLERS: dict[FrameType, Callable[[WireSession, bytes], Event | None]] = {  # noqa: RUF012 (a table)
        FrameType.HELLO: _on_hello,
        FrameType.WELCOME: _on_welcome,
        FrameType.PING: _on_ping,
        FrameType.PONG: _on_pong,
        FrameType.GOODBYE: _on_goodbye,
    }
    _STREAM_HANDLERS: dict[FrameType, Callable[[WireSession, int, _StreamRecord, StreamState, bytes], Event]] = {  # noqa: RUF012
        FrameType.ACCEPT: _on_accept,
        FrameType.REJECT: _on_reject,
        FrameType.DATA: _on_data,
        FrameType.WINDOW: _on_window,
        FrameType.END: _on_end,
        FrameType.RESET: _on_reset,
    }

    # Sending

    def welcome(self, welcome: Welcome) -> None:
        """Guest only: answer HELLO, when all that follows a restore is done. Version and limits are filled in here."""
        if self.state is not SessionState.PREPARING or self.version is None:
            raise LocalProtocolError(f"WELCOME in a session that is {self.state.value}")
        value = replace(welcome, version=self.version, limits=self.limits).to_json()
        frame = encode_frame(FrameType.WELCOME, 0, encode_json(value))
        self._push(self._session)
        self._push(frame)
        self.state = SessionState.OPEN

    @property
    def can_open(self) -> bool:
        """Whether `open_stream` would be allowed now, by the peer's limits and by what still waits to be written."""
        return (
            self.state is SessionState.OPEN
            and self._counts["own"] < self.peer_limits.max_streams
            and self._counts["own_pending"] < self.peer_limits.max_pending_opens
            and self._control_bytes < MAX_PENDING_CONTROL_BYTES // 2
        )

    def open_stream(self, kind: str, params: Mapping[str, Any]) -> int:
        """Ask for a stream; its id. Answered by StreamAccepted or StreamRejected."""
        if not self.can_open:
            raise LocalProtocolError(
                f"No stream can be opened now (session {self.state.value}, or at the peer's limit)"
            )
        if not is_name(kind):
            raise LocalProtocolError(f"Not a stream kind: {kind!r}")
        stream_id = self._next_id
        if stream_id > MAX_STREAM_ID:
            raise LocalProtocolError("This session has used up its stream ids")
        self._push(encode_frame(FrameType.OPEN, stream_id, encode_json({"kind": kind, "params": dict(params)})))
        self._next_id += 2
        self._add(stream_id, StreamState.OPENING)
        return stream_id

    def accept(self, stream_id: int, result: Mapping[str, Any]) -> None:
        """Answer StreamOpened. Nothing has changed if the result can't be sent (LocalProtocolError)."""
        record, after = self._sending(stream_id, FrameType.ACCEPT)
        self._push(encode_frame(FrameType.ACCEPT, stream_id, encode_json(result)))
        self._unanswered_resets = max(0, self._unanswered_resets - 1)
        self._move(stream_id, record, after)

    def reject(self, stream_id: int, code: str, message: str) -> None:
        """Answer StreamOpened with a refusal."""
        record, after = self._sending(stream_id, FrameType.REJECT)
        self._push(encode_frame(FrameType.REJECT, stream_id, encode_coded(code, "message", message)))
        self._unanswered_resets = max(0, self._unanswered_resets - 1)
        self._move(stream_id, record, after)

    def sendable(self, stream_id: int) -> int:
        """Bytes that `send_data` takes now: the peer's window, and what may be queued. 0 when it takes none."""
        record = self._streams.get(stream_id)
        if record is None or record.ending or (record.state, FrameType.DATA) not in STREAM_SEND:
            return 0
        return min(record.send_window, MAX_QUEUED_BYTES - record.queued)

    def send_data(self, stream_id: int, data: bytes | memoryview) -> None:
        """Queue data, at most `sendable` bytes. It is seldom copied and must not change."""
        record, _ = self._sending(stream_id, FrameType.DATA)
        if len(data) > min(record.send_window, MAX_QUEUED_BYTES - record.queued):
            raise LocalProtocolError(f"{len(data)} bytes on stream {stream_id} are more than it takes now")
        if not data:
            return
        if not record.queued:
            self._ready.append(stream_id)
        record.send_window -= len(data)
        record.queued += len(data)
        if record.queue and len(record.queue[-1]) + len(data) <= SMALL_PIECE_BYTES:
            data = b"".join((record.queue.pop(), data))
        record.queue.append(memoryview(data))

    def acknowledge(self, stream_id: int, count: int) -> None:
        """`count` bytes of DataReceived were consumed: the peer may send as many more. No-op on a closed stream."""
        record = self._streams.get(stream_id)
        if record is None:
            return
        if count > record.received:
            raise LocalProtocolError(
                f"{count} bytes acknowledged on stream {stream_id}, {record.received} were received"
            )
        record.received -= count
        record.credit += count
        # Sent in halves of the window: neither a frame for each read, nor a sender that waits for it.
        if record.credit * 2 >= self.limits.window_bytes and (record.state, FrameType.WINDOW) in STREAM_SEND:
            self._push(encode_frame(FrameType.WINDOW, stream_id, _WINDOW.pack(record.credit)))
            record.receive_window += record.credit
            record.credit = 0

    def end(self, stream_id: int) -> None:
        """Send no more on this stream, once what is queued has been sent."""
        record, _ = self._sending(stream_id, FrameType.END)
        record.ending = True
        if not record.queued:
            self._send_end(stream_id, record)

    def reset(self, stream_id: int, code: str, reason: str) -> None:
        """Give a stream up in both directions, dropping what is queued. No-op on a closed stream."""
        record = self._streams.get(stream_id)
        if record is None:
            return
        if record.state is StreamState.INCOMING:
            self.reject(stream_id, code, reason)
            return
        self._push(encode_frame(FrameType.RESET, stream_id, encode_coded(code, "reason", reason)))
        self._move(stream_id, record, STREAM_SEND[record.state, FrameType.RESET])

    def ping(self) -> int:
        """Send a PING; the token of the PongReceived that answers it."""
        if self.state is not SessionState.OPEN or len(self._pings) >= MAX_PINGS:
            raise LocalProtocolError(f"PING in a session that is {self.state.value}, or has {MAX_PINGS} unanswered")
        token = self._next_ping
        self._next_ping += 1
        self._pings.append(token)
        self._push(encode_frame(FrameType.PING, 0, token.to_bytes(PING_BYTES, "big")))
        return token

    def close(self, code: str, reason: str) -> None:
        """End the session with a GOODBYE, dropping everything else that waits. Closing twice is harmless."""
        if self.state is not SessionState.CLOSED:
            self._close(code, reason)

    def data_to_send(self, max_bytes: int) -> list[bytes | memoryview]:
        """About `max_bytes` of whole frames to write, in order; [] when there are none.

        Control frames go first, then streams take turns: a bulk transfer delays nobody by more than one call's worth.
        """
        buffers: list[bytes | memoryview] = []
        total = 0
        control = self._control
        while control and total < max_bytes:
            frame = control.popleft()
            self._control_bytes -= len(frame) + FRAME_OVERHEAD_BYTES
            total += len(frame)
            buffers.append(frame)
        ready = self._ready
        while ready and total < max_bytes:
            stream_id = ready.popleft()
            record = self._streams.get(stream_id)
            if record is None or not record.queued:
                continue  # reset after it was queued
            pieces = self._take_chunk(record)
            length = sum(map(len, pieces))
            buffers.append(HEADER.pack(FrameType.DATA, 0, 0, stream_id, length))
            buffers.extend(pieces)
            total += HEADER_BYTES + length
            if record.queued:
                ready.append(stream_id)
            elif record.ending:
                self._send_end(stream_id, record)
        return buffers

    # Inside

    @staticmethod
    def _take_chunk(record: _StreamRecord) -> list[memoryview]:
        pieces: list[memoryview] = []
        room = min(CHUNK_BYTES, record.queued)
        record.queued -= room
        while room:
            piece = record.queue.popleft()
            if len(piece) > room:
                record.queue.appendleft(piece[room:])
                piece = piece[:room]
            room -= len(piece)
            pieces.append(piece)
        return pieces

    def _send_end(self, stream_id: int, record: _StreamRecord) -> None:
        self._push(encode_frame(FrameType.END, stream_id))
        self._move(stream_id, record, STREAM_SEND[record.state, FrameType.END])

    def _sending(self, stream_id: int, frame_type: FrameType) -> tuple[_StreamRecord, StreamState]:
        record = self._streams.get(stream_id)
        after = None if record is None or record.ending else STREAM_SEND.get((record.state, frame_type))
        if record is None or after is None:
            found = "closed" if record is None else "ended" if record.ending else record.state.value
            raise LocalProtocolError(f"{frame_type.name} on stream {stream_id}, which is {found}")
        return record, after

    def _push(self, frame: bytes) -> None:
        self._control.append(frame)
        self._control_bytes += len(frame) + FRAME_OVERHEAD_BYTES

    def _side(self, state: StreamState, stream_id: int) -> tuple[str, bool]:
        side = "own" if (stream_id % 2 == 1) == (self.role is Role.HOST) else "peer"
        return side, state in (StreamState.OPENING, StreamState.INCOMING)

    def _add(self, stream_id: int, state: StreamState) -> None:
        self._streams[stream_id] = _StreamRecord(
            state=state,
            send_window=self.peer_limits.window_bytes,
            receive_window=self.limits.window_bytes,
        )
        side, _ = self._side(state, stream_id)
        self._counts[side] += 1
        self._counts[side + "_pending"] += 1

    def _move(self, stream_id: int, record: _StreamRecord, after: StreamState) -> None:
        side, pending = self._side(record.state, stream_id)
        if pending:
            self._counts[side + "_pending"] -= 1
        record.state = after
        if after is StreamState.CLOSED:
            self._counts[side] -= 1
            del self._streams[stream_id]

    def _forget(self) -> None:
        self._streams.clear()
        self._ready.clear()
        self._partial.clear()
        self._control.clear()
        self._control_bytes = 0

    def _close(self, code: str, reason: str) -> None:
        greeted = self.role is Role.HOST or self.state is SessionState.OPEN
        # A host that has not read WELCOME is still searching for the session id; a guest without one can't answer.
        unsent_greeting = self.state is SessionState.OPEN and self._session in self._control
        self._forget()
        if not greeted or unsent_greeting:
            self._push(self._session)
        if greeted or self._session:
            self._push(encode_frame(FrameType.GOODBYE, 0, encode_coded(code, "reason", reason)))
        self.state = SessionState.CLOSED
