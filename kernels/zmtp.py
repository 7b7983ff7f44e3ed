"""What an endpoint must know of ZMTP: the handshake, where messages end, and the commands it sends itself.

libzmq sends nothing of a message before the handshake is done. So that a client's connection can outlive a kernel's
machine, its endpoint answers the handshake itself and repeats the client's part to the socket of each machine, whose
own part it drops. Pure functions of bytes.
Source: ZMTP 3.1 (rfc.zeromq.org/spec/37), NULL mechanism; libzmq speaks 3.0 or 3.1 to us.
"""

from __future__ import annotations

from dataclasses import dataclass, field

GREETING_BYTES = 64
# Signature, version 3.0 (so that subscriptions come as messages), mechanism NULL, as-server 0, filler.
GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
# READY carries the socket's type and identity; libzmq's has under 100 bytes.
MAX_COMMAND_BYTES = 1024

# Takes back the subscription to everything, which is what Jupyter's clients have.
UNSUBSCRIBE = b"\x00\x01\x00"

# All parts of one message: what libzmq has of an unfinished message it keeps in the gateway's memory, beyond every
# other limit. A widget's buffers or a large image are far below it.
MAX_MESSAGE_BYTES = 512 << 20

# What libzmq keeps per part beside its bytes (zmq::msg_t).
PART_OVERHEAD_BYTES = 64

_FLAG_MORE = 0x01
_FLAG_LONG = 0x02
_FLAG_COMMAND = 0x04
_PONG = b"\x04PONG"


class MessageTooLongError(Exception):
    """A message whose parts have more than MAX_MESSAGE_BYTES."""


class HandshakeError(Exception):
    """The peer does not speak ZMTP 3 with the NULL mechanism."""


def ready(socket_type: bytes) -> bytes:
    """The READY command of a socket of this type (b"ROUTER", b"XPUB", ...)."""
    body = b"\x05READY" + b"\x0bSocket-Type" + len(socket_type).to_bytes(4, "big") + socket_type
    body += b"\x08Identity" + bytes(4)
    return bytes([_FLAG_COMMAND, len(body)]) + body


def ping(context: bytes) -> bytes:
    """The PING command. The peer's socket (libzmq's I/O thread, whatever its owner does) answers it with a PONG of the
    same context (at most 16 bytes), once it has taken in all that was sent before."""
    body = b"\x04PING" + bytes(2) + context  # 2 bytes: a time to live of none
    return bytes([_FLAG_COMMAND, len(body)]) + body


@dataclass
class Handshake:
    """One side's handshake as it arrives: greeting, then READY. Feed it bytes; it has what comes after.

    received: all bytes of the handshake. rest: what came after it (the first message's begin).
    """

    received: bytearray = field(default_factory=bytearray)
    rest: bytearray = field(default_factory=bytearray)
    done: bool = False

    def feed(self, data: bytes) -> None:
        """Errors: HandshakeError."""
        if self.done:
            self.rest += data
            return
        self.received += data
        if self.received[:1] != b"\xff"[: len(self.received)]:
            raise HandshakeError("not a ZMTP greeting")
        if len(self.received) < GREETING_BYTES:
            return
        if self.received[10] < 3 or bytes(self.received[12:32]).rstrip(b"\0") != b"NULL":
            raise HandshakeError("not ZMTP 3 with the NULL mechanism")
        end = _command_end(self.received, GREETING_BYTES)
        if end is not None:
            self.rest += self.received[end:]
            del self.received[end:]
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


class Frames:
    """Follows what one side sends after its handshake.

    at_end: all that was fed so far is whole messages and commands. pong: the context of the last PONG.
    """

    def __init__(self) -> None:
        self.pong = b""
        self._header = bytearray()
        self._body_left = 0
        self._message_bytes = 0
        self._command: bytearray | None = None

    @property
    def at_end(self) -> bool:
        return not (self._header or self._body_left or self._message_bytes)

    def feed(self, data: bytes | bytearray, *, to_end: bool = False) -> int:
        """How many bytes were taken: all, or with `to_end` those up to the first end of a message or command.

        Errors: MessageTooLongError.
        """
        position = 0
        while position < len(data):
            if self._body_left:
                step = min(self._body_left, len(data) - position)
                if self._command is not None:
                    self._command += data[position : position + step]
                self._body_left -= step
                position += step
            elif not self._feed_header(data[position]):
                position += 1
                continue
            else:
                position += 1
            if self._body_left == 0:
                self._end_frame()
                if to_end and self.at_end:
                    break
        return position

    def _feed_header(self, byte: int) -> bool:
        """Whether the header of a frame is complete: `_flags` and `_body_left` are set then."""
        self._header.append(byte)
        self._flags = self._header[0]
        if len(self._header) < (9 if self._flags & _FLAG_LONG else 2):
            return False
        self._body_left = int.from_bytes(self._header[1:], "big")
        self._header.clear()
        if self._flags & _FLAG_COMMAND:  # between the parts of a message, not one of them
            self._command = bytearray() if self._body_left <= MAX_COMMAND_BYTES else None
            return True
        # What libzmq needs for a part counts, too: empty ones must not be free.
        self._message_bytes += self._body_left + PART_OVERHEAD_BYTES
        if self._message_bytes > MAX_MESSAGE_BYTES:
            raise MessageTooLongError(f"a message of more than {MAX_MESSAGE_BYTES} bytes")
        return True

    def _end_frame(self) -> None:
        if not self._flags & _FLAG_COMMAND:
            if not self._flags & _FLAG_MORE:
                self._message_bytes = 0
        elif self._command is not None and self._command.startswith(_PONG):
            self.pong = bytes(self._command[len(_PONG) :])
        self._command = None
