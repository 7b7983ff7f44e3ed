"""Reads and writes one file in chunks (vm_runtime/wire/chunks.py). It blocks, and belongs into the user's threads."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from pathlib import Path

from vm_runtime.wire.chunks import ChunkReader, ChunkWriter

# Per read of a file: as much as a stream's window takes, so that an emulated guest spends its time on bytes.
READ_BYTES = 256 * 1024

# Left of a target's name in that of the temporary file beside it: with the rest below Linux's 255 bytes.
NAME_BYTES_KEPT = 200

# What a new file's mode is taken from, as if the user's own programs had made it.
USUAL_MODE = 0o644


class FileReader:
    """A file open for reading a part of it. size_bytes: of the whole. length: of the part, None where only reading
    tells (files of /proc say that they are empty)."""

    def __init__(self, path: str, *, offset: int, length: int | None) -> None:
        """offset: below zero it counts from the end. Raises OSError, also for what is no regular file."""
        # Non-blocking, so that a pipe without a writer is refused instead of waited for.
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        try:
            status = os.fstat(self._fd)
            _check_regular(status)
            self.status = status
            self.size_bytes = status.st_size
            if offset < 0:
                offset = max(0, self.size_bytes + offset)
            os.lseek(self._fd, offset, os.SEEK_SET)
        except BaseException:
            self.close()
            raise
        self.offset = offset
        self.length: int | None
        if self.size_bytes or offset:
            available = max(0, self.size_bytes - offset)
            self.length = available if length is None else min(length, available)
        else:
            self.length = None
        self._left = self.length if self.length is not None else length
        self._chunks = ChunkWriter()
        self._done = False

    def next(self) -> bytes:
        """The next chunk with its header; b"" when the end has been given. Raises OSError."""
        if self._done:
            return b""
        data = os.read(self._fd, READ_BYTES if self._left is None else min(READ_BYTES, self._left))
        if not data:
            self._done = True
            if self.length is not None and self._left:
                raise OSError(errno.ESTALE, "It became shorter while it was read")
            return self._chunks.end()
        if self._left is not None:
            self._left -= len(data)
        return self._chunks.header(data) + data

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class FileWriter:
    """A file being written beside its target, which it takes the place of when it is whole, or is appended to.

    Links to the target stay links: what they lead to is replaced. mode: None keeps the target's, as the owner is kept
    where the user may give files away. Use `feed` until `commit`; `close` in every case.
    """

    def __init__(self, path: str, *, mode: int | None, parents: bool, append: bool = False) -> None:
        """Raises OSError, also where the target exists and is no regular file."""
        target = Path(os.path.realpath(path))
        self._fd = -1
        if path.endswith("/"):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if parents:
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
            except FileExistsError as error:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path) from error
        self._replaced: os.stat_result | None = None
        try:
            self._replaced = status = target.stat()
        except FileNotFoundError:
            pass
        else:
            _check_regular(status)
            # Replacing asks for rights on the directory only; a file that the user may not write stays his no more.
            if not os.access(target, os.W_OK, effective_ids=True):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
            mode = stat.S_IMODE(status.st_mode) if mode is None else mode
        self._target = target
        self._append = append
        self._mode = USUAL_MODE if mode is None else mode
        self._chunks = ChunkReader()
        kept = os.fsdecode(os.fsencode(target.name)[:NAME_BYTES_KEPT])
        self._temporary = target.with_name(f".{kept}.{secrets.token_hex(8)}.part")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(self._temporary, flags, 0o600)

    def feed(self, data: bytes) -> bool:
        """Write what is in `data`; whether that was all. Raises OSError and ChunkError."""
        for piece in self._chunks.feed(data):
            _write_all(self._fd, piece)
        return self._chunks.done

    def commit(self) -> tuple[int, int]:
        """Put it in the target's place; its size in bytes and its CRC-32. Raises OSError, ChunkError if cut off."""
        self._chunks.check_done()
        if self._replaced is not None:
            with contextlib.suppress(PermissionError):
                os.fchown(self._fd, self._replaced.st_uid, self._replaced.st_gid)
        os.fchmod(self._fd, self._mode)
        fd, self._fd = self._fd, -1
        try:
            os.close(fd)  # some file systems report only now that there was no room
            if self._append and self._replaced is not None:
                self._append_it()
                self._unlink()
            else:
                self._temporary.replace(self._target)
        except BaseException:
            self._unlink()
            raise
        return self._chunks.size_bytes, self._chunks.crc32

    def _append_it(self) -> None:
        with self._temporary.open("rb") as source, self._target.open("ab", buffering=0) as target:
            size = os.fstat(target.fileno()).st_size
            try:
                while data := source.read(READ_BYTES):
                    _write_all(target.fileno(), memoryview(data))
            except OSError:
                target.truncate(size)  # all of it or nothing
                raise

    def close(self) -> None:
        """Leave nothing of it, unless it was committed; twice is harmless."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            self._unlink()
            os.close(fd)

    def _unlink(self) -> None:
        with contextlib.suppress(OSError):
            self._temporary.unlink()


def _write_all(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _check_regular(status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.ENXIO, "It is a device, pipe or socket")
