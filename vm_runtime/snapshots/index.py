"""The store's index, in SQLite: which snapshots there are, which parts each of them needs, and what is pinned.

All of it can be read again from the store's files, and is when it is lost. A change of the store happens within
`exclusive`, SQLite's write transaction, which excludes other threads and processes; it is held for milliseconds.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from vm_runtime.files import opened
from vm_runtime.snapshots.digests import FileIdentity
from vm_runtime.snapshots.directory import PartKey
from vm_runtime.snapshots.errors import StoreFullError, StoreIndexError
from vm_runtime.snapshots.manifest import Manifest, PartKind

SCHEMA_VERSION = 3
# number: of a snapshot never given again, so that "newer than" can be asked. parent: the first of the manifest's.
# added_bytes: of the parts that no older snapshot had. inode to ctime_ns: of the file whose content was last seen to
# have the part's digest. pinned_*: by user; a draft's own pins begin with a dot.
SCHEMA = f"""
    CREATE TABLE snapshot (
        number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, name TEXT, owner TEXT NOT NULL,
        sandbox_id TEXT, created_at TEXT NOT NULL, template TEXT NOT NULL, image_digest TEXT NOT NULL, parent TEXT,
        kernel_state TEXT, execution_count INTEGER, layers INTEGER NOT NULL, added_bytes INTEGER NOT NULL,
        flattened_from TEXT
    ) STRICT;
    CREATE INDEX snapshot_by_sandbox ON snapshot (sandbox_id, created_at);
    CREATE INDEX snapshot_by_origin ON snapshot (flattened_from);
    CREATE TABLE part (
        number INTEGER PRIMARY KEY, kind TEXT NOT NULL, digest TEXT NOT NULL, stored_bytes INTEGER NOT NULL,
        inode INTEGER, size_bytes INTEGER, mtime_ns INTEGER, ctime_ns INTEGER, UNIQUE (kind, digest)
    ) STRICT;
    CREATE TABLE snapshot_part (
        snapshot INTEGER NOT NULL REFERENCES snapshot ON DELETE CASCADE, part INTEGER NOT NULL REFERENCES part,
        PRIMARY KEY (snapshot, part)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX snapshot_by_part ON snapshot_part (part);
    CREATE TABLE pinned_snapshot (
        user TEXT NOT NULL, id TEXT NOT NULL, PRIMARY KEY (user, id)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX user_by_snapshot ON pinned_snapshot (id);
    CREATE TABLE pinned_part (
        user TEXT NOT NULL, part INTEGER NOT NULL REFERENCES part, PRIMARY KEY (user, part)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX user_by_part ON pinned_part (part);
    PRAGMA user_version = {SCHEMA_VERSION};
"""
# What is removed, or might be, while one statement looks at it.
_TEMPORARY = "CREATE TEMPORARY TABLE doomed (snapshot INTEGER PRIMARY KEY, position INTEGER NOT NULL) STRICT"

# Another process (a command beside the gateway) holds the index for milliseconds only.
_BUSY_TIMEOUT_S = 10.0
# What SQLite's log grows to before it is used again from its beginning (1,000 pages). It is reserved ahead, so that
# on a full disk, too, snapshots can be removed.
_LOG_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class SnapshotEntry:
    """What lists show of a snapshot.

    parent: the snapshot it came from.
    kernel_state, execution_count: of the kernel when it was taken.
    layers: how many.
    added_bytes: disk space of the parts that it brought into the store.
    """

    id: str
    name: str | None
    owner: str
    sandbox_id: str | None
    created_at: datetime
    template: str
    image_digest: str
    parent: str | None
    kernel_state: str | None
    execution_count: int | None
    layers: int
    added_bytes: int


class Index:
    """Open index of one store; safe to use from several threads and processes. Close it.

    sole: no other process has this store open, so a file that is missing or cannot be used is made again.
    Every method raises StoreFullError, and StoreIndexError if SQLite fails.
    """

    def __init__(self, path: Path, *, sole: bool) -> None:
        self._path = path
        self._lock = threading.RLock()
        try:
            if not sole and not path.exists():
                raise sqlite3.DatabaseError("it is missing while another process has the store open")
            self._connection = self._open(sole=sole)
        except sqlite3.DatabaseError as error:
            if not sole or _code(error) in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_BUSY):
                raise self._translated(error) from error
            for suffix in ("", "-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            with self._access():
                self._connection = self._open(sole=True)

    def _open(self, *, sole: bool) -> sqlite3.Connection:
        if not self._path.exists():  # else closing it would end SQLite's locks on it, if this process has it open
            self._path.touch(mode=0o600)
        connection = sqlite3.connect(self._path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA temp_store = MEMORY")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version == 0:
                connection.executescript("BEGIN;" + SCHEMA + "COMMIT;")
            elif version != SCHEMA_VERSION:
                raise sqlite3.DatabaseError(f"it has version {version} instead of {SCHEMA_VERSION}")
            if sole:
                (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
                if found != "ok":
                    raise sqlite3.DatabaseError(found)
                self._reserve_log()
            connection.execute(_TEMPORARY)
        except BaseException:
            connection.close()
            raise
        return connection

    def _reserve_log(self) -> None:
        log = self._path.with_name(self._path.name + "-wal")
        # No room, or not that kind of file system: then without.
        with contextlib.suppress(OSError), opened(log, os.O_RDWR) as fd:
            os.posix_fallocate(fd, 0, _LOG_BYTES)

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Within it nobody else changes the store; what was written to the index is kept if the block succeeds."""
        with self._access():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    # Snapshots

    def ids(self) -> set[str]:
        with self._access():
            return {id_ for (id_,) in self._connection.execute("SELECT id FROM snapshot")}

    def add(self, manifest: Manifest, stored_bytes: Sequence[int]) -> None:
        """Note a snapshot, if it is not there. stored_bytes: disk space of each of its parts. Within `exclusive`."""
        parts = [
            (self._part(kind, part.digest, size), size)
            for (kind, part), size in zip(manifest.parts(), stored_bytes, strict=True)
        ]
        seen = "SELECT EXISTS (SELECT 1 FROM snapshot_part WHERE part = ?)"
        added_bytes = sum(size for number, size in parts if not self._one(seen, number))
        kernel = manifest.kernel
        inserted = self._connection.execute(
            "INSERT OR IGNORE INTO snapshot (id, name, owner, sandbox_id, created_at, template, image_digest, parent,"
            " kernel_state, execution_count, layers, added_bytes, flattened_from)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING number",
            (
                manifest.id,
                manifest.name,
                manifest.owner,
                manifest.sandbox_id,
                manifest.created_at.astimezone(UTC).isoformat(timespec="microseconds"),
                manifest.template,
                manifest.image_digest,
                manifest.parents[0] if manifest.parents else None,
                kernel and kernel.state,
                kernel and kernel.execution_count,
                len(manifest.state.of_kind(PartKind.LAYER)),
                added_bytes,
                manifest.flattened_from,
            ),
        ).fetchone()
        if inserted is not None:
            rows = [(inserted[0], number) for number, _ in parts]
            self._connection.executemany("INSERT INTO snapshot_part VALUES (?, ?)", rows)

    def remove(self, ids: Iterable[str]) -> list[PartKey]:
        """Forget snapshots; answers the parts that they needed. Within `exclusive`."""
        self._connection.execute("DELETE FROM doomed")
        self._connection.executemany(
            "INSERT OR IGNORE INTO doomed SELECT number, 0 FROM snapshot WHERE id = ?", [(id_,) for id_ in ids]
        )
        parts = self._parts(
            "SELECT kind, digest FROM part WHERE number IN"
            " (SELECT part FROM snapshot_part WHERE snapshot IN (SELECT snapshot FROM doomed))"
        )
        self._connection.execute("DELETE FROM snapshot WHERE number IN (SELECT snapshot FROM doomed)")
        return parts

    def entries(
        self,
        *,
        id: str | None = None,
        sandbox_id: str | None = None,
        owner: str | None = None,
        name: str | None = None,
    ) -> list[SnapshotEntry]:
        """The snapshots that match everything given, oldest first, without flattened forms of others."""
        columns = SnapshotEntry.__dataclass_fields__.keys()
        query = f"SELECT {', '.join(columns)} FROM snapshot WHERE flattened_from IS NULL"
        values: list[str] = []
        for column, value in (("id", id), ("sandbox_id", sandbox_id), ("owner", owner), ("name", name)):
            if value is not None:
                query += f" AND {column} = ?"
                values.append(value)
        with self._access():
            rows = self._connection.execute(query + " ORDER BY created_at, id", values).fetchall()
        named = (dict(zip(columns, row, strict=True)) for row in rows)
        return [SnapshotEntry(**row | {"created_at": datetime.fromisoformat(row["created_at"])}) for row in named]

    def flattened(self, snapshot_id: str) -> list[str]:
        """The flattened forms of a snapshot, newest first."""
        query = "SELECT id FROM snapshot WHERE flattened_from = ? ORDER BY number DESC"
        with self._access():
            return [id_ for (id_,) in self._connection.execute(query, (snapshot_id,))]

    def sandboxes_since(self, number: int) -> tuple[set[str], int]:
        """Whose snapshots, flattened forms too, came after the one with this number; and the newest number."""
        query = "SELECT number, sandbox_id FROM snapshot WHERE number > ?"
        with self._access():
            rows = self._connection.execute(query, (number,)).fetchall()
        found = {sandbox_id for _, sandbox_id in rows if sandbox_id is not None}
        return found, max((row[0] for row in rows), default=number)

    # Pins

    def pin(self, user: str, *, snapshots: Iterable[str] = (), parts: Iterable[PartKey] = ()) -> list[PartKey]:
        """Let a user need these and nothing else; answers the parts that it needed before. Within `exclusive`."""
        before = self._parts("SELECT kind, digest FROM pinned_part JOIN part ON part = number WHERE user = ?", user)
        for table in ("pinned_snapshot", "pinned_part"):
            self._connection.execute(f"DELETE FROM {table} WHERE user = ?", (user,))
        self._connection.executemany("INSERT INTO pinned_snapshot VALUES (?, ?)", [(user, id_) for id_ in snapshots])
        rows = [(user, self._part(kind, digest)) for kind, digest in dict.fromkeys(parts)]
        self._connection.executemany("INSERT INTO pinned_part VALUES (?, ?)", rows)
        return before

    def pins(self) -> dict[str, tuple[set[str], set[PartKey]]]:
        """The snapshots and parts that each user needs, drafts too."""
        found: dict[str, tuple[set[str], set[PartKey]]] = {}
        with self._access():
            for user, id_ in self._connection.execute("SELECT user, id FROM pinned_snapshot"):
                found.setdefault(user, (set(), set()))[0].add(id_)
            query = "SELECT user, kind, digest FROM pinned_part JOIN part ON part = number"
            for user, kind, digest in self._connection.execute(query):
                found.setdefault(user, (set(), set()))[1].add((PartKind(kind), digest))
        return found

    def users(self, snapshot_id: str) -> list[str]:
        """Who has pinned a snapshot."""
        query = "SELECT user FROM pinned_snapshot WHERE id = ? ORDER BY user"
        with self._access():
            return [user for (user,) in self._connection.execute(query, (snapshot_id,))]

    # Parts

    def needed(self) -> set[PartKey]:
        """The parts that a snapshot or a user needs."""
        with self._access():
            return set(
                self._parts(
                    "SELECT kind, digest FROM part WHERE EXISTS (SELECT 1 FROM snapshot_part WHERE part = number)"
                    " OR EXISTS (SELECT 1 FROM pinned_part WHERE part = number)"
                )
            )

    def forget_unneeded(self, parts: Iterable[PartKey]) -> list[PartKey]:
        """Those of these parts that no snapshot and no user needs; they are forgotten. Within `exclusive`."""
        forgotten: list[PartKey] = []
        known = "SELECT EXISTS (SELECT 1 FROM part WHERE kind = ? AND digest = ?)"
        for kind, digest in parts:
            deleted = self._connection.execute(
                "DELETE FROM part WHERE kind = ? AND digest = ?"
                " AND NOT EXISTS (SELECT 1 FROM snapshot_part WHERE part = number)"
                " AND NOT EXISTS (SELECT 1 FROM pinned_part WHERE part = number)",
                (kind, digest),
            )
            if deleted.rowcount or not self._one(known, kind, digest):
                forgotten.append((kind, digest))
        return forgotten

    def freed_bytes(self, ids: Sequence[str]) -> list[int]:
        """How many bytes of parts go with the first of these snapshots, with the first two, and so on.

        Each is counted with its flattened forms. Those that are pinned stay, and what they need.
        """
        with self._access():
            self._connection.execute("DELETE FROM doomed")
            self._connection.executemany(
                "INSERT OR IGNORE INTO doomed SELECT number, ?1 FROM snapshot WHERE (id = ?2 OR flattened_from = ?2)"
                " AND NOT EXISTS (SELECT 1 FROM pinned_snapshot WHERE id = ?2)",
                list(enumerate(ids)),
            )
            # CROSS: in this order, or SQLite looks at all snapshots there are.
            rows = self._connection.execute(
                "SELECT max(position), stored_bytes FROM doomed"
                " CROSS JOIN snapshot_part AS mine ON mine.snapshot = doomed.snapshot JOIN part ON number = mine.part"
                " WHERE NOT EXISTS (SELECT 1 FROM pinned_part WHERE part = number)"
                " GROUP BY number HAVING NOT EXISTS (SELECT 1 FROM snapshot_part AS other WHERE other.part = number"
                " AND other.snapshot NOT IN (SELECT snapshot FROM doomed))"
            ).fetchall()
        freed = [0] * len(ids)
        for position, stored_bytes in rows:
            freed[position] += stored_bytes
        return list(itertools.accumulate(freed))

    # Checked files

    def checked(self, kind: PartKind, digest: str) -> FileIdentity | None:
        """The file of which it was last seen that its content has this digest."""
        query = "SELECT inode, size_bytes, mtime_ns, ctime_ns FROM part WHERE kind = ? AND digest = ?"
        with self._access():
            row = self._connection.execute(query, (kind, digest)).fetchone()
        if row is None or row[0] is None:
            return None
        return FileIdentity(inode=row[0], size_bytes=row[1], mtime_ns=row[2], ctime_ns=row[3])

    def note_checked(self, kind: PartKind, digest: str, file: FileIdentity) -> None:
        """Remember a file whose content has just been seen to have its digest."""
        query = "UPDATE part SET (inode, size_bytes, mtime_ns, ctime_ns) = (?, ?, ?, ?) WHERE number = ?"
        with self.exclusive():
            number = self._part(kind, digest)
            self._connection.execute(query, (file.inode, file.size_bytes, file.mtime_ns, file.ctime_ns, number))

    # Inside

    def _part(self, kind: PartKind, digest: str, stored_bytes: int = 0) -> int:
        """The number of a part, which is noted if it is not there."""
        return self._one(
            "INSERT INTO part (kind, digest, stored_bytes) VALUES (?, ?, ?) ON CONFLICT"
            " DO UPDATE SET stored_bytes = max(stored_bytes, excluded.stored_bytes) RETURNING number",
            kind,
            digest,
            stored_bytes,
        )

    def _parts(self, query: str, *values: str) -> list[PartKey]:
        return [(PartKind(kind), digest) for kind, digest in self._connection.execute(query, values)]

    def _one(self, query: str, *values: str | int) -> int:
        row: tuple[int] = self._connection.execute(query, values).fetchone()
        return row[0]

    @contextlib.contextmanager
    def _access(self) -> Iterator[None]:
        with self._lock:
            try:
                yield
            except sqlite3.DatabaseError as error:
                if isinstance(error, sqlite3.ProgrammingError | sqlite3.IntegrityError):
                    raise
                raise self._translated(error) from error

    def _translated(self, error: sqlite3.DatabaseError) -> StoreFullError | StoreIndexError:
        if _code(error) == sqlite3.SQLITE_FULL:
            return StoreFullError(f"No room left for the index {self._path}; free some, then try again.")
        return StoreIndexError(
            f"The index {self._path} cannot be used: {error}. It is made again from the snapshots when the store is "
            "opened by a single process: end the others (gateway, commands) and start again."
        )


def _code(error: sqlite3.DatabaseError) -> int | None:
    """SQLite's primary result code; None if the error is not SQLite's own."""
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF
