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
from hypercell.values import FileInfo

Content = str | bytes | IO[bytes] | Iterable[bytes]


class Files(Wrapper):
    """The files of one sandbox, as `sandbox.files`. Relative paths begin at the home directory of the kernel's user."""

    _async: AsyncFiles

    def read(self, path: str) -> bytes:
        """A file's content, which is held in memory; `stream` and `download` hold none. Raises NotFoundError."""
        return BlockingCall().run(self._async.read(path))

    def read_text(self, path: str, *, encoding: str = "utf-8") -> str:
        """A file's content as text. Raises NotFoundError, UnicodeDecodeError."""
        return BlockingCall().run(self._async.read_text(path, encoding=encoding))

    def stream(self, path: str) -> Iterator[bytes]:
        """A file's content in pieces. All of it counts only when the last one has come: what was changed or cut off on
        its way raises ContentBrokenError then, or ConnectionLostError. Raises NotFoundError.
        """
        return iterate(self._async.stream(path))

    def download(self, path: str, local: str | os.PathLike[str]) -> int:
        """Copies a file of the sandbox to this machine; its size in bytes. `local` is replaced when all is there."""
        return BlockingCall().run(self._async.download(path, local))

    def write(self, path: str, content: Content, *, mode: str | None = None, parents: bool = True) -> int:
        """Writes a file whole or not at all; one that is there is replaced. Its size in bytes.

        content: text (as UTF-8), bytes, a binary file, or pieces of bytes. mode: octal, like "0755". parents: make
        missing directories. Raises DiskFullError, StateError.
        """
        return BlockingCall().run(self._async.write(path, content, mode=mode, parents=parents))

    def upload(self, local: str | os.PathLike[str], path: str, *, mode: str | None = None, parents: bool = True) -> int:
        """Copies a file of this machine into the sandbox; its size in bytes."""
        return BlockingCall().run(self._async.upload(local, path, mode=mode, parents=parents))

    def list(self, path: str = ".", *, depth: int = 1) -> list[FileInfo]:
        """What is in a directory, to that depth. Raises NotFoundError, and LimitError for more than 10,000 entries."""
        return BlockingCall().run(self._async.list(path, depth=depth))

    def stat(self, path: str, *, follow: bool = True) -> FileInfo:
        """One file, directory or link. follow: where a link leads instead of the link. Raises NotFoundError."""
        return BlockingCall().run(self._async.stat(path, follow=follow))

    def exists(self, path: str) -> bool:
        """Whether there is something of this name that the user may know of."""
        return BlockingCall().run(self._async.exists(path))

    def mkdir(self, path: str, *, mode: str | None = None, parents: bool = True, exist_ok: bool = False) -> FileInfo:
        """A new directory. mode: octal, like "0755". parents: make missing ones above it. exist_ok: a directory of this
        name is fine. Raises StateError if there is something of this name.
        """
        return BlockingCall().run(self._async.mkdir(path, mode=mode, parents=parents, exist_ok=exist_ok))

    def rename(self, old_path: str, new_path: str) -> FileInfo:
        """Renames or moves; a file of the new name is replaced. Raises NotFoundError, StateError."""
        return BlockingCall().run(self._async.rename(old_path, new_path))

    def remove(self, path: str, *, recursive: bool = False) -> None:
        """Removes a file, a link or a directory (recursive: with all in it). Raises NotFoundError, StateError."""
        BlockingCall().run(self._async.remove(path, recursive=recursive))

    def watch(self, path: str = ".", *, recursive: bool = False) -> Watch:
        """A watch of a file or directory, recursive: and of all directories below it, which tells every change from now
        on. Raises NotFoundError, and LimitError where too much is watched.
        """
        result: Watch = wrap(BlockingCall().run(self._async.watch(path, recursive=recursive)))
        return result


register(AsyncFiles, Files)
