"""What a guest or VMM has printed, for people's eyes: the end of it, without what could harm a terminal.

Knows no VMM.
"""

from __future__ import annotations

import asyncio
import re
import signal
from collections import deque

# The end of a console says why a guest died; a panic with its back trace has about 4 KiB.
CONSOLE_TAIL_BYTES = 16384

# Guest text shown to people: one screen is enough, and a hostile guest chooses what is in it.
MAX_QUOTE_CHARACTERS = 300

# C0 controls but line feed and tab, DEL, and C1: terminals act on them.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# Some complaints of VMMs say nothing about why they ended.
_HARMLESS = re.compile(r"warning:", re.IGNORECASE)


class Tail:
    """The last bytes of a stream that may never end."""

    def __init__(self) -> None:
        self._chunks: deque[bytes] = deque()
        self._size = 0
        self._more = asyncio.Event()

    def add(self, data: bytes) -> None:
        self._chunks.append(data[-CONSOLE_TAIL_BYTES:])
        self._size += len(self._chunks[-1])
        while self._size - len(self._chunks[0]) >= CONSOLE_TAIL_BYTES:
            self._size -= len(self._chunks.popleft())
        self._more.set()

    async def wait_more(self, end: asyncio.Task[None]) -> None:
        """Wait until something is added, or `end` is done."""
        self._more.clear()
        more = asyncio.create_task(self._more.wait())
        try:
            await asyncio.wait([more, end], return_when=asyncio.FIRST_COMPLETED)
        finally:
            more.cancel()

    def data(self) -> bytes:
        return b"".join(self._chunks)[-CONSOLE_TAIL_BYTES:]


def printable(data: bytes) -> str:
    """Text of a guest or VMM for people's eyes: undecodable bytes and control characters do no harm."""
    return _CONTROL.sub("", data.decode(errors="replace"))


def signal_name(number: int) -> str:
    """SIGKILL for 9."""
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal has no name of its own
        return str(number)


def complaint(stderr: str) -> str:
    """The end of a sentence: the last line that a program printed, if there is one."""
    lines = [line for line in stderr.splitlines() if line.strip() and not _HARMLESS.search(line)]
    return f": {quoted(lines[-1])}" if lines else "."


def quoted(text: str) -> str:
    """One line of guest text, within bounds."""
    text = "".join(character for character in text.strip() if character.isprintable())
    return text if len(text) <= MAX_QUOTE_CHARACTERS else text[:MAX_QUOTE_CHARACTERS] + "..."
