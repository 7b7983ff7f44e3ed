"""Jupyter's sessions: which notebook or console belongs to which kernel. Kept in SQLite, so they survive a restart.

Knows nothing of kernels but their ids. Calls take well under a millisecond (one small row, WAL, no fsync per write), so
they run on the event loop.
"""

from __future__ import annotations

import sqlite3
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

from gateway.errors import StartError

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Session:
    """path: the document's, or a unique id for what has none. type: notebook, console, ..."""

    id: str
    path: str
    name: str | None
    type: str
    kernel_id: str


class SessionStore:
    """`SessionStore(path)` opens or creates it; `close()` ends it. Errors: StartError for a foreign file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.row_factory = sqlite3.Row
        try:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version not in (0, FORMAT_VERSION):
                raise StartError(
                    f"{path} has format {version}, this version writes {FORMAT_VERSION}. Use another --state-dir."
                )
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS sessions "
                "(id TEXT PRIMARY KEY, path TEXT NOT NULL, name TEXT, type TEXT NOT NULL, kernel_id TEXT NOT NULL)"
            )
            self._db.execute(f"PRAGMA user_version={FORMAT_VERSION}")
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise StartError(
                f"{path} is not a Hypercell gateway file ({error}). Move it away to start anew."
            ) from error
        except StartError:
            self._db.close()
            raise

    def add(self, *, path: str, name: str | None, type: str, kernel_id: str) -> Session:
        """A new session."""
        session = Session(id=str(uuid.uuid4()), path=path, name=name, type=type, kernel_id=kernel_id)
        self.put(session)
        return session

    def put(self, session: Session) -> None:
        """Inserts or replaces it."""
        self._db.execute(
            "INSERT INTO sessions VALUES (:id, :path, :name, :type, :kernel_id) ON CONFLICT (id) DO UPDATE "
            "SET path = excluded.path, name = excluded.name, type = excluded.type, kernel_id = excluded.kernel_id",
            asdict(session),
        )

    def get(self, session_id: str) -> Session | None:
        return self._one("id", session_id)

    def by_path(self, path: str) -> Session | None:
        """The oldest session of this path."""
        return self._one("path", path)

    def _one(self, column: str, value: str) -> Session | None:
        query = f"SELECT * FROM sessions WHERE {column} = ? ORDER BY rowid LIMIT 1"
        row = self._db.execute(query, (value,)).fetchone()
        return Session(**row) if row else None

    def all(self) -> list[Session]:
        """Oldest first."""
        return [Session(**row) for row in self._db.execute("SELECT * FROM sessions ORDER BY rowid")]

    def remove(self, session_id: str) -> None:
        """Unknown ids are fine."""
        self._db.execute("DELETE FROM sessions WHERE id = ?", (session_id,))

    def remove_kernel(self, kernel_id: str) -> None:
        """Forgets the sessions of a kernel that no longer exists."""
        self._db.execute("DELETE FROM sessions WHERE kernel_id = ?", (kernel_id,))

    def close(self) -> None:
        self._db.close()
