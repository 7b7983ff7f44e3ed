"""Cuts a `stream` message that is too large for its receiver into several that are not.

jupyter_server's gateway client closes a connection that brings more than 10 MiB in one message (tornado's default), so
larger prints would be lost there. Pure. The text is cut as the JSON string it is, without decoding it: 50 MB of output
are never held twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from gateway.frames import KernelMessage

# Messages up to this size pass whole: 10 MiB minus room for header, parent and metadata in the old form.
MAX_STREAM_BYTES = 9 * 1024 * 1024
# The size of the pieces: small enough that a slow client is never sent more than about this beyond its write buffer.
PIECE_BYTES = 1024 * 1024
# {"name": "stdout", "text": "..."} in either order, with any spacing, is all that the specification allows for.
_HEAD = re.compile(rb'\s*\{\s*(?:"name"\s*:\s*("[a-z]{1,16}")\s*,\s*)?"text"\s*:\s*"')
_TAIL = re.compile(rb'"\s*(?:,\s*"name"\s*:\s*("[a-z]{1,16}")\s*)?\}\s*\Z')
# Longest head or tail that is looked at.
_EDGE_BYTES = 256
# A character begins within so many bytes: an escaped surrogate pair has twelve. Text without one is no JSON string; it
# is cut anywhere, since looking for a place would take as long as the kernel that sent it likes.
_LONGEST_CHARACTER = 16


def split_stream(message: KernelMessage) -> Iterator[KernelMessage]:
    """The message itself, or pieces of it when it is a `stream` beyond `MAX_STREAM_BYTES`.

    All pieces carry the header of the whole. A message that is no such stream, or not written as one, passes as it is.
    """
    is_stream = b'"stream"' in bytes(message.header[:4096]) and not message.buffers
    if len(message.content) <= MAX_STREAM_BYTES or not is_stream:
        yield message
        return
    content = memoryview(message.content)
    head = _HEAD.match(bytes(content[:_EDGE_BYTES]))
    edge = max(0, len(content) - _EDGE_BYTES)
    tail = _TAIL.search(bytes(content[edge:]))
    if head is None or tail is None or bool(head[1]) == bool(tail[1]):
        yield message
        return
    name = head[1] or tail[1]
    end = edge + tail.start()
    start = head.end()
    while start < end:
        stop = _cut(content, start, min(start + PIECE_BYTES, end), end)
        piece = b"".join([b'{"name": ', name, b', "text": "', content[start:stop], b'"}'])
        yield KernelMessage(message.channel, message.header, message.parent, message.metadata, piece)
        start = stop


def _cut(text: memoryview, start: int, stop: int, end: int) -> int:
    """The last place at or before `stop` where the JSON string `text[start:end]` may be cut; beyond `start`."""
    if stop >= end:
        return end
    for position in range(stop, max(start, stop - _LONGEST_CHARACTER), -1):
        if _is_boundary(text, start, position):
            return position
    return stop


def _is_boundary(text: memoryview, start: int, position: int) -> bool:
    """Whether a character, however it is written, starts at `position`."""
    if text[position] & 0xC0 == 0x80 or _is_escaped(text, start, position):
        return False
    # Inside \uXXXX, whose backslash lies two to five bytes back?
    if any(_is_unicode_escape(text, start, position - back) for back in range(2, 6)):
        return False
    # Between the two halves of an escaped surrogate pair?
    return not (_is_surrogate(text, start, position - 6, _HIGH) and _is_surrogate(text, start, position, _LOW))


_HIGH = (b"d8", b"d9", b"da", b"db")
_LOW = (b"dc", b"dd", b"de", b"df")


def _is_surrogate(text: memoryview, start: int, position: int, which: tuple[bytes, ...]) -> bool:
    return _is_unicode_escape(text, start, position) and bytes(text[position + 2 : position + 4]).lower() in which


def _is_unicode_escape(text: memoryview, start: int, position: int) -> bool:
    if position < start or text[position] != 0x5C or text[position + 1] != 0x75:
        return False
    return not _is_escaped(text, start, position)


def _is_escaped(text: memoryview, start: int, position: int) -> bool:
    """Whether an odd number of backslashes stands before `position`."""
    if position <= start or text[position - 1] != 0x5C:
        return False
    before = bytes(text[start:position])
    return (len(before) - len(before.rstrip(b"\\"))) % 2 == 1
