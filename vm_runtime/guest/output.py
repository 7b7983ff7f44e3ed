"""The output of one command: the newest part is kept, and any number of readers follow it. Knows no processes.

Readers have a place of their own in it. One that is too slow finds out how much it has missed.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

# What is kept per command. Nobody reads logs backwards over the wire; and 96 commands (the most there are) take 48 MiB.
LOG_BYTES_MAX = 512 * 1024

# A command whose reader must miss nothing waits when it is this far ahead. What still comes after that (one read, and
# at the end what the pipes hold) fits into the rest.
AHEAD_BYTES_MAX = LOG_BYTES_MAX // 4

# Small writes of one kind are joined up to this, so that they cost neither a frame nor an object each.
PIECE_BYTES = 16 * 1024

# What Python takes for a piece beside its bytes, so that many tiny ones are bounded too.
PIECE_OVERHEAD_BYTES = 160


@dataclass(slots=True)
class _Piece:
    kind: int
    position: int  # in all output, of both kinds
    data: bytearray


@dataclass(slots=True)
class Cursor:
    """A reader's place. A new one begins at the oldest output that there ever was."""

    number: int = 0
    offset: int = 0
    position: int = 0


@dataclass(frozen=True, slots=True)
class Output:
    """Read at a cursor: `skipped_bytes` that are kept no more, then `data` of a kind."""

    skipped_bytes: int
    kind: int
    data: bytes


class OutputLog:
    """total_bytes: all output that there ever was."""

    def __init__(self) -> None:
        self.total_bytes = 0
        self._pieces: deque[_Piece] = deque()
        self._first = 0  # the number of the oldest piece kept
        self._charged_bytes = 0

    def append(self, kind: int, data: bytes) -> None:
        last = self._pieces[-1] if self._pieces else None
        if last is not None and last.kind == kind and len(last.data) + len(data) <= PIECE_BYTES:
            last.data += data
        else:
            self._pieces.append(_Piece(kind, self.total_bytes, bytearray(data)))
            self._charged_bytes += PIECE_OVERHEAD_BYTES
        self._charged_bytes += len(data)
        self.total_bytes += len(data)
        while self._charged_bytes > LOG_BYTES_MAX and len(self._pieces) > 1:
            gone = self._pieces.popleft()
            self._first += 1
            self._charged_bytes -= len(gone.data) + PIECE_OVERHEAD_BYTES

    def read(self, cursor: Cursor) -> Output | None:
        """The next output at the cursor, which moves on; None where there is none yet."""
        skipped = 0
        if cursor.number < self._first:
            oldest = self._pieces[0]
            skipped = oldest.position - cursor.position
            cursor.number, cursor.offset, cursor.position = self._first, 0, oldest.position
        while (index := cursor.number - self._first) < len(self._pieces):
            piece = self._pieces[index]
            data = bytes(memoryview(piece.data)[cursor.offset :])
            if data:
                cursor.offset += len(data)
                cursor.position += len(data)
                return Output(skipped, piece.kind, data)
            if index == len(self._pieces) - 1:
                break  # more may be added to this one
            cursor.number += 1
            cursor.offset = 0
        return None

    def is_far_ahead(self, cursor: Cursor) -> bool:
        """Whether a command whose reader is at the cursor should wait for it."""
        pieces = self._first + len(self._pieces) - cursor.number
        return self.total_bytes - cursor.position + pieces * PIECE_OVERHEAD_BYTES > AHEAD_BYTES_MAX
