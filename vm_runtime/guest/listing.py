"""What there is on the disk, as JSON values: one entry, and the entries of a directory. All of it blocks."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

# What one answer has room for: about 2 MB as JSON. More is told, to be asked for directory by directory.
ENTRIES_MAX = 10_000
TEXT_BYTES_MAX = 1024 * 1024

_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "link",
    stat.S_IFIFO: "pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


def describe(path: str, status: os.stat_result) -> dict[str, Any]:
    """One entry. mode: permission bits. target: where a link leads, else null."""
    kind = _KINDS.get(stat.S_IFMT(status.st_mode), "device")
    target = None
    if kind == "link":
        try:
            target = text_of(str(Path(path).readlink()))
        except OSError:
            target = None  # it was replaced meanwhile
    return {
        "name": text_of(path.rstrip("/").rpartition("/")[2] or "/"),
        "path": text_of(path),
        "kind": kind,
        "size_bytes": status.st_size,
        "mode": stat.S_IMODE(status.st_mode),
        "uid": status.st_uid,
        "gid": status.st_gid,
        "modified_at": status.st_mtime,
        "target": target,
    }


def status_of(path: str, *, follow: bool) -> dict[str, Any]:
    """Raises OSError."""
    return describe(path, Path(path).stat(follow_symlinks=follow))


def entries_of(path: str, *, depth: int) -> tuple[list[dict[str, Any]], bool]:
    """What is in a directory, by name, and down to `depth` levels; whether there was more than one answer has
    room for. Links are entries and are not followed. What vanishes or cannot be entered below the first level is left
    out. Raises OSError.
    """
    entries: list[dict[str, Any]] = []
    text_bytes = 0
    with os.scandir(path) as found:
        level = list(found)
    pending = [(entry, 1) for entry in sorted(level, key=lambda entry: entry.name, reverse=True)]
    while pending:
        entry, at = pending.pop()
        text_bytes += len(entry.path)
        if len(entries) >= ENTRIES_MAX or text_bytes > TEXT_BYTES_MAX:
            return entries, True
        try:
            entries.append(describe(entry.path, entry.stat(follow_symlinks=False)))
            if at < depth and entry.is_dir(follow_symlinks=False):
                with os.scandir(entry.path) as found:
                    below = sorted(found, key=lambda entry: entry.name, reverse=True)
                pending.extend((child, at + 1) for child in below)
        except OSError:
            continue
    return entries, False


def text_of(name: str) -> str:
    """A name as text: bytes that are no UTF-8 become U+FFFD (such a file is seen, and reached by a command only)."""
    return os.fsencode(name).decode("utf-8", "replace")
