"""Watches directories and files with inotify (man inotify). Turns its records into JSON values."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from pathlib import Path
from typing import Any

from vm_runtime.guest.listing import text_of

# vmlinux lets one user have some 4000 to 8000 on a small machine; ours shall not be all of them.
WATCHES_MAX = 2048

READ_BYTES = 64 * 1024

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
    the thread it runs in."""

    def __init__(self, path: str, *, recursive: bool) -> None:
        """Raises OSError."""
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._paths: dict[int, str] = {}
        self._root = path
        self._recursive = recursive
        self.over = False
        self.fd = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self.fd < 0:
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

    def read(self) -> list[dict[str, Any]]:
        """The changes since the last call: {event, path} and for renames {old_path}. After `over` there are no more:
        what was watched is gone. Raises OSError."""
        try:
            data = os.read(self.fd, READ_BYTES)
        except BlockingIOError:
            return []
        changes: list[dict[str, Any]] = []
        moved: dict[int, dict[str, Any]] = {}
        offset = 0
        while offset < len(data):
            watch, mask, cookie, size = _RECORD.unpack_from(data, offset)
            offset += _RECORD.size
            name = data[offset : offset + size].rstrip(b"\0")
            offset += size
            self._take(watch, mask, cookie, name, changes, moved)
        return changes

    def _take(
        self,
        watch: int,
        mask: int,
        cookie: int,
        name: bytes,
        changes: list[dict[str, Any]],
        moved: dict[int, dict[str, Any]],
    ) -> None:
        if mask & IN_Q_OVERFLOW:
            changes.append({"event": "overflow", "path": text_of(self._root)})
            return
        directory = self._paths.get(watch)
        if directory is None:
            return
        if mask & IN_IGNORED:
            del self._paths[watch]
            return
        if mask & (IN_DELETE_SELF | IN_MOVE_SELF):
            if directory == self._root:
                changes.append({"event": "deleted", "path": text_of(directory)})
                self.over = True
            return
        path = f"{directory.rstrip('/')}/{os.fsdecode(name)}" if name else directory
        shown = text_of(path)
        if mask & IN_MOVED_FROM:
            change = {"event": "deleted", "path": shown}
            moved[cookie] = change
            changes.append(change)
        elif mask & IN_MOVED_TO:
            if begun := moved.pop(cookie, None):
                begun.update(event="renamed", old_path=begun["path"], path=shown)
            else:
                changes.append({"event": "created", "path": shown})
        else:
            event = next(word for bit, word in _SIMPLE.items() if mask & bit)
            change = {"event": event, "path": shown}
            if not changes or changes[-1] != change:
                changes.append(change)
        if self._recursive and mask & IN_ISDIR and mask & (IN_CREATE | IN_MOVED_TO):
            self._add_new(path, changes)

    def _add_new(self, path: str, changes: list[dict[str, Any]]) -> None:
        """A directory that appeared: what was put into it before we watched it is told here."""
        try:
            self._add(path)
            for found in self._add_below(path):
                changes.append({"event": "created", "path": text_of(found)})
        except OSError as error:
            if error.errno == errno.ENOSPC:
                changes.append({"event": "overflow", "path": text_of(path)})

    def _add(self, path: str) -> None:
        if len(self._paths) >= WATCHES_MAX:
            raise OSError(errno.ENOSPC, f"More than {WATCHES_MAX} directories to watch", path)
        number = self._libc.inotify_add_watch(self.fd, os.fsencode(path), _WANTED)
        if number < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
        self._paths[number] = path

    def _add_below(self, path: str) -> list[str]:
        found: list[str] = []
        for directory, names, files in os.walk(path):
            found.extend(f"{directory.rstrip('/')}/{name}" for name in (*names, *files))
            for below in found[len(found) - len(names) - len(files) :][: len(names)]:
                if not Path(below).is_symlink():
                    self._add(below)
        return found
