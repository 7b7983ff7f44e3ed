"""Files in a sandbox: content of any size, checked from end to end, and everything about them."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable
from contextlib import aclosing
from pathlib import Path
from typing import IO, Any

from hypercell.aio.transport import Transport
from hypercell.aio.watch import AsyncWatch
from hypercell.chunks import MAX_CHUNK_BYTES, MEDIA_TYPE, ChunkReader, ChunkWriter
from hypercell.errors import ConnectionLostError, ContentBrokenError, GatewayRefusedError, refused
from hypercell.identifiers import in_path
from hypercell.values import FileInfo, User

# What is read of a local file, and sent, at a time.
PIECE_BYTES = 256 * 1024
# A stream may pause while the guest writes to its disk; this bounds one that has stopped.
STALL_TIMEOUT_S = 120.0
# Entries of a directory in one answer.
PAGE_ENTRIES = 5000
# Of all in one list: some hundred MB.
MAX_LISTED = 1_000_000

Content = str | bytes | IO[bytes] | Iterable[bytes] | AsyncIterable[bytes]


class AsyncFiles:
    """The files of one sandbox, as `sandbox.files`. Relative paths begin at the home directory of the kernel's user, as
    `~` does. user="root", for all methods: with the rights of root, whose home `~` is then."""

    def __init__(self, transport: Transport, sandbox_id: str) -> None:
        self._transport = transport
        self._path = f"/api/sandboxes/{in_path(sandbox_id, 'sandbox')}/files"

    async def read(self, path: str, *, offset: int = 0, length: int | None = None, user: User = "user") -> bytes:
        """A file's content, which is held in memory; `stream` and `download` hold none. offset: where it begins, from
        the end if below zero. length: at most so many bytes. Raises NotFoundError."""
        return b"".join([piece async for piece in self.stream(path, offset=offset, length=length, user=user)])

    async def read_text(self, path: str, *, encoding: str = "utf-8", user: User = "user") -> str:
        """A file's content as text. Raises NotFoundError, UnicodeDecodeError."""
        return (await self.read(path, user=user)).decode(encoding)

    async def stream(
        self, path: str, *, offset: int = 0, length: int | None = None, user: User = "user"
    ) -> AsyncGenerator[bytes, None]:
        """A file's content in pieces, from offset on (from the end if below zero), at most `length` bytes. All of it
        counts only when the last one has come: what was changed or cut off on its way raises ContentBrokenError then,
        or ConnectionLostError. Raises NotFoundError."""
        reader = ChunkReader()
        headers = {"Accept": MEDIA_TYPE}
        if offset or length is not None:
            headers["Range"] = f"bytes={offset}" if offset < 0 else f"bytes={offset}-"
            if length is not None and offset >= 0:
                headers["Range"] += str(offset + max(1, length) - 1)
        left = length
        try:
            async with self._transport.stream(
                "GET",
                f"{self._path}/content",
                query={"path": path, "user": user},
                headers=headers,
                timeout_s=STALL_TIMEOUT_S,
            ) as answer:
                if answer.headers.get("Content-Type", "") != MEDIA_TYPE:
                    raise ContentBrokenError("The gateway sent content without checksums.")
                async for data in answer.aiter_raw():
                    for piece in reader.feed(data):
                        wanted = bytes(piece if left is None else piece[:left])
                        left = None if left is None else left - len(wanted)
                        if wanted:
                            yield wanted
        except GatewayRefusedError as error:
            if error.code == "range_not_satisfiable":
                return  # nothing is there
            raise
        reader.check_done()

    async def download(self, path: str, local: str | os.PathLike[str], *, user: User = "user") -> int:
        """Copies a file of the sandbox to this machine; its size in bytes. `local` is replaced when all is there."""
        target = Path(local)
        part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
        size = 0
        try:
            with await asyncio.to_thread(part.open, "xb") as file:
                async with aclosing(self.stream(path, user=user)) as pieces:
                    async for piece in pieces:
                        await asyncio.to_thread(file.write, piece)
                        size += len(piece)
            await asyncio.to_thread(part.replace, target)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        return size

    async def write(
        self,
        path: str,
        content: Content,
        *,
        mode: str | None = None,
        parents: bool = True,
        append: bool = False,
        user: User = "user",
    ) -> int:
        """Writes a file whole or not at all; one that is there is replaced. The size of the content in bytes.

        content: text (as UTF-8), bytes, a binary file, or pieces of bytes. mode: octal, like "0755". parents: make
        missing directories. append: put it at the end of what is there. Raises DiskFullError, StateError.
        """
        failed: list[BaseException] = []

        async def body() -> AsyncIterator[bytes]:
            writer = ChunkWriter()
            try:
                async for piece in _pieces(content):
                    yield writer.chunk(piece)
            except Exception as error:
                failed.append(error)
                raise
            yield writer.end()

        try:
            async with self._transport.stream(
                "PUT",
                f"{self._path}/content",
                query={"path": path, "mode": mode, "parents": parents, "append": append, "user": user},
                content=body(),
                headers={"Content-Type": MEDIA_TYPE},
                timeout_s=STALL_TIMEOUT_S,
            ) as answer:
                written = json.loads(await answer.aread())
        except GatewayRefusedError as error:
            if error.code == "content_broken":
                raise ContentBrokenError(str(error)) from error
            raise
        except ConnectionLostError:
            if failed:
                raise failed[0] from None
            raise
        return int(written["size_bytes"])

    async def upload(
        self,
        local: str | os.PathLike[str],
        path: str,
        *,
        mode: str | None = None,
        parents: bool = True,
        user: User = "user",
    ) -> int:
        """Copies a file of this machine into the sandbox; its size in bytes."""
        with await asyncio.to_thread(Path(local).open, "rb") as file:
            return await self.write(path, file, mode=mode, parents=parents, user=user)

    async def list(self, path: str = ".", *, depth: int = 1, user: User = "user") -> list[FileInfo]:
        """What is in a directory, to that depth. Raises NotFoundError, and LimitError for more than 1,000,000 entries;
        `scan` has no limit."""
        found: list[FileInfo] = []
        async for entry in self.scan(path, depth=depth, user=user):
            if len(found) >= MAX_LISTED:
                raise _too_many(path)
            found.append(entry)
        return found

    async def scan(
        self, path: str = ".", *, depth: int = 1, page: int = PAGE_ENTRIES, user: User = "user"
    ) -> AsyncGenerator[FileInfo, None]:
        """What is in a directory, to that depth, by name; a directory stands before what is in it. page: how many
        entries are asked for at a time (up to 10,000). Raises NotFoundError."""
        query: dict[str, Any] = {"path": path, "depth": depth, "limit": page, "user": user}
        while True:
            listing = await self._transport.call("GET", self._path, query=query)
            for entry in listing["entries"]:
                yield FileInfo.parse(entry)
            if not listing["truncated"]:
                return
            if listing["next"] in (None, query.get("after")):
                raise _too_many(path)  # its agent is older than pages
            query["after"] = listing["next"]

    async def stat(self, path: str, *, follow: bool = True, user: User = "user") -> FileInfo:
        """One file, directory or link. follow: where a link leads instead of the link. Raises NotFoundError."""
        query = {"path": path, "follow": follow, "user": user}
        return FileInfo.parse(await self._transport.call("GET", f"{self._path}/stat", query=query))

    async def exists(self, path: str, *, user: User = "user") -> bool:
        """Whether there is something of this name that the user may know of."""
        try:
            await self.stat(path, follow=False, user=user)
        except GatewayRefusedError as error:
            if error.code in {"file_not_found", "not_a_directory", "permission_denied"}:
                return False
            raise
        return True

    async def mkdir(
        self,
        path: str,
        *,
        mode: str | None = None,
        parents: bool = True,
        exist_ok: bool = False,
        user: User = "user",
    ) -> FileInfo:
        """A new directory. mode: octal, like "0755". parents: make missing ones above it. exist_ok: a directory of this
        name is fine. Raises StateError if there is something of this name."""
        body: dict[str, Any] = {"path": path, "parents": parents, "exist_ok": exist_ok, "user": user}
        if mode is not None:
            body["mode"] = mode
        return FileInfo.parse(await self._transport.call("POST", f"{self._path}/mkdir", body=body))

    async def symlink(self, target: str, path: str, *, user: User = "user") -> FileInfo:
        """A link at `path` that leads to `target`, whether there is such a thing or not. Raises StateError if there is
        something at `path`."""
        body = {"target": target, "path": path, "user": user}
        return FileInfo.parse(await self._transport.call("POST", f"{self._path}/symlink", body=body))

    async def rename(self, old_path: str, new_path: str, *, user: User = "user") -> FileInfo:
        """Renames or moves; a file of the new name is replaced. Raises NotFoundError, StateError."""
        body = {"old_path": old_path, "new_path": new_path, "user": user}
        return FileInfo.parse(await self._transport.call("POST", f"{self._path}/rename", body=body))

    async def remove(self, path: str, *, recursive: bool = False, user: User = "user") -> None:
        """Removes a file, a link or a directory (recursive: with all in it). Raises NotFoundError, StateError."""
        query = {"path": path, "recursive": recursive, "user": user}
        await self._transport.call("DELETE", f"{self._path}/content", query=query)

    async def watch(self, path: str = ".", *, recursive: bool = False, user: User = "user") -> AsyncWatch:
        """A watch of a file or directory, recursive: and of all directories below it, which tells every change from now
        on. Raises NotFoundError, and LimitError where too much is watched."""
        query = {"path": path, "recursive": recursive, "user": user}
        websocket = await self._transport.connect(f"{self._path}/watch", query=query)
        return await AsyncWatch._begun(self._transport, websocket, path)


def _too_many(path: str) -> GatewayRefusedError:
    return refused(f"{path} has more entries than can be listed at once.", status=413, code="too_large")


async def _pieces(content: Content) -> AsyncIterator[memoryview]:
    """Content in pieces of at most MAX_CHUNK_BYTES, none of them empty."""
    if isinstance(content, str):
        content = content.encode()
    if isinstance(content, bytes | bytearray | memoryview):
        for piece in _cut(content, PIECE_BYTES):
            yield piece
    elif isinstance(content, AsyncIterable):
        async for part in content:
            for piece in _cut(part, MAX_CHUNK_BYTES):
                yield piece
    elif hasattr(content, "read"):
        while part := await asyncio.to_thread(content.read, PIECE_BYTES):
            for piece in _cut(part, MAX_CHUNK_BYTES):
                yield piece
    else:
        parts = iter(content)

        def following() -> bytes | None:
            return next(parts, None)

        # The iterator may block, or call the blocking API.
        while (found := await asyncio.to_thread(following)) is not None:
            for piece in _cut(found, MAX_CHUNK_BYTES):
                yield piece


def _cut(data: bytes | bytearray | memoryview, size: int) -> Iterable[memoryview]:
    view = memoryview(data)
    return (view[start : start + size] for start in range(0, len(view), size))
