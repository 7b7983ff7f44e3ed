"""Serves the host's streams about files (docs/exec_and_files.md), with the rights of the kernel's user or of root.

Paths are the guest's own affair: relative ones begin at the home directory, as `~` does; links lead where they lead.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import shutil
import stat
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from vm_runtime.guest.listing import ENTRIES_MAX, entries_of, status_of
from vm_runtime.guest.params import from_home, param, path_text, whole_number
from vm_runtime.guest.transfer import FileReader, FileWriter
from vm_runtime.guest.user_threads import UserThreads
from vm_runtime.guest.watch import Watch
from vm_runtime.wire.chunks import ChunkError
from vm_runtime.wire.errors import OpenRejectedError
from vm_runtime.wire.stream import Incoming, Stream

# Larger than any disk; keeps the sums below 64 bits.
OFFSET_MAX = 2**62

# Deeper trees are listed level by level.
DEPTH_MAX = 32

# The most that is taken from a stream at once; its window is as large.
FEED_BYTES = 256 * 1024

_CODES = {
    errno.ENOENT: "file_not_found",
    errno.EEXIST: "file_exists",
    errno.EISDIR: "is_a_directory",
    errno.ENOTDIR: "not_a_directory",
    errno.ENOTEMPTY: "directory_not_empty",
    errno.ENXIO: "not_a_file",
    errno.EACCES: "permission_denied",
    errno.EPERM: "permission_denied",
    errno.EROFS: "permission_denied",
    errno.ENOSPC: "disk_full",
    errno.EDQUOT: "disk_full",
    errno.EFBIG: "disk_full",
    errno.EBUSY: "permission_denied",
    errno.ENAMETOOLONG: "bad_path",
    errno.ELOOP: "bad_path",
    errno.EINVAL: "bad_path",
    errno.EXDEV: "other_file_system",
    errno.ESTALE: "file_changed",
}


class Files:
    """home: where relative paths begin."""

    def __init__(self, *, home: str, threads: UserThreads) -> None:
        self.home = home
        self.threads = threads

    def path(self, params: Any, name: str = "path") -> str:
        """Absolute, and without empty and `.` parts (`..` stays: after a link it is not what stands before it).
        Raises OpenRejectedError bad_path."""
        text = from_home(path_text(params, name), self.home)
        parts = [
            part for part in f"{'' if text.startswith('/') else self.home}/{text}".split("/") if part not in ("", ".")
        ]
        return "/" + "/".join(parts) + ("/" if text.endswith("/") and parts else "")


Serve = Callable[[Files, Incoming], Awaitable[None]]


async def _read(files: Files, incoming: Incoming) -> None:
    params = incoming.params
    path = files.path(params)
    offset = whole_number(params, "offset", -OFFSET_MAX, OFFSET_MAX, 0)
    length = whole_number(params, "length", 0, OFFSET_MAX, None)
    threads = files.threads
    with _refusing(path):
        reader = await _made(threads, lambda: FileReader(path, offset=offset, length=length))
        try:
            stream = await incoming.accept(
                {
                    "size_bytes": reader.size_bytes,
                    "offset": reader.offset,
                    "length": reader.length,
                    "mode": reader.status.st_mode & 0o7777,
                    "modified_at": reader.status.st_mtime,
                }
            )
            while data := await threads.run(reader.next):
                await stream.write(data)
            stream.end()
        finally:
            reader.close()


async def _append(files: Files, incoming: Incoming) -> None:
    await _write(files, incoming, append=True)


async def _write(files: Files, incoming: Incoming, *, append: bool = False) -> None:
    params = incoming.params
    path = files.path(params)
    mode = whole_number(params, "mode", 0, 0o7777, None)
    parents = param(params, "parents", bool, True)
    threads = files.threads
    with _refusing(path):
        writer = await _made(threads, lambda: FileWriter(path, mode=mode, parents=parents, append=append))
        try:
            stream = await incoming.accept()
            done = False
            while not done and (data := await stream.read(FEED_BYTES)):
                done = await threads.run(writer.feed, data)
            size_bytes, crc32 = await threads.run(writer.commit)
        finally:
            await asyncio.shield(threads.run(writer.close))
        await stream.write(json.dumps({"size_bytes": size_bytes, "crc32": crc32}).encode())
        stream.end()


async def _list(files: Files, incoming: Incoming) -> None:
    path = files.path(incoming.params)
    depth = whole_number(incoming.params, "depth", 1, DEPTH_MAX, 1)
    limit = whole_number(incoming.params, "limit", 1, ENTRIES_MAX, ENTRIES_MAX)
    after = param(incoming.params, "after", str, "")
    with _refusing(path):
        entries, following = await files.threads.run(lambda: entries_of(path, depth=depth, limit=limit, after=after))
    stream = await incoming.accept()
    value = {"path": path, "entries": entries, "truncated": following is not None, "next": following}
    await stream.write(await asyncio.to_thread(lambda: json.dumps(value).encode()))


async def _stat(files: Files, incoming: Incoming) -> None:
    path = files.path(incoming.params)
    follow = param(incoming.params, "follow", bool, True)
    with _refusing(path):
        await incoming.answer(await files.threads.run(lambda: status_of(path, follow=follow)))


async def _remove(files: Files, incoming: Incoming) -> None:
    path = files.path(incoming.params)
    recursive = param(incoming.params, "recursive", bool, False)
    with _refusing(path):
        await files.threads.run(_remove_path, path, recursive)
    await incoming.answer()


async def _rename(files: Files, incoming: Incoming) -> None:
    old, new = files.path(incoming.params, "old_path"), files.path(incoming.params, "new_path")
    with _refusing(old):
        await files.threads.run(_rename_path, old, new)
        await incoming.answer(await files.threads.run(lambda: status_of(new, follow=False)))


async def _mkdir(files: Files, incoming: Incoming) -> None:
    path = files.path(incoming.params)
    mode = whole_number(incoming.params, "mode", 0, 0o7777, None)
    parents = param(incoming.params, "parents", bool, True)
    exist_ok = param(incoming.params, "exist_ok", bool, False)
    with _refusing(path):
        await files.threads.run(_make_directory, path, mode, parents, exist_ok)
        await incoming.answer(await files.threads.run(lambda: status_of(path, follow=True)))


async def _symlink(files: Files, incoming: Incoming) -> None:
    path, target = files.path(incoming.params), path_text(incoming.params, "target")
    with _refusing(path):
        await files.threads.run(os.symlink, target, path)
        await incoming.answer(await files.threads.run(lambda: status_of(path, follow=False)))


async def _watch(files: Files, incoming: Incoming) -> None:
    path = files.path(incoming.params)
    recursive = param(incoming.params, "recursive", bool, False)
    with _refusing(path):
        watch = await _made(files.threads, lambda: Watch(path, recursive=recursive))
        try:
            stream = await incoming.accept()
            await _send_changes(files.threads, watch, stream)
        finally:
            watch.close()


HANDLERS: dict[str, Serve] = {
    "files.read": _read,
    "files.write": _write,
    "files.append": _append,
    "files.list": _list,
    "files.stat": _stat,
    "files.remove": _remove,
    "files.rename": _rename,
    "files.mkdir": _mkdir,
    "files.symlink": _symlink,
    "files.watch": _watch,
}


async def _send_changes(threads: UserThreads, watch: Watch, stream: Stream) -> None:
    """JSON lines, until what is watched is removed or the stream ends. While the host reads none, vmlinux collects
    them, and in the end sends `overflow`."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    lost = asyncio.create_task(stream.wait_lost())
    try:
        while not watch.over:
            loop.add_reader(watch.fd, readable.set)
            waiting = asyncio.create_task(readable.wait())
            try:
                at = watch.settles_at
                timeout_s = None if at is None else max(0.0, at - time.monotonic())
                await asyncio.wait({lost, waiting}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            finally:
                waiting.cancel()
                loop.remove_reader(watch.fd)
            if lost.done():
                raise lost.result()
            readable.clear()
            for change in await threads.run(watch.read):
                await stream.write(json.dumps(change).encode() + b"\n")
        stream.end()
    finally:
        lost.cancel()


async def _made(threads: UserThreads, make: Callable[[], Any]) -> Any:
    """What `make` makes in a thread; closed at once if nobody waits for it any more."""
    made: list[Any] = []

    def run() -> None:
        made.append(make())

    try:
        await threads.run(run)
    except asyncio.CancelledError:
        for thing in made:
            await asyncio.shield(threads.run(thing.close))
        raise
    return made[0]


def _rename_path(old: str, new: str) -> None:
    try:
        Path(old).rename(new)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EXDEV):
            raise
        Path(old).lstat()  # else it is the old name that is wrong
        raise OSError(error.errno, os.strerror(error.errno or 0), new) from error


def _remove_path(path: str, recursive: bool) -> None:
    is_directory = stat.S_ISDIR(Path(path).lstat().st_mode)
    if is_directory and recursive:
        # Before all that is in it is gone.
        if not os.access(Path(path).resolve().parent, os.W_OK, effective_ids=True):
            raise PermissionError(errno.EACCES, "Its directory may not be written", path)
        if os.path.ismount(path):
            raise OSError(errno.EBUSY, "A file system is mounted there", path)
        shutil.rmtree(path)  # safe against links that appear meanwhile: it works with descriptors of directories
    elif is_directory:
        Path(path).rmdir()
    else:
        Path(path).unlink()


def _make_directory(path: str, mode: int | None, parents: bool, exist_ok: bool) -> None:
    Path(path).mkdir(parents=parents, exist_ok=exist_ok)
    if mode is not None:
        Path(path).chmod(mode)


@contextlib.contextmanager
def _refusing(path: str) -> Iterator[None]:
    """Errors of the file system and of content, as they are sent to the host."""
    try:
        yield
    except OSError as error:
        code = _CODES.get(error.errno or 0, "io_error")
        where = os.fsencode(error.filename if isinstance(error.filename, str) else path).decode("utf-8", "replace")
        raise OpenRejectedError(code, f"{where}: {error.strerror or error}") from error
    except ChunkError as error:
        raise OpenRejectedError("content_broken", str(error)) from error
