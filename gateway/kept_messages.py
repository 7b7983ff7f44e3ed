"""The file in which a gateway that stops leaves to the next one what a kernel's absent client has not been sent.

    magic "hypercell-kept-1\\n", session id, "\\n", then per message: uint64le size, the message in the v1 form

It is read once and removed. Pure but for the file.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

from gateway.errors import FrameError
from gateway.frames import CHANNELS, KernelMessage, decode_v1, encode_v1

MAGIC = b"hypercell-kept-1\n"
_SIZE = struct.Struct("<Q")


def save(path: Path, session_id: str, messages: Iterable[KernelMessage]) -> None:
    """Replaces the file. Errors: OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".new")
    with temporary.open("wb") as file:
        file.write(MAGIC + session_id.encode() + b"\n")
        for message in messages:
            data = encode_v1(message)
            file.write(_SIZE.pack(len(data)) + data)
    temporary.replace(path)


def take(path: Path) -> tuple[str, list[KernelMessage]] | None:
    """The session and its messages, of a file that is removed. None where there is none. Errors: FrameError (it is none
    of this format), OSError."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    path.unlink()
    session_id, separator, rest = content.removeprefix(MAGIC).partition(b"\n")
    if not content.startswith(MAGIC) or not separator:
        raise FrameError(f"{path} holds no kept messages of this version.")
    messages = []
    while rest:
        size = _SIZE.unpack_from(rest)[0] if len(rest) >= _SIZE.size else len(rest)
        data, rest = rest[_SIZE.size : _SIZE.size + size], rest[_SIZE.size + size :]
        messages.append(decode_v1(data, channels=CHANNELS))
    return session_id.decode(), messages
