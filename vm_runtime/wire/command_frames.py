"""The frames in which a command's output travels on its stream, and how the stream begins. Pure.

Guest to host, frames of

    0        1                          5
    +--------+--------------------------+-----------+
    |  type  |          length          |  payload  |
    +--------+--------------------------+-----------+

Big-endian; STDOUT and STDERR carry bytes, all others a JSON object. Host to guest: a length of four bytes and the
command as JSON (not in OPEN's parameters, where a script or a large environment would not fit), then standard input as
it is, whose end is the stream's.
"""

from __future__ import annotations

import json
import struct
from enum import IntEnum
from typing import Any

FRAME_HEADER = struct.Struct("!BI")
REQUEST_HEADER = struct.Struct("!I")

# One read of a pipe, whose capacity this is.
MAX_FRAME_BYTES = 64 * 1024

# A command with arguments and environment. Linux takes 128 KiB per string.
MAX_REQUEST_BYTES = 256 * 1024


class CommandFrame(IntEnum):
    """What a frame holds. STARTED: {command_id, pid}; SKIPPED: {bytes} that are kept no more; EXITED: {exit_status,
    signal, timed_out}, of which exit_status or signal is null. Nothing follows EXITED."""

    STDOUT = 1
    STDERR = 2
    STARTED = 3
    SKIPPED = 4
    EXITED = 5


class CommandFrameError(Exception):
    """The guest sent what is no frame."""


def encode_frame(kind: CommandFrame, payload: bytes) -> bytes:
    return FRAME_HEADER.pack(kind, len(payload)) + payload


def encode_json_frame(kind: CommandFrame, value: dict[str, Any]) -> bytes:
    return encode_frame(kind, json.dumps(value).encode())


class CommandFrameReader:
    """Takes frames apart; holds less than one of them."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[tuple[CommandFrame, bytes]]:
        """The whole frames that there are now. Raises CommandFrameError."""
        buffer = self._buffer
        buffer += data
        frames: list[tuple[CommandFrame, bytes]] = []
        offset = 0
        while len(buffer) - offset >= FRAME_HEADER.size:
            kind, length = FRAME_HEADER.unpack_from(buffer, offset)
            if length > MAX_FRAME_BYTES or kind not in CommandFrame._value2member_map_:
                raise CommandFrameError(f"A frame of type {kind} with {length} bytes")
            end = offset + FRAME_HEADER.size + length
            if len(buffer) < end:
                break
            frames.append((CommandFrame(kind), bytes(memoryview(buffer)[offset + FRAME_HEADER.size : end])))
            offset = end
        del buffer[:offset]
        return frames
