"""The store's index: which snapshots there are, in SQLite, so that listing two hundred reads one file.

A cache of the manifests and nothing more: it is thrown away and made again whenever it cannot be trusted.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from vm_runtime.snapshots.digests import FileIdentity
from vm_runtime.snapshots.errors import StoreFullError
from vm_runtime.snapshots.manifest import Manifest, PartKind

_SCHEMA_VERSION = 2
_SCHEMA = f"""
    CREATE TABLE snapshot (
        id TEXT PRIMARY KEY, name TEXT, owner TEXT NOT NULL, sandbox_id TEXT, created_at TEXT NOT NULL,
        flattened_from TEXT, manifest BLOB NOT NULL
    ) STRICT;
    CREATE INDEX snapshot_by_sandbox ON snapshot (sandbox_id, created_at);
    CREATE INDEX snapshot_by_origin ON snapshot (flattened_from);
    CREATE TABLE checked (
        kind TEXT NOT NULL, digest TEXT NOT NULL, inode INTEGER NOT NULL, size_bytes INTEGER NOT NULL,
        mtime_ns INTEGER NOT NULL, ctime_ns INTEGER NOT NULL, PRIMARY KEY (kind, digest)
    ) STRICT, WITHOUT ROWID;
    PRAGMA user_version = {_SCHEMA_VERSION};
"""

# Another process (a command beside the gateway) holds the index for milliseconds only.
_BUSY_TIMEOUT_S = 10.0


class Index:
    """Open index of one store; safe to use from several threads and processes. Close it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            self._connection = self._open()
        except sqlite3.DatabaseError:
            # Damaged, or written by another version: what it says can be read from the manifests again.
            for suffix in ("", "-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            self._connection = self._open()

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version == 0:
                connection.executescript("BEGIN;" + _SCHEMA + "COMMIT;")
            elif version != _SCHEMA_VERSION:
                raise sqlite3.DatabaseError(f"index version {version}")
            connection.execute("SELECT count(*) FROM snapshot")
        except BaseException:
            connection.close()
            raise
        return connection

    def ids(self) -> set[str]:
        with self._lock:
            return {row[0] for row in self._connection.execute("SELECT id FROM snapshot")}

    def add(self, manifests: Iterable[Manifest]) -> None:
        """Note manifests; those that are there already stay. Raises StoreFullError."""
        rows = [
            (m.id, m.name, m.owner, m.sandbox_id, m.created_at.isoformat(), m.flattened_from, m.to_json())
            for m in manifests
        ]
        try:
            with self._lock, self._transaction():
                self._connection.executemany("INSERT OR IGNORE INTO snapshot VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                raise StoreFullError(f"No room left for the index {self._path}; free some, then try again.") from error
            raise

    def remove(self, ids: Iterable[str]) -> None:
        with self._lock, self._transaction():
            self._connection.executemany("DELETE FROM snapshot WHERE id = ?", [(id_,) for id_ in ids])

    def manifests(self, *, sandbox_id: str | None, owner: str | None, name: str | None) -> list[Manifest]:
        """Manifests that match everything given, oldest first, without flattened forms of others."""
        query = "SELECT manifest FROM snapshot WHERE flattened_from IS NULL"
        values: list[str] = []
        for column, value in (("sandbox_id", sandbox_id), ("owner", owner), ("name", name)):
            if value is not None:
                query += f" AND {column} = ?"
                values.append(value)
        with self._lock:
            rows = self._connection.execute(query + " ORDER BY created_at, id", values).fetchall()
        return [Manifest.parse(row[0]) for row in rows]

    def flattened(self, snapshot_id: str) -> list[Manifest]:
        """The flattened forms of a snapshot, newest first."""
        query = "SELECT manifest FROM snapshot WHERE flattened_from = ? ORDER BY created_at DESC, rowid DESC"
        with self._lock:
            rows = self._connection.execute(query, (snapshot_id,)).fetchall()
        return [Manifest.parse(row[0]) for row in rows]

    def checked(self, kind: PartKind, digest: str) -> FileIdentity | None:
        """The file of which it was last seen that its content has this digest."""
        query = "SELECT inode, size_bytes, mtime_ns, ctime_ns FROM checked WHERE kind = ? AND digest = ?"
        with self._lock:
            row = self._connection.execute(query, (kind, digest)).fetchone()
        if row is None:
            return None
        return FileIdentity(inode=row[0], size_bytes=row[1], mtime_ns=row[2], ctime_ns=row[3])

    def note_checked(self, files: Iterable[tuple[PartKind, str, FileIdentity]]) -> None:
        """Remember files whose content has just been seen to have their digests."""
        rows = [(kind, digest, f.inode, f.size_bytes, f.mtime_ns, f.ctime_ns) for kind, digest, f in files]
        with self._lock, self._transaction():
            self._connection.executemany("INSERT OR REPLACE INTO checked VALUES (?, ?, ?, ?, ?, ?)", rows)

    def forget_checked(self, files: Iterable[tuple[PartKind, str]]) -> None:
        with self._lock, self._transaction():
            self._connection.executemany("DELETE FROM checked WHERE kind = ? AND digest = ?", list(files))

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise
