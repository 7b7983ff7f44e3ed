"""The session store survives, and refuses what it did not write."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.errors import StartError
from gateway.sessions import SessionStore


def test_sessions_survive(tmp_path: Path) -> None:
    path = tmp_path / "state" / "gateway.sqlite"
    store = SessionStore(path)
    first = store.add(path="a.ipynb", name=None, type="notebook", kernel_id="k1")
    second = store.add(path="b.ipynb", name="b", type="console", kernel_id="k2")
    store.put(replace(first, path="c.ipynb"))
    store.close()
    store = SessionStore(path)
    assert store.all() == [replace(first, path="c.ipynb"), second]
    assert store.by_path("a.ipynb") is None
    assert store.by_path("b.ipynb") == second
    assert store.get(second.id) == second
    store.remove_kernel("k1")
    store.remove(second.id)
    store.remove("unknown")
    assert store.all() == []
    store.close()


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("no database, but long enough to be read as one " * 100)
    with pytest.raises(StartError, match="is not a Hypercell gateway file"):
        SessionStore(text)
    newer = tmp_path / "newer"
    database = sqlite3.connect(newer)
    database.execute("PRAGMA user_version=99")
    database.close()
    with pytest.raises(StartError, match="has format 99"):
        SessionStore(newer)
