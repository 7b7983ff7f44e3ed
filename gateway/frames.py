"""Kernel messages as WebSocket frames and as ZMQ frames, without looking into them.

Pure functions over bytes. Two WebSocket forms exist (jupyter_server/services/kernels/connection/base.py):

    v1.kernel.websocket.jupyter.org   uint64le count n, n x uint64le offsets, channel, header, parent, metadata,
                                      content, buffers...; the last offset is the end
    the old one                       JSON text with "channel"; with buffers a binary frame: uint32be count n,
                                      n x uint32be offsets, JSON, buffers...

and on ZMQ: identities..., <IDS|MSG>, HMAC, header, parent, metadata, content, buffers... (jupyter_client.session).
Going out, the four JSON parts pass as the bytes they are, if they are UTF-8; only the header of the old form is read,
for the `msg_id` and `msg_type` that form repeats at its top.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gateway.errors import FrameError

V1 = "v1.kernel.websocket.jupyter.org"
DELIMITER = b"<IDS|MSG>"
CHANNELS = ("shell", "control", "stdin", "iopub")
# Those that a client sends on.
CLIENT_CHANNELS = ("shell", "control", "stdin")
# Channel, four parts and the end. Neither form limits the buffers, of which widgets with many arrays have thousands; as
# each is a frame in ZMQ, this many take it some ten milliseconds.
MIN_OFFSETS = 6
MAX_BUFFERS = 16_384

Part = bytes | memoryview


@dataclass(frozen=True, slots=True)
class KernelMessage:
    """One message: the channel it belongs to, its four JSON parts as sent, and its binary buffers."""

    channel: str
    header: Part
    parent: Part
    metadata: Part
    content: Part
    buffers: Sequence[Part] = ()

    @property
    def size(self) -> int:
        """Bytes of all parts together."""
        parts = len(self.header) + len(self.parent) + len(self.metadata) + len(self.content)
        return parts + sum(len(buffer) for buffer in self.buffers)


class Signer:
    """Computes the HMAC of messages to the kernel. scheme: `hmac-<hash>` of the connection file; an empty key: none."""

    def __init__(self, key: bytes, scheme: str = "hmac-sha256") -> None:
        self._mac = hmac.new(key, digestmod=getattr(hashlib, scheme.removeprefix("hmac-"))) if key else None

    def sign(self, *parts: Part) -> bytes:
        if self._mac is None:
            return b""
        mac = self._mac.copy()
        for part in parts:
            mac.update(part)
        return mac.hexdigest().encode()


def to_zmq(message: KernelMessage, signer: Signer) -> list[Part]:
    """The frames to send on a DEALER socket."""
    parts = (message.header, message.parent, message.metadata, message.content)
    return [DELIMITER, signer.sign(*parts), *parts, *message.buffers]


def from_zmq(channel: str, frames: Sequence[Part]) -> KernelMessage | None:
    """The message in frames received on `channel`; None when they are none (the kernel is not to be trusted).

    The HMAC is dropped unchecked: what proves the sender is the 0700 directory of the socket, and who can write there
    has the key as well.
    """
    for index, frame in enumerate(frames[:8]):
        if len(frame) == len(DELIMITER) and bytes(frame) == DELIMITER:
            parts = frames[index + 2 :]
            if len(parts) < 4:
                return None
            header, parent, metadata, content = map(_utf8, parts[:4])
            return KernelMessage(channel, header, parent, metadata, content, tuple(parts[4:]))
    return None


def _utf8(part: Part) -> Part:
    """As jupyter_client reads it: U+FFFD for what is no UTF-8, for which a browser would close the connection."""
    try:
        str(part, "utf-8")
    except UnicodeDecodeError:
        return str(part, "utf-8", "replace").encode()
    return part


def encode_v1(message: KernelMessage) -> bytes:
    """The message as one binary WebSocket message of the v1 form."""
    channel = message.channel.encode()
    pieces = [channel, message.header, message.parent, message.metadata, message.content, *message.buffers]
    count = len(pieces) + 1
    offsets = [8 * (count + 1)]
    for piece in pieces:
        offsets.append(offsets[-1] + len(piece))
    return b"".join([struct.pack(f"<{count + 1}Q", count, *offsets), *pieces])


def decode_v1(data: bytes, *, channels: Sequence[str] = CLIENT_CHANNELS) -> KernelMessage:
    """The reverse of `encode_v1`. channels: those that it may be for. Errors: FrameError."""
    if len(data) < 8:
        raise FrameError("A v1 message starts with the number of its offsets; this one is shorter than that.")
    (count,) = struct.unpack_from("<Q", data)
    if not MIN_OFFSETS <= count <= MIN_OFFSETS + MAX_BUFFERS or len(data) < 8 * (count + 1):
        raise FrameError(
            f"A v1 message has {MIN_OFFSETS} offsets and one for each of up to {MAX_BUFFERS} buffers, not {count}."
        )
    offsets = struct.unpack_from(f"<{count}Q", data, 8)
    ends = offsets[1:]
    if offsets[0] < 8 * (count + 1) or ends[-1] > len(data) or any(a > b for a, b in zip(offsets, ends, strict=False)):
        raise FrameError("The offsets of a v1 message must rise and end within it.")
    pieces = [data[start:end] for start, end in zip(offsets, ends, strict=False)]
    channel, header, parent, metadata, content, *buffers = pieces
    name = _channel(channel.decode("ascii", "replace"), channels)
    return KernelMessage(name, header, parent, metadata, content, buffers)


def encode_legacy(message: KernelMessage) -> tuple[bytes, bool]:
    """The message in the old form: (data, binary?). A header that is no JSON object raises FrameError."""
    msg_id, msg_type = _identify(message.header)
    text = b"".join(
        [
            b'{"channel": "',
            message.channel.encode(),
            b'", "header": ',
            message.header,
            b', "msg_id": ',
            msg_id,
            b', "msg_type": ',
            msg_type,
            b', "parent_header": ',
            message.parent,
            b', "metadata": ',
            message.metadata,
            b', "content": ',
            message.content,
            b"}" if message.buffers else b', "buffers": []}',
        ]
    )
    if not message.buffers:
        return text, False
    pieces = [text, *message.buffers]
    offset = 4 * (len(pieces) + 1)
    offsets = []
    for piece in pieces:
        offsets.append(offset)
        offset += len(piece)
    return b"".join([struct.pack(f"!{len(pieces) + 1}I", len(pieces), *offsets), *pieces]), True


def _identify(header: Part) -> tuple[bytes, bytes]:
    try:
        value = json.loads(bytes(header))
        return json.dumps(value["msg_id"]).encode(), json.dumps(value["msg_type"]).encode()
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FrameError(f"The kernel sent a message whose header cannot be read: {error}") from error


def decode_legacy(data: str | bytes) -> KernelMessage:
    """A message of the old form, text or binary. Errors: FrameError."""
    buffers: tuple[bytes, ...] = ()
    text: str | bytes = data
    if isinstance(data, bytes):
        text, buffers = _split_legacy(data)
    try:
        value = json.loads(text)
        if not isinstance(value, dict):
            raise TypeError("it is no object")
        names = ("header", "parent_header", "metadata", "content")
        header, parent, metadata, content = (_dump(value.get(name)) for name in names)
    except (ValueError, TypeError, RecursionError) as error:
        raise FrameError(f"A kernel message must be a JSON object: {error}") from error
    if header == b"{}":
        raise FrameError('A kernel message must have a "header".')
    return KernelMessage(_channel(value.get("channel") or "shell"), header, parent, metadata, content, buffers)


def _split_legacy(data: bytes) -> tuple[bytes, tuple[bytes, ...]]:
    if len(data) < 8:
        raise FrameError("A binary message starts with a count and the offset of its JSON; this one is shorter.")
    (count,) = struct.unpack_from("!I", data)
    if not 1 <= count <= 1 + MAX_BUFFERS or len(data) < 4 * (count + 1):
        raise FrameError(f"A binary message has its JSON and up to {MAX_BUFFERS} buffers, not {count} parts.")
    offsets = [*struct.unpack_from(f"!{count}I", data, 4), len(data)]
    if offsets[0] < 4 * (count + 1) or any(a > b for a, b in itertools.pairwise(offsets)):
        raise FrameError("The offsets of a binary message must rise and end within it.")
    pieces = [data[start:end] for start, end in itertools.pairwise(offsets)]
    return pieces[0], tuple(pieces[1:])


def _dump(part: Any) -> bytes:
    if part is None:
        return b"{}"
    if not isinstance(part, dict):
        raise TypeError("header, parent_header, metadata and content are objects")
    # ASCII: a lone surrogate, legal in JSON, has no UTF-8.
    return json.dumps(part, separators=(",", ":")).encode()


def _channel(name: Any, channels: Sequence[str] = CLIENT_CHANNELS) -> str:
    if name not in channels:
        raise FrameError(f"A client sends on shell, control or stdin, not on {str(name)[:40]!r}.")
    return str(name)
