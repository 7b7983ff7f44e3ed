"""Content with a running checksum, as files travel over HTTP (docs/exec_and_files.md, "Checked from end to end"). Pure.

A chunk is its length and the CRC-32 of all content up to its end (both uint32, big-endian), then the content; a chunk
of length 0 ends it.
"""

from __future__ import annotations

import struct
import zlib

from hypercell.errors import ContentBrokenError

MEDIA_TYPE = "application/vnd.hypercell.chunks"
HEADER = struct.Struct("!II")
MAX_CHUNK_BYTES = 1024 * 1024


class ChunkWriter:
    """Makes chunks. size_bytes: of all content so far."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self._crc32 = 0

    def chunk(self, content: bytes | memoryview) -> bytes:
        """One chunk of 1 to MAX_CHUNK_BYTES bytes."""
        self._crc32 = zlib.crc32(content, self._crc32)
        self.size_bytes += len(content)
        return HEADER.pack(len(content), self._crc32) + content

    def end(self) -> bytes:
        """What goes after all content."""
        return HEADER.pack(0, self._crc32)


class ChunkReader:
    """Takes chunks apart; holds no more than one header. done: it was all, and right."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self.done = False
        self._crc32 = 0
        self._expected = 0
        self._header = b""
        self._left = 0

    def feed(self, data: bytes) -> list[memoryview]:
        """The content in `data`, which counts only once `done`. Raises ContentBrokenError."""
        pieces = []
        view = memoryview(data)
        while view:
            if self.done:
                raise ContentBrokenError("There is more after the end of the content.")
            if self._left == 0:
                missing = HEADER.size - len(self._header)
                self._header += bytes(view[:missing])
                view = view[missing:]
                if len(self._header) == HEADER.size:
                    self._begin()
                continue
            piece, view = view[: self._left], view[self._left :]
            self._left -= len(piece)
            self._crc32 = zlib.crc32(piece, self._crc32)
            self.size_bytes += len(piece)
            pieces.append(piece)
            if self._left == 0:
                self._check()
        return pieces

    def _begin(self) -> None:
        self._left, self._expected = HEADER.unpack(self._header)
        self._header = b""
        if self._left > MAX_CHUNK_BYTES:
            raise ContentBrokenError(f"A chunk says it has {self._left} bytes; at most {MAX_CHUNK_BYTES} are sent.")
        if self._left == 0:
            self._check()
            self.done = True

    def _check(self) -> None:
        if self._crc32 != self._expected:
            raise ContentBrokenError(f"The content was changed on its way, before byte {self.size_bytes}.")

    def check_done(self) -> None:
        """To be called when no more comes. Raises ContentBrokenError for content that was cut off."""
        if not self.done:
            raise ContentBrokenError(f"The content was cut off after {self.size_bytes} bytes.")
