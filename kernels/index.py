"""The index: one SQLite file that remembers every sandbox across restarts of the gateway.

Writes are single-row transactions in WAL mode: a killed gateway loses none that was committed. Knows nothing of
machines; what a record says is checked against the machines that still live when the service starts.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from kernels.errors import KernelsError
from kernels.models import Sandbox

# 1: without boot_id and born_s, which only later records need. 2: without resumes and a sandbox's crashes.
FORMAT_VERSION = 3


class SandboxRecord(BaseModel):
    """All that must be known of a sandbox to find it again. `sandbox` is what users see; the rest is the service's.

    machine_id: its machine ("" where there is none).
    key: the kernel's HMAC key.
    marker: what opens the next session on its wire (hex).
    env, cwd: as asked for.
    depth: generations of forks above it.
    resumes: it was put to sleep in the middle of something, by a gateway that stopped; the next one wakes it.
    boot_id, born_s: a boot of the host, and what its CLOCK_BOOTTIME was, or would have been, when the sandbox was made.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sandbox: Sandbox
    machine_id: str
    key: str
    marker: str
    env: dict[str, str]
    cwd: str | None
    depth: int = 0
    boot_id: str = ""
    born_s: float = 0.0
    resumes: bool = False


class Index:
    """`Index(path)` opens or creates it, `close()` ends it. Errors: KernelsError for a foreign file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(path, isolation_level=None)
        try:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if not 0 <= version <= FORMAT_VERSION:
                raise KernelsError(
                    f"{path} has format {version}, this version writes {FORMAT_VERSION}. Use another --state-dir."
                )
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS sandboxes (id TEXT PRIMARY KEY, state TEXT NOT NULL, record TEXT NOT NULL)"
            )
            self._db.execute("CREATE TABLE IF NOT EXISTS ancestors (id TEXT PRIMARY KEY, parent_id TEXT)")
            self._db.execute(f"PRAGMA user_version={FORMAT_VERSION}")
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise KernelsError(f"{path} is not a Hypercell index ({error}). Move it away to start anew.") from error

    def put(self, record: SandboxRecord) -> None:
        """Inserts or replaces one record."""
        self._db.execute(
            "INSERT OR REPLACE INTO sandboxes VALUES (?, ?, ?)",
            (record.sandbox.id, record.sandbox.state, record.model_dump_json()),
        )

    def remove(self, sandbox_id: str) -> None:
        """Forgets one record; unknown ids are fine."""
        self._db.execute("DELETE FROM sandboxes WHERE id = ?", (sandbox_id,))

    def put_ancestor(self, sandbox_id: str, parent_id: str | None) -> None:
        """Remembers the parent of a sandbox that is about to be removed and has descendants."""
        self._db.execute("INSERT OR REPLACE INTO ancestors VALUES (?, ?)", (sandbox_id, parent_id))

    def remove_ancestor(self, sandbox_id: str) -> None:
        """Unknown ids are fine."""
        self._db.execute("DELETE FROM ancestors WHERE id = ?", (sandbox_id,))

    def ancestors(self) -> dict[str, str | None]:
        """Parents of sandboxes that have been removed, by id."""
        return dict(self._db.execute("SELECT id, parent_id FROM ancestors"))

    def all(self) -> list[SandboxRecord]:
        """Every record, oldest first."""
        rows = self._db.execute("SELECT record FROM sandboxes ORDER BY rowid").fetchall()
        return [SandboxRecord.model_validate_json(row[0]) for row in rows]

    def close(self) -> None:
        self._db.close()
