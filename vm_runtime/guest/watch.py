"""Watches directories and files with inotify (man inotify). Turns its records into JSON values."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
import time
from pathlib import Path
from typing import Any

from vm_runtime.guest.listing import text_of
from vm_runtime.wire.errors import OpenRejectedError

# vmlinux lets one user have some 4000 to 8000 on a small machine; ours shall not be all of them.
WATCHES_MAX = 2048

READ_BYTES = 64 * 1024

# The two records of a rename are two events in vmlinux, and either may be read before the other has come (man inotify,
# "Dealing with rename() events"). What was moved out of sight is known after this time; its writer runs meanwhile.
MOVE_PAIR_S = 0.1

# linux/inotify.h
IN_MODIFY, IN_ATTRIB, IN_CLOSE_WRITE = 0x2, 0x4, 0x8
IN_MOVED_FROM, IN_MOVED_TO, IN_CREATE, IN_DELETE, IN_DELETE_SELF, IN_MOVE_SELF = 0x40, 0x80, 0x100, 0x200, 0x400, 0x800
IN_Q_OVERFLOW, IN_IGNORED, IN_ISDIR = 0x4000, 0x8000, 0x40000000
_WANTED = (
    IN_MODIFY | IN_ATTRIB | IN_MOVED_FROM | IN_MOVED_TO | IN_CREATE | IN_DELETE | IN_DELETE_SELF | IN_MOVE_SELF
)  # fmt: skip
_SIMPLE = {IN_MODIFY: "modified", IN_ATTRIB: "attributes", IN_CREATE: "created", IN_DELETE: "deleted"}
_RECORD = struct.Struct("iIII")


class Watch:
    """`fd` is readable when `read` has something. `close` when done. Adding watches blocks, and takes the rights of
    the thread it runs in. over: what was watched was removed, and nothing more will come."""

    def __init__(self, path: str, *, recursive: bool) -> None:
        """Raises OSError, and OpenRejectedError too_many_watches."""
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._paths: dict[int, str] = {}
        self._root = path
        self._recursive = recursive
        self._changes: list[dict[str, Any]] = []
        # Those of `_changes` that were moved, and nobody knows yet where to: when they came, by the number that both
        # records have.
        self._moved: dict[int, tuple[float, dict[str, Any]]] = {}
        self.over = False
        self.fd = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self.fd < 0:
            if ctypes.get_errno() == errno.EMFILE:
                raise OpenRejectedError(
                    "too_many_watches", "No more can be watched at a time; end another watch first."
                )
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        try:
            self._add(path)
            if recursive:
                self._add_below(path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    @property
    def settles_at(self) -> float | None:
        """When `read` has something although `fd` is not readable (time.monotonic): half of a move is missing."""
        return next((since + MOVE_PAIR_S for since, _ in self._moved.values()), None)

    def read(self) -> list[dict[str, Any]]:
        """The changes since the last call: {event, path} and for renames {old_path}. Those from the first half of a
        move on are held back until the other half has come, or `settles_at`. Raises OSError."""
        data = b""
        with contextlib.suppress(BlockingIOError):
            data = os.read(self.fd, READ_BYTES)
        offset = 0
        while offset < len(data):
            watch, mask, cookie, size = _RECORD.unpack_from(data, offset)
            offset += _RECORD.size
            name = data[offset : offset + size].rstrip(b"\0")
            offset += size
            self._take(watch, mask, cookie, name)
        for cookie, (since, change) in list(self._moved.items()):
            if self.over or since + MOVE_PAIR_S <= time.monotonic():
                del self._moved[cookie]
                self._forget_below(change["path"])
        _, first = next(iter(self._moved.values()), (0, None))
        ready = next((at for at, change in enumerate(self._changes) if change is first), len(self._changes))
        changes, self._changes = self._changes[:ready], self._changes[ready:]
        return [{**change, "path": text_of(change["path"])} for change in changes]

    def _take(self, watch: int, mask: int, cookie: int, name: bytes) -> None:
        if mask & IN_Q_OVERFLOW:
            self._changes.append({"event": "overflow", "path": self._root})
            return
        directory = self._paths.get(watch)
        if directory is None:
            return
        if mask & IN_IGNORED:
            del self._paths[watch]
            return
        if mask & (IN_DELETE_SELF | IN_MOVE_SELF):
            if directory == self._root:
                self._changes.append({"event": "deleted", "path": directory})
                self.over = True
            return
        path = f"{directory.rstrip('/')}/{os.fsdecode(name)}" if name else directory
        if mask & IN_MOVED_FROM:
            change = {"event": "deleted", "path": path}
            self._moved[cookie] = time.monotonic(), change
            self._changes.append(change)
        elif mask & IN_MOVED_TO and cookie in self._moved:
            _, begun = self._moved.pop(cookie)
            old = begun["path"]
            begun.update(event="renamed", old_path=text_of(old), path=path)
            for number, below in self._paths.items():
                if below == old or below.startswith(f"{old}/"):
                    self._paths[number] = path + below[len(old) :]
        else:
            event = "created" if mask & IN_MOVED_TO else next(word for bit, word in _SIMPLE.items() if mask & bit)
            change = {"event": event, "path": path}
            if not self._changes or self._changes[-1] != change:
                self._changes.append(change)
            if self._recursive and mask & IN_ISDIR and mask & (IN_CREATE | IN_MOVED_TO):
                self._add_new(path)

    def _add_new(self, path: str) -> None:
        """A directory that appeared: what was put into it before we watched it is reported here."""
        try:
            self._add(path)
            self._changes.extend({"event": "created", "path": found} for found in self._add_below(path))
        except OpenRejectedError:
            self._changes.append({"event": "overflow", "path": path})
        except OSError:
            pass  # it was removed already, or is nothing that its user may look into

    def _add(self, path: str) -> None:
        number = self._libc.inotify_add_watch(self.fd, os.fsencode(path), _WANTED) if self._has_room() else -1
        if number < 0:
            if not self._has_room() or ctypes.get_errno() == errno.ENOSPC:
                raise OpenRejectedError("too_many_watches", f"{path} has more than {WATCHES_MAX} directories to watch.")
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
        self._paths[number] = path

    def _has_room(self) -> bool:
        return len(self._paths) < WATCHES_MAX

    def _add_below(self, path: str) -> list[str]:
        """Watches all directories below one; what is in them. What its user may not read is left out."""
        found: list[str] = []
        for directory, names, files in os.walk(path):
            found.extend(f"{directory.rstrip('/')}/{name}" for name in (*names, *files))
            for below in (f"{directory.rstrip('/')}/{name}" for name in names):
                if not Path(below).is_symlink():
                    with contextlib.suppress(FileNotFoundError, PermissionError):
                        self._add(below)
        return found

    def _forget_below(self, path: str) -> None:
        """A directory that was moved out of sight: what happens in it is nobody's business any more."""
        for number, known in list(self._paths.items()):
            if known == path or known.startswith(f"{path}/"):
                del self._paths[number]
                self._libc.inotify_rm_watch(self.fd, number)
