"""The frames of the wire: a 12-byte header and a payload. Knows nothing of sessions or streams.

    0        1        2                 4                                   8                                  12
    +--------+--------+-----------------+-----------------------------------+-----------------------------------+
    |  type  | flags  |    reserved     |             stream id             |          payload length           |
    +--------+--------+-----------------+-----------------------------------+-----------------------------------+

Big-endian. Flags and reserved are zero in version 1. The whole format is described in docs/wire.md.
"""

from __future__ import annotations

import struct
from enum import IntEnum

from vm_runtime.wire.errors import RemoteProtocolError

HEADER = struct.Struct("!BBHII")
HEADER_BYTES = HEADER.size

# A frame is checked against this before anything is allocated for it. Four times HTTP/2's default of 16 KiB:
# fewer headers for an emulated guest, and still only 2 ms of a 31 MB/s wire.
MAX_PAYLOAD = 64 * 1024

# Stream ids are 31 bits, as in HTTP/2, so that they stay positive everywhere.
MAX_STREAM_ID = 2**31 - 1


class FrameType(IntEnum):
    HELLO = 1
    WELCOME = 2
    OPEN = 3
    ACCEPT = 4
    REJECT = 5
    DATA = 6
    WINDOW = 7
    END = 8
    RESET = 9
    PING = 10
    PONG = 11
    GOODBYE = 12


# Frames about the session as a whole carry stream id 0, all others a stream's.
SESSION_FRAMES = frozenset(
    {FrameType.HELLO, FrameType.WELCOME, FrameType.PING, FrameType.PONG, FrameType.GOODBYE},
)

# Payload sizes (lowest, highest) per type. JSON in a frame is at most 32 KiB: room for a large environment of a
# process, while a full set of pending opens stays below 2 MiB. DATA is never empty: it would cost a peer nothing.
MAX_JSON_BYTES = 32 * 1024
PING_BYTES = 8
WINDOW_BYTES = 4
PAYLOAD_SIZES: dict[int, tuple[int, int]] = {
    FrameType.HELLO: (2, MAX_JSON_BYTES),
    FrameType.WELCOME: (2, MAX_JSON_BYTES),
    FrameType.OPEN: (2, MAX_JSON_BYTES),
    FrameType.ACCEPT: (2, MAX_JSON_BYTES),
    FrameType.REJECT: (2, MAX_JSON_BYTES),
    FrameType.DATA: (1, MAX_PAYLOAD),
    FrameType.WINDOW: (WINDOW_BYTES, WINDOW_BYTES),
    FrameType.END: (0, 0),
    FrameType.RESET: (2, MAX_JSON_BYTES),
    FrameType.PING: (PING_BYTES, PING_BYTES),
    FrameType.PONG: (PING_BYTES, PING_BYTES),
    FrameType.GOODBYE: (2, MAX_JSON_BYTES),
}


def encode_frame(frame_type: FrameType, stream_id: int, payload: bytes = b"") -> bytes:
    """One whole frame. The caller has checked the payload's size."""
    return HEADER.pack(frame_type, 0, 0, stream_id, len(payload)) + payload


def check_header(frame_type: int, flags: int, reserved: int, stream_id: int, length: int) -> None:
    """Raise RemoteProtocolError unless the header of a received frame is one that version 1 knows."""
    sizes = PAYLOAD_SIZES.get(frame_type)
    if sizes is None:
        raise RemoteProtocolError(f"Unknown frame type {frame_type}")
    name = FrameType(frame_type).name
    if flags or reserved:
        raise RemoteProtocolError(f"{name} frame with unknown flags {flags:#x}, {reserved:#x}")
    if not sizes[0] <= length <= sizes[1]:
        raise RemoteProtocolError(f"{name} frame of {length} bytes; it has {sizes[0]} to {sizes[1]}")
    if (frame_type in SESSION_FRAMES) != (stream_id == 0) or stream_id > MAX_STREAM_ID:
        raise RemoteProtocolError(f"{name} frame on stream {stream_id}")
