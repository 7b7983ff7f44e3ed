"""A client's ZMTP handshake, answered on behalf of a kernel that sleeps, and repeated to the kernel when it is awake.

libzmq sends nothing of a message before the handshake is done. So that a request (and only a request) can wake a
sleeping kernel, its endpoint answers the handshake itself, keeps what the client said, waits for the first message, and
later says all of it to the real socket, whose own side of the handshake it drops. Pure functions of bytes.
Source: ZMTP 3.1 (rfc.zeromq.org/spec/37), NULL mechanism; libzmq speaks 3.0 or 3.1 to us.
"""

from __future__ import annotations

from dataclasses import dataclass, field

GREETING_BYTES = 64
# Signature, version 3.0 (so that subscriptions come as messages), mechanism NULL, as-server 0, filler.
GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
# READY carries the socket's type and identity; libzmq's has under 100 bytes.
MAX_COMMAND_BYTES = 1024

# All parts of one message from a kernel: what libzmq has of an unfinished message it keeps in the gateway's memory,
# beyond every other limit. A widget's buffers or a large image are far below it.
MAX_MESSAGE_BYTES = 512 << 20

# What libzmq keeps per part beside its bytes (zmq::msg_t).
PART_OVERHEAD_BYTES = 64

_FLAG_MORE = 0x01
_FLAG_LONG = 0x02
_FLAG_COMMAND = 0x04


class MessageTooLongError(Exception):
    """A message whose parts have more than MAX_MESSAGE_BYTES."""


class HandshakeError(Exception):
    """The peer does not speak ZMTP 3 with the NULL mechanism."""


def ready(socket_type: bytes) -> bytes:
    """The READY command of a socket of this type (b"ROUTER", b"XPUB", ...)."""
    body = b"\x05READY" + b"\x0bSocket-Type" + len(socket_type).to_bytes(4, "big") + socket_type
    body += b"\x08Identity" + bytes(4)
    return bytes([_FLAG_COMMAND, len(body)]) + body


@dataclass
class Handshake:
    """One side's handshake as it arrives: greeting, then READY. Feed it bytes; it says what comes after.

    said: all bytes of the handshake. rest: what came after it (the first message's begin).
    """

    said: bytearray = field(default_factory=bytearray)
    rest: bytearray = field(default_factory=bytearray)
    done: bool = False

    def feed(self, data: bytes) -> None:
        """Errors: HandshakeError."""
        if self.done:
            self.rest += data
            return
        self.said += data
        if self.said[:1] != b"\xff"[: len(self.said)]:
            raise HandshakeError("not a ZMTP greeting")
        if len(self.said) < GREETING_BYTES:
            return
        if self.said[10] < 3 or bytes(self.said[12:32]).rstrip(b"\0") != b"NULL":
            raise HandshakeError("not ZMTP 3 with the NULL mechanism")
        end = _command_end(self.said, GREETING_BYTES)
        if end is not None:
            self.rest += self.said[end:]
            del self.said[end:]
            self.done = True


def _command_end(data: bytearray, start: int) -> int | None:
    """Where the command that begins at `start` ends, None while it is incomplete."""
    if len(data) < start + 2:
        return None
    flags = data[start]
    if not flags & _FLAG_COMMAND:
        raise HandshakeError("a message before READY")
    if flags & _FLAG_LONG:
        if len(data) < start + 9:
            return None
        size, header = int.from_bytes(data[start + 1 : start + 9], "big"), 9
    else:
        size, header = data[start + 1], 2
    if size > MAX_COMMAND_BYTES:
        raise HandshakeError(f"a READY of {size} bytes")
    end = start + header + size
    return end if len(data) >= end else None


class MessageMeter:
    """Adds up the parts of each message in what a socket says after its handshake."""

    def __init__(self) -> None:
        self._header = bytearray()
        self._body_left = 0
        self._message_bytes = 0

    def feed(self, data: bytes) -> None:
        """Errors: MessageTooLongError."""
        position = 0
        while position < len(data):
            if self._body_left:
                step = min(self._body_left, len(data) - position)
                self._body_left -= step
                position += step
                continue
            self._header.append(data[position])
            position += 1
            flags = self._header[0]
            if len(self._header) < (9 if flags & _FLAG_LONG else 2):
                continue
            self._body_left = int.from_bytes(self._header[1:], "big")
            self._header.clear()
            if flags & _FLAG_COMMAND:  # between the parts of a message, not one of them
                continue
            # What libzmq needs for a part counts, too: empty ones must not be free.
            self._message_bytes += self._body_left + PART_OVERHEAD_BYTES
            if self._message_bytes > MAX_MESSAGE_BYTES:
                raise MessageTooLongError(f"a message of more than {MAX_MESSAGE_BYTES} bytes")
            if not flags & _FLAG_MORE:
                self._message_bytes = 0
