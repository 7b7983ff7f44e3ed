"""ZMTP as a state machine without I/O: greeting, READY, then messages and commands, for either end of a connection.

    GREETING --the peer's greeting--> HANDSHAKE --its READY--> OPEN

`receive_data(data)` answers what the peer did; write what `data_to_send()` gives, at first, after each `receive_data`
and after each method that sends. All that is received may be hostile: a frame's size is checked when its header is
there, before anything is kept for it. Knows nothing of what messages mean.
Source: ZMTP 3.1 (rfc.zeromq.org/spec/37), NULL mechanism; libzmq speaks 3.0 or 3.1 to us.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

GREETING_BYTES = 64
# Signature, version 3.0 (so that subscriptions come as messages), mechanism NULL, as-server 0, filler.
GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
# READY carries the socket's type and identity; libzmq's has under 100 bytes.
MAX_COMMAND_BYTES = 1024
# All parts of one message, which are in memory until its last has come. A widget's buffers or a large image are far
# below it.
MAX_MESSAGE_BYTES = 512 << 20
# Counted for each part beside its bytes: empty ones must not be free.
PART_OVERHEAD_BYTES = 64

_MORE = 0x01
_LONG = 0x02
_COMMAND = 0x04

Part = bytes | memoryview
Parts = Sequence[Part]


class ZmtpError(Exception):
    """The peer broke the protocol or a limit of this module; the connection is of no more use."""


@dataclass(frozen=True)
class Ready:
    """The peer's handshake is complete. identity: what it wants to be known by, empty for none."""

    identity: bytes


@dataclass(frozen=True)
class Pong:
    """The peer's answer to `ping`: it has taken in all that it was sent before."""

    context: bytes


@dataclass(frozen=True)
class Message:
    """A whole message."""

    parts: list[bytes]


Event = Ready | Pong | Message


class State(Enum):
    """What the peer has sent so far."""

    GREETING = "greeting"
    HANDSHAKE = "handshake"
    OPEN = "open"


def size_of(parts: Parts) -> int:
    """Bytes of a message as limits count them."""
    return sum(map(len, parts)) + PART_OVERHEAD_BYTES * len(parts)


class ZmtpConnection:
    """One connection of a socket of this type (b"DEALER", b"XPUB", ...).

    identity: what it is known by at the other end. With None its READY waits for `introduce`.
    """

    def __init__(self, socket_type: bytes, identity: bytes | None = b"") -> None:
        self.state = State.GREETING
        self._socket_type = socket_type
        self._identity = identity
        self._is_introduced = False
        self._outgoing: list[Part] = [GREETING]
        self._received = bytearray()  # at most one frame that is not complete
        self._parts: list[bytes] = []
        self._parts_bytes = 0

    @property
    def is_open(self) -> bool:
        """Whether messages may be sent."""
        return self.state is State.OPEN and self._is_introduced

    def introduce(self, identity: bytes) -> None:
        """Sends READY with this identity, once it may be sent."""
        self._identity = identity
        self._send_ready()

    def send_message(self, parts: Parts) -> None:
        """Sends a message of one part or more. Only while `is_open`, as all that follows."""
        self._check_open()
        for left, part in zip(range(len(parts) - 1, -1, -1), parts, strict=True):
            self._send_frame(_MORE if left else 0, part)

    def ping(self, context: bytes) -> None:
        """Asks for a `Pong` of the same context (at most 16 bytes). libzmq's I/O thread answers, whatever the socket's
        owner does."""
        self._check_open()
        self._send_frame(_COMMAND, b"\x04PING" + bytes(2) + context)  # 2 bytes: a time to live of none

    def data_to_send(self) -> bytes:
        """What is to be written, in whole frames; empty when there is nothing."""
        data = b"".join(self._outgoing)
        self._outgoing.clear()
        return data

    def receive_data(self, data: bytes) -> list[Event]:
        """What the peer did. Errors: ZmtpError, after which the connection must not be used."""
        self._received += data
        events: list[Event] = []
        start = 0
        if self.state is State.GREETING:
            if not self._has_greeting():
                return events
            start = GREETING_BYTES
            self.state = State.HANDSHAKE
            self._send_ready()
        with memoryview(self._received) as received:
            while (frame := self._frame_at(received, start)) is not None:
                flags, body, start = frame
                event = self._on_command(body) if flags & _COMMAND else self._on_part(flags, body)
                if event is not None:
                    events.append(event)
        del self._received[:start]
        return events

    def _check_open(self) -> None:
        if not self.is_open:
            raise RuntimeError("ZMTP: nothing may be sent before both ends have sent READY")

    def _send_ready(self) -> None:
        # libzmq takes no READY before its own greeting has been sent.
        if self._identity is None or self.state is State.GREETING or self._is_introduced:
            return
        self._is_introduced = True
        body = b"\x05READY"
        for name, value in ((b"Socket-Type", self._socket_type), (b"Identity", self._identity)):
            body += bytes([len(name)]) + name + len(value).to_bytes(4, "big") + value
        self._send_frame(_COMMAND, body)

    def _send_frame(self, flags: int, body: Part) -> None:
        size = len(body)
        header = bytes([flags, size]) if size < 256 else bytes([flags | _LONG]) + size.to_bytes(8, "big")
        self._outgoing += (header, body)

    def _has_greeting(self) -> bool:
        greeting = self._received
        if greeting and greeting[0] != 0xFF:
            raise ZmtpError("not a ZMTP greeting")
        if len(greeting) < GREETING_BYTES:
            return False
        if greeting[10] < 3 or bytes(greeting[12:32]).rstrip(b"\0") != b"NULL":
            raise ZmtpError("not ZMTP 3 with the NULL mechanism")
        return True

    def _frame_at(self, received: memoryview, start: int) -> tuple[int, bytes, int] | None:
        """Flags, body and end of the frame that begins there; None while it is not complete."""
        if len(received) < start + 2:
            return None
        flags = received[start]
        if flags > (_MORE | _LONG | _COMMAND) or (flags & _COMMAND and flags & _MORE):
            raise ZmtpError(f"a frame with the flags {flags:#x}")
        header = 9 if flags & _LONG else 2
        if len(received) < start + header:
            return None
        size = int.from_bytes(received[start + 1 : start + header], "big")
        if flags & _COMMAND:
            if size > MAX_COMMAND_BYTES:
                raise ZmtpError(f"a command of {size} bytes")
        elif self.state is not State.OPEN:
            raise ZmtpError("a message before READY")
        elif self._parts_bytes + size + PART_OVERHEAD_BYTES > MAX_MESSAGE_BYTES:
            raise ZmtpError(f"a message of more than {MAX_MESSAGE_BYTES} bytes")
        end = start + header + size
        return (flags, bytes(received[start + header : end]), end) if len(received) >= end else None

    def _on_part(self, flags: int, body: bytes) -> Event | None:
        self._parts.append(body)
        self._parts_bytes += len(body) + PART_OVERHEAD_BYTES
        if flags & _MORE:
            return None
        message, self._parts, self._parts_bytes = Message(self._parts), [], 0
        return message

    def _on_command(self, body: bytes) -> Event | None:
        name, rest = body[1 : 1 + body[0]] if body else b"", body[1 + body[0] :] if body else b""
        if self.state is State.HANDSHAKE:
            if name != b"READY":
                raise ZmtpError(f"{name[:20]!r} instead of READY")
            self.state = State.OPEN
            return Ready(_properties(rest).get(b"identity", b""))
        if name == b"PONG":
            return Pong(rest)
        if name == b"PING" and self.is_open:
            self._send_frame(_COMMAND, b"\x04PONG" + rest[2:18])
        return None  # others are of no use here


def _properties(data: bytes) -> dict[bytes, bytes]:
    """The properties of READY, their names in lower case. Errors: ZmtpError."""
    found: dict[bytes, bytes] = {}
    while data:
        name_end = 1 + data[0]
        value_start = name_end + 4
        value_end = value_start + int.from_bytes(data[name_end:value_start], "big")
        if value_end > len(data) or value_start > len(data):
            raise ZmtpError("a READY that is cut off")
        found[data[1:name_end].lower()] = data[value_start:value_end]
        data = data[value_end:]
    return found
