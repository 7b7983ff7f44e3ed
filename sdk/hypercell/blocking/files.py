"""Files in a sandbox: content of any size, checked from end to end, and everything about them.

Made by sdk/make_blocking.py from aio/files.py: change that.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import IO

from hypercell.aio.files import AsyncFiles
from hypercell.blocking.portal import (
    BlockingCall,
    Wrapper,
    iterate,
    register,
    wrap,
)
from hypercell.blocking.watch import Watch
from hypercell.values import FileInfo, User

PAGE_ENTRIES = 5000
Content = str | bytes | IO[bytes] | Iterable[bytes]


class Files(Wrapper):
    """The files of one sandbox, as `sandbox.files`. Relative paths begin at the home directory of the kernel's user, as
    `~` does. user="root", for all methods: with the rights of root, whose home `~` is then.
    """

    _async: AsyncFiles

    def read(self, path: str, *, offset: int = 0, length: int | None = None, user: User = "user") -> bytes:
        """A file's content, which is held in memory; `stream` and `download` hold none. offset: where it begins, from
        the end if below zero. length: at most so many bytes. Raises NotFoundError.
        """
        return BlockingCall().run(self._async.read(path, offset=offset, length=length, user=user))

    def read_text(self, path: str, *, encoding: str = "utf-8", user: User = "user") -> str:
        """A file's content as text. Raises NotFoundError, UnicodeDecodeError."""
        return BlockingCall().run(self._async.read_text(path, encoding=encoding, user=user))

    def stream(self, path: str, *, offset: int = 0, length: int | None = None, user: User = "user") -> Iterator[bytes]:
        """A file's content in pieces, from offset on (from the end if below zero), at most `length` bytes. All of it
        counts only when the last one has come: what was changed or cut off on its way raises ContentBrokenError then,
        or ConnectionLostError. Raises NotFoundError.
        """
        return iterate(self._async.stream(path, offset=offset, length=length, user=user))

    def download(self, path: str, local: str | os.PathLike[str], *, user: User = "user") -> int:
        """Copies a file of the sandbox to this machine; its size in bytes. `local` is replaced when all is there."""
        return BlockingCall().run(self._async.download(path, local, user=user))

    def write(
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
        return BlockingCall().run(
            self._async.write(path, content, mode=mode, parents=parents, append=append, user=user)
        )

    def upload(
        self,
        local: str | os.PathLike[str],
        path: str,
        *,
        mode: str | None = None,
        parents: bool = True,
        user: User = "user",
    ) -> int:
        """Copies a file of this machine into the sandbox; its size in bytes."""
        return BlockingCall().run(self._async.upload(local, path, mode=mode, parents=parents, user=user))

    def list(self, path: str = ".", *, depth: int = 1, user: User = "user") -> list[FileInfo]:
        """What is in a directory, to that depth. Raises NotFoundError, and LimitError for more than 1,000,000 entries;
        `scan` has no limit.
        """
        return BlockingCall().run(self._async.list(path, depth=depth, user=user))

    def scan(
        self, path: str = ".", *, depth: int = 1, page: int = PAGE_ENTRIES, user: User = "user"
    ) -> Iterator[FileInfo]:
        """What is in a directory, to that depth, by name; a directory stands before what is in it. page: how many
        entries are asked for at a time (up to 10,000). Raises NotFoundError.
        """
        return iterate(self._async.scan(path, depth=depth, page=page, user=user))

    def stat(self, path: str, *, follow: bool = True, user: User = "user") -> FileInfo:
        """One file, directory or link. follow: where a link leads instead of the link. Raises NotFoundError."""
        return BlockingCall().run(self._async.stat(path, follow=follow, user=user))

    def exists(self, path: str, *, user: User = "user") -> bool:
        """Whether there is something of this name that the user may know of."""
        return BlockingCall().run(self._async.exists(path, user=user))

    def mkdir(
        self, path: str, *, mode: str | None = None, parents: bool = True, exist_ok: bool = False, user: User = "user"
    ) -> FileInfo:
        """A new directory. mode: octal, like "0755". parents: make missing ones above it. exist_ok: a directory of this
        name is fine. Raises StateError if there is something of this name.
        """
        return BlockingCall().run(self._async.mkdir(path, mode=mode, parents=parents, exist_ok=exist_ok, user=user))

    def symlink(self, target: str, path: str, *, user: User = "user") -> FileInfo:
        """A link at `path` that leads to `target`, whether there is such a thing or not. Raises StateError if there is
        something at `path`.
        """
        return BlockingCall().run(self._async.symlink(target, path, user=user))

    def rename(self, old_path: str, new_path: str, *, user: User = "user") -> FileInfo:
        """Renames or moves; a file of the new name is replaced. Raises NotFoundError, StateError."""
        return BlockingCall().run(self._async.rename(old_path, new_path, user=user))

    def remove(self, path: str, *, recursive: bool = False, user: User = "user") -> None:
        """Removes a file, a link or a directory (recursive: with all in it). Raises NotFoundError, StateError."""
        BlockingCall().run(self._async.remove(path, recursive=recursive, user=user))

    def watch(self, path: str = ".", *, recursive: bool = False, user: User = "user") -> Watch:
        """A watch of a file or directory, recursive: and of all directories below it, which tells every change from now
        on. Raises NotFoundError, and LimitError where too much is watched.
        """
        result: Watch = wrap(BlockingCall().run(self._async.watch(path, recursive=recursive, user=user)))
        return result


register(AsyncFiles, Files)
