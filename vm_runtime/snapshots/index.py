"""The store's index: which snapshots there are, in SQLite, so that listing two hundred reads one file.

A cache of the manifests and nothing more: it is thrown away and made again whenever it cannot be trusted.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from vm_runtime.snapshots.errors import StoreFullError
from vm_runtime.snapshots.manifest import Manifest

_SCHEMA_VERSION = 1
_SCHEMA = f"""
    CREATE TABLE snapshot (
        id TEXT PRIMARY KEY, name TEXT, owner TEXT NOT NULL, sandbox_id TEXT, created_at TEXT NOT NULL,
        manifest BLOB NOT NULL
    ) STRICT;
    CREATE INDEX snapshot_by_sandbox ON snapshot (sandbox_id, created_at);
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
        rows = [(m.id, m.name, m.owner, m.sandbox_id, m.created_at.isoformat(), m.to_json()) for m in manifests]
        try:
            with self._lock, self._transaction():
                self._connection.executemany("INSERT OR IGNORE INTO snapshot VALUES (?, ?, ?, ?, ?, ?)", rows)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                raise StoreFullError(f"No room left for the index {self._path}; free some, then try again.") from error
            raise

    def remove(self, ids: Iterable[str]) -> None:
        with self._lock, self._transaction():
            self._connection.executemany("DELETE FROM snapshot WHERE id = ?", [(id_,) for id_ in ids])

    def manifests(self, *, sandbox_id: str | None, owner: str | None, name: str | None) -> list[Manifest]:
        """Manifests that match everything given, oldest first."""
        query = "SELECT manifest FROM snapshot WHERE 1"
        values: list[str] = []
        for column, value in (("sandbox_id", sandbox_id), ("owner", owner), ("name", name)):
            if value is not None:
                query += f" AND {column} = ?"
                values.append(value)
        with self._lock:
            rows = self._connection.execute(query + " ORDER BY created_at, id", values).fetchall()
        return [Manifest.parse(row[0]) for row in rows]

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
