"""The directory of a snapshot store: what lies where, and how its files are read, locked and removed.

Knows nothing of an index, nor of who needs what. Blocking file I/O: call it from a thread.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vm_runtime.files import try_lock
from vm_runtime.snapshots.digests import part_digest
from vm_runtime.snapshots.errors import BrokenSnapshotError, SnapshotRequestError, UnknownSnapshotError
from vm_runtime.snapshots.manifest import MAX_MANIFEST_BYTES, Manifest, Part, PartKind

PartKey = tuple[PartKind, str]

_USER_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
_SNAPSHOT_ID = re.compile(r"^[0-9a-f]{32}$")
# A pin is written in milliseconds; what is older than this was left by a writer that was killed.
_HALF_WRITTEN_S = 3600.0
_CLOSERS = 8


class StoreDirectory:
    """Manifests, parts, pins and drafts of one store; made if they are missing. Close it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name in ("manifests", "pins", "drafts", *(f"parts/{kind}" for kind in PartKind)):
            (directory / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        self._closers = ThreadPoolExecutor(_CLOSERS, thread_name_prefix="unlink")

    def close(self) -> None:
        """Twice is harmless."""
        self._closers.shutdown()

    # Snapshots

    def manifest_path(self, snapshot_id: str) -> Path:
        """Where the manifest of a snapshot lies, or would lie. Raises UnknownSnapshotError for what is no id."""
        if not _SNAPSHOT_ID.match(snapshot_id):
            raise UnknownSnapshotError(snapshot_id)
        return self.directory / "manifests" / f"{snapshot_id}.json"

    def ids(self) -> set[str]:
        """The ids of all snapshots, also of those whose manifest turns out to be broken."""
        names = (path.stem for path in (self.directory / "manifests").glob("*.json"))
        return {name for name in names if _SNAPSHOT_ID.match(name)}

    def get(self, snapshot_id: str) -> Manifest:
        """Raises UnknownSnapshotError, or BrokenSnapshotError if the manifest was tampered with."""
        try:
            with self.manifest_path(snapshot_id).open("rb") as file:
                manifest = Manifest.parse(file.read(MAX_MANIFEST_BYTES + 1))
        except FileNotFoundError as error:
            raise UnknownSnapshotError(snapshot_id) from error
        if manifest.id != snapshot_id:
            raise BrokenSnapshotError(f"The file of snapshot {snapshot_id} holds another one, {manifest.id}.")
        return manifest

    # Parts

    def part_path(self, kind: PartKind, digest: str) -> Path:
        """Where a part lies, or would lie. Its content is only what its digest says if somebody checked that."""
        return self.directory / "parts" / kind / digest

    def part_keys(self) -> set[PartKey]:
        """All parts for which there is a file."""
        return {(kind, path.name) for kind in PartKind for path in (self.directory / "parts" / kind).iterdir()}

    def stored_bytes(self, manifest: Manifest) -> list[int]:
        """Disk space of each part; a base is mostly holes. 0 for one that is missing, which `verify` names."""
        found: list[int] = []
        for kind, part in manifest.parts():
            path = self.part_path(kind, part.digest)
            found.append(path.stat().st_blocks * 512 if path.exists() else 0)
        return found

    def check_part(self, kind: PartKind, part: Part) -> None:
        """Reads all of a part. Raises BrokenSnapshotError if it is missing, or not what its digest and size say."""
        path = self.part_path(kind, part.digest)
        try:
            size_bytes = path.stat().st_size
        except FileNotFoundError as error:
            raise BrokenSnapshotError(f"The {kind} {part.digest} is missing.") from error
        if size_bytes != part.size_bytes:
            raise BrokenSnapshotError(f"The {kind} {part.digest} has {size_bytes} bytes instead of {part.size_bytes}.")
        if part_digest(kind, path) != part.digest:
            raise BrokenSnapshotError(f"The {kind} {part.digest} was changed: its content has another digest.")

    # Pins

    def pin_path(self, user: str) -> Path:
        """Where a user's pin lies, or would lie. Raises SnapshotRequestError for what cannot be a name."""
        if not _USER_NAME.match(user):
            raise SnapshotRequestError(f"{user!r} cannot be the name of a pin.")
        return self.directory / "pins" / f"{user}.json"

    def pin_users(self) -> set[str]:
        """Who has pinned something, also where that cannot be read."""
        return {path.stem for path in (self.directory / "pins").glob("*.json") if _USER_NAME.match(path.stem)}

    # Drafts: each is a directory that its writer holds a lock on

    def open_draft(self, stack: contextlib.ExitStack) -> Path:
        """A new draft's directory; it is removed when the stack is closed."""
        path = self.directory / "drafts" / secrets.token_hex(8)
        path.mkdir(mode=0o700)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        stack.callback(shutil.rmtree, path, ignore_errors=True)
        fcntl.flock(fd, fcntl.LOCK_EX)
        return path

    def dead_drafts(self, stack: contextlib.ExitStack) -> list[Path]:
        """The drafts that nobody works on any more; they are locked until the stack is closed."""
        dead: list[Path] = []
        for path in (self.directory / "drafts").iterdir():
            with contextlib.suppress(FileNotFoundError):  # its writer has just removed it
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                stack.callback(os.close, fd)
                if try_lock(fd):
                    dead.append(path)
        return dead

    # Removing

    def remove_half_written(self) -> None:
        """Removes files that writers left who were killed."""
        for name in ("manifests", "pins"):
            for path in (self.directory / name).glob(".*"):
                with contextlib.suppress(FileNotFoundError):  # its writer has just renamed it
                    if time.time() - path.stat().st_mtime > _HALF_WRITTEN_S:
                        path.unlink()

    @contextlib.contextmanager
    def unlinking(self) -> Iterator[Callable[[Path], int]]:
        """Gives what removes a file and answers how much space it takes, which is free when this ends.

        The kernel frees it when the file is closed for the last time. On ext4 that takes most of a millisecond, without
        using a CPU, so several threads do it: 500 files in 0.04 s instead of 0.42.
        """
        opened: list[int] = []

        def unlink(path: Path) -> int:
            opened.append(os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC))
            path.unlink()
            return os.fstat(opened[-1]).st_blocks * 512

        try:
            yield unlink
        finally:
            shares = [opened[first::_CLOSERS] for first in range(min(_CLOSERS, len(opened)))]
            list(self._closers.map(_close_all, shares))


def write_new(path: Path, content: bytes, *, synced: bool) -> None:
    """Write a new small file; synced: it survives a power loss once its directory is synced, too."""
    with path.open("xb") as file:
        file.write(content)
        if synced:
            file.flush()
            os.fsync(file.fileno())


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
