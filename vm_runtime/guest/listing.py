"""What there is on the disk, as JSON values: one entry, and the entries of a directory. All of it blocks."""

from __future__ import annotations

import base64
import heapq
import os
import stat
from pathlib import Path
from typing import Any

from vm_runtime.wire.errors import OpenRejectedError

# What one answer has room for: about 2 MB as JSON. More is asked for page by page.
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


def entries_of(path: str, *, depth: int, limit: int, after: str = "") -> tuple[list[dict[str, Any]], str | None]:
    """What is in a directory, by name, and down to `depth` levels: at most `limit` entries, and where the rest begins
    (for `after`), None where there is none. Links are entries and are not followed. What vanishes or cannot be entered
    below the first level is left out. Raises OSError, and OpenRejectedError for an `after` that is none.
    """
    entries: list[dict[str, Any]] = []
    text_bytes = 0
    done = _place(after)
    last = done
    pending = _level(path, (), done, limit)
    while pending:
        entry, place = pending.pop()
        if entry is None:
            return entries, _cursor(last)
        try:
            if place > done:
                text_bytes += len(entry.path)
                if len(entries) >= limit or (text_bytes > TEXT_BYTES_MAX and entries):
                    return entries, _cursor(last)
                entries.append(describe(entry.path, entry.stat(follow_symlinks=False)))
                last = place
            if len(place) < depth and entry.is_dir(follow_symlinks=False):
                pending.extend(_level(entry.path, place, done, limit))
        except OSError:
            continue
    return entries, None


_Place = tuple[bytes, ...]  # the names that lead to an entry: sorted by it, a directory stands before what is in it


def _level(path: str, place: _Place, done: _Place, limit: int) -> list[tuple[os.DirEntry[str] | None, _Place]]:
    """The entries of a directory that may be asked for, the first one last: as many as one page can hold, then None for
    the rest."""
    with os.scandir(path) as found:
        places = ((entry, (*place, os.fsencode(entry.name))) for entry in found)
        # Also directories that are done, if there is more in them.
        wanted = (each for each in places if each[1] > done or each[1] == done[: len(each[1])])
        first = heapq.nsmallest(limit + 2, wanted, key=lambda each: each[1])
    rest = [(None, place)] if len(first) == limit + 2 else []
    return [*rest, *reversed(first)]


def _cursor(place: _Place) -> str:
    return base64.urlsafe_b64encode(b"/".join(place)).decode()


def _place(cursor: str) -> _Place:
    try:
        text = base64.urlsafe_b64decode(cursor)
    except ValueError as error:
        raise OpenRejectedError("bad_params", "after is what an earlier listing has told as next.") from error
    return tuple(text.split(b"/")) if text else ()


def text_of(name: str) -> str:
    """A name as text: bytes that are no UTF-8 become U+FFFD (such a file is seen, and reached by a command only)."""
    return os.fsencode(name).decode("utf-8", "replace")
