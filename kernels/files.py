"""Files in a sandbox: content in checked chunks, and all else about them. The host's end of vm_runtime/guest/files.py.

Paths are text that is passed on: nothing here touches a file of the host.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from types import TracebackType
from typing import Any, Literal, Self

from kernels.deadlines import Deadlines
from kernels.errors import MachineFailedError
from kernels.guest_values import Count, GuestValue, Mode, Moment, Text, asking, guest_errors, parse_json, read_json
from kernels.session import GuestSession
from vm_runtime.wire.chunks import ChunkReader, ChunkWriter
from vm_runtime.wire.stream import Stream

FileKind = Literal["file", "directory", "link", "pipe", "socket", "device"]
ChangeEvent = Literal["created", "modified", "attributes", "deleted", "renamed", "overflow"]

# As much as a stream's window takes.
READ_BYTES = 256 * 1024
# Plain content becomes chunks of at most this: small enough to be checked and written while the next one travels.
WRITE_BYTES = 256 * 1024
# One line of a watch: a path or two.
MAX_CHANGE_BYTES = 64 * 1024


class FileInfo(GuestValue):
    """mode: permission bits.
    modified_at: seconds since 1970.
    target: where a link leads, else None.
    """

    name: Text
    path: Text
    kind: FileKind
    size_bytes: Count
    mode: Mode
    uid: Count
    gid: Count
    modified_at: Moment
    target: Text | None = None


class Listing(GuestValue):
    """path: absolute.
    truncated: there is more than was asked for, or than one answer holds.
    next: where it continues, for another listing's `after` (None: the guest's agent is too old to report it).
    """

    path: Text
    entries: list[FileInfo]
    truncated: bool
    next: Text | None = None


class Written(GuestValue):
    size_bytes: Count
    crc32: Count


class FileChange(GuestValue):
    """old_path: what a renamed one was called. `overflow`: changes were missed; look again."""

    event: ChangeEvent
    path: Text
    old_path: Text | None = None


class FilePart(GuestValue):
    """length: of the part; None where only reading shows it. size_bytes: of the whole."""

    size_bytes: Count
    offset: Count
    length: Count | None = None
    mode: Mode
    modified_at: Moment


class _Transfer:
    """A stream that is given up on the way out, unless it has come to its end."""

    def __init__(self, stream: Stream, deadlines: Deadlines) -> None:
        self._stream = stream
        self._deadlines = deadlines

    def close(self) -> None:
        """Twice is harmless."""
        self._stream.end()
        self._stream.reset("cancelled", "The client has gone")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class FileDownload(_Transfer):
    """A part of a file, and which."""

    def __init__(self, stream: Stream, deadlines: Deadlines) -> None:
        super().__init__(stream, deadlines)
        self.part = FilePart.parse(stream.result)

    async def chunks(self) -> AsyncIterator[bytes]:
        """Its chunks as the guest made them, for a client that checks them itself."""
        while True:
            async with asking(self._deadlines, "files.read"):
                data = await self._stream.read(READ_BYTES)
            if not data:
                return
            yield data

    async def content(self) -> AsyncIterator[memoryview]:
        """Its bytes. Those before an error may be broken or too few. Errors: GuestRefusedError, MachineFailedError."""
        reader = ChunkReader()
        async for data in self.chunks():
            with guest_errors():
                pieces = reader.feed(data)
            for piece in pieces:
                yield piece
        with guest_errors():
            reader.check_done()


class FileUpload(_Transfer):
    """A file being written: `write` (or `write_chunks`), then `commit`. Given up before, it leaves nothing behind.

    Errors: GuestRefusedError, MachineFailedError; also in the middle, when the guest's disk is full.
    """

    def __init__(self, stream: Stream, deadlines: Deadlines) -> None:
        super().__init__(stream, deadlines)
        self._chunks = ChunkWriter()
        self._plain = True

    @property
    def crc32(self) -> int:
        """Of what `write` was given so far."""
        return self._chunks.crc32

    async def write(self, content: bytes | memoryview) -> None:
        view = memoryview(content)
        for begin in range(0, len(view), WRITE_BYTES):
            piece = view[begin : begin + WRITE_BYTES]
            async with asking(self._deadlines, "files.write"):
                await self._stream.write(self._chunks.header(piece))
                await self._stream.write(piece)

    async def write_chunks(self, data: bytes) -> None:
        """Chunks that the client has made; the guest checks them."""
        self._plain = False
        async with asking(self._deadlines, "files.write"):
            await self._stream.write(data)

    async def commit(self) -> Written:
        async with asking(self._deadlines, "files.write"):
            if self._plain:
                await self._stream.write(self._chunks.end())
            self._stream.end()
            written = Written.parse(await read_json(self._stream))
        if self._plain and written != Written(size_bytes=self._chunks.size_bytes, crc32=self._chunks.crc32):
            raise MachineFailedError("The guest wrote other content than was sent.")
        return written


class FileWatch(_Transfer):
    """Changes below a path, until it is removed."""

    async def changes(self) -> AsyncIterator[FileChange]:
        """Errors: GuestRefusedError, MachineFailedError."""
        pending = b""
        with guest_errors():
            while data := await self._stream.read():
                *lines, pending = (pending + data).split(b"\n")
                if len(pending) > MAX_CHANGE_BYTES:
                    raise MachineFailedError(f"The guest told a change of more than {MAX_CHANGE_BYTES} bytes.")
                for line in lines:
                    yield FileChange.parse(parse_json(line))


class SandboxFiles:
    """The files of one sandbox. Relative paths begin at the kernel user's home. All methods raise GuestRefusedError
    (`code` says what the guest would not do) and MachineFailedError."""

    def __init__(self, session: GuestSession, *, as_root: bool = False) -> None:
        self._session = session
        self._open_stream = session.open_stream
        self._deadlines = session.deadlines
        self._prefix = "root." if as_root else ""

    def as_user(self, user: Literal["user", "root"]) -> SandboxFiles:
        """The same with the rights of that user, in whose home relative paths begin."""
        return SandboxFiles(self._session, as_root=user == "root")

    async def read(self, path: str, *, offset: int = 0, length: int | None = None) -> FileDownload:
        """offset: below zero it counts from the end. length: at most so much, None for all."""
        stream = await self._stream("files.read", path=path, offset=offset, length=length)
        try:
            return FileDownload(stream, self._deadlines)
        except BaseException:
            stream.reset()
            raise

    async def write(
        self, path: str, *, mode: int | None = None, parents: bool = True, append: bool = False
    ) -> FileUpload:
        """mode: None keeps that of the file that is replaced (0644 where there is none). append: to it, instead."""
        kind = "files.append" if append else "files.write"
        return FileUpload(await self._stream(kind, path=path, mode=mode, parents=parents), self._deadlines)

    async def list(self, path: str, *, depth: int = 1, limit: int | None = None, after: str | None = None) -> Listing:
        """At most `limit` entries, from `Listing.next` of an earlier one on."""
        which = {"path": path, "depth": depth, "limit": limit, "after": after}
        async with asking(self._deadlines, "files.list"), await self._stream("files.list", **which) as stream:
            return Listing.parse(await read_json(stream))

    async def stat(self, path: str, *, follow: bool = True) -> FileInfo:
        return FileInfo.parse(await self._call("files.stat", path=path, follow=follow))

    async def remove(self, path: str, *, recursive: bool = False) -> None:
        await self._call("files.remove", path=path, recursive=recursive)

    async def rename(self, old_path: str, new_path: str) -> FileInfo:
        """Replaces an existing file, as rename(2) does."""
        return FileInfo.parse(await self._call("files.rename", old_path=old_path, new_path=new_path))

    async def mkdir(
        self, path: str, *, mode: int | None = None, parents: bool = True, exist_ok: bool = False
    ) -> FileInfo:
        """parents: make those that are missing. exist_ok: an existing directory is no error."""
        return FileInfo.parse(await self._call("files.mkdir", path=path, mode=mode, parents=parents, exist_ok=exist_ok))

    async def symlink(self, path: str, target: str) -> FileInfo:
        """A link that leads to `target`, whether there is such a thing or not."""
        return FileInfo.parse(await self._call("files.symlink", path=path, target=target))

    async def watch(self, path: str, *, recursive: bool = False) -> FileWatch:
        return FileWatch(await self._stream("files.watch", path=path, recursive=recursive), self._deadlines)

    async def _stream(self, kind: str, **params: Any) -> Stream:
        given = {name: value for name, value in params.items() if value is not None}
        with guest_errors():
            return await self._open_stream(self._prefix + kind, given)

    async def _call(self, kind: str, **params: Any) -> Mapping[str, Any]:
        async with await self._stream(kind, **params) as stream:
            return stream.result
