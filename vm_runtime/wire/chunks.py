"""Content with a running checksum: how files travel on the wire, and over HTTP for clients that check. Pure.

    0                 4                 8
    +-----------------+-----------------+----------------+
    |     length      |     CRC-32      |    content     |   ... and at last a chunk of length 0
    +-----------------+-----------------+----------------+

Big-endian. The CRC-32 is that of all content up to the end of this chunk, so that one pass on each side checks every
chunk, their order and the whole; content that stops before the chunk of length 0 was cut off. CRC-32 because the
emulated guest does 58 MB/s of it, against 37 of BLAKE2b and 10 of SHA-256: it is there against broken software and
hardware, not against forgery. See docs/exec_and_files.md.
"""

from __future__ import annotations

import struct
import zlib

CHUNK_HEADER = struct.Struct("!II")

# The largest length in a header. Content is passed on as it comes, so this bounds no memory; it catches nonsense early.
MAX_CHUNK_BYTES = 1024 * 1024


class ChunkError(Exception):
    """The content is not what was sent: broken, cut off, or not made of chunks at all."""


class ChunkWriter:
    """Makes chunks. crc32, size_bytes: of all content so far."""

    def __init__(self) -> None:
        self.crc32 = 0
        self.size_bytes = 0

    def header(self, content: bytes | memoryview) -> bytes:
        """What goes before `content`, which has 1 to MAX_CHUNK_BYTES bytes."""
        self.crc32 = zlib.crc32(content, self.crc32)
        self.size_bytes += len(content)
        return CHUNK_HEADER.pack(len(content), self.crc32)

    def end(self) -> bytes:
        """What goes after all content."""
        return CHUNK_HEADER.pack(0, self.crc32)


class ChunkReader:
    """Takes chunks apart, holding no more than a header. crc32, size_bytes: of all content so far; done: it was all."""

    def __init__(self) -> None:
        self.crc32 = 0
        self.size_bytes = 0
        self.done = False
        self._header = b""
        self._left = 0
        self._expected = 0

    def feed(self, data: bytes | memoryview) -> list[memoryview]:
        """The content in `data`. It is checked at the end of its chunk: use none of it before `done`, or be ready to
        take it back. Raises ChunkError."""
        pieces: list[memoryview] = []
        view = memoryview(data)
        while view:
            if self.done:
                raise ChunkError("There is more after the end of the content.")
            if self._left == 0:
                missing = CHUNK_HEADER.size - len(self._header)
                self._header += bytes(view[:missing])
                view = view[missing:]
                if len(self._header) == CHUNK_HEADER.size:
                    self._begin()
                continue
            piece = view[: self._left]
            view = view[self._left :]
            self._left -= len(piece)
            self.crc32 = zlib.crc32(piece, self.crc32)
            self.size_bytes += len(piece)
            pieces.append(piece)
            if self._left == 0:
                self._check()
        return pieces

    def _begin(self) -> None:
        self._left, self._expected = CHUNK_HEADER.unpack(self._header)
        self._header = b""
        if self._left > MAX_CHUNK_BYTES:
            raise ChunkError(f"A chunk of {self._left} bytes; it has at most {MAX_CHUNK_BYTES}.")
        if self._left == 0:
            self._check()
            self.done = True

    def _check(self) -> None:
        if self.crc32 != self._expected:
            raise ChunkError(f"The content was changed on its way (before byte {self.size_bytes}).")

    def check_done(self) -> None:
        """To be called when no more comes. Raises ChunkError for content that was cut off."""
        if not self.done:
            raise ChunkError(f"The content was cut off after {self.size_bytes} bytes.")
