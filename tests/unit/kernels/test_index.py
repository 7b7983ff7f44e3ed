"""The index: every format that was ever written can be read, and times are judged by clocks that nobody sets."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from kernels.errors import KernelsError
from kernels.events import EventBus
from kernels.index import FORMAT_VERSION, Index
from kernels.registry import Registry
from tests.unit.kernels.conftest import Service

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION + 1))
def test_each_format_is_read_and_becomes_the_newest(tmp_path: Path, version: int) -> None:
    path = tmp_path / "index.sqlite"
    with closing(sqlite3.connect(path)) as db:
        db.executescript((GOLDEN / f"index-{version}.sql").read_text())
    with closing(Index(path)) as index:
        asleep, running = index.all()
        assert (asleep.sandbox.state, asleep.sandbox.notebook, asleep.env) == ("asleep", "a.ipynb", {"A": "1"})
        assert (running.sandbox.parent_id, running.machine_id, running.depth) == (asleep.sandbox.id, "0123456789ab", 1)
        assert len(index.ancestors()) == min(version - 1, 1)
        assert (asleep.resumes, running.sandbox.crashes) == ((True, 2) if version >= 3 else (False, 0))
        index.put(running)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (FORMAT_VERSION,)
        db.execute(f"PRAGMA user_version={FORMAT_VERSION + 1}")
    with pytest.raises(KernelsError, match=f"format {FORMAT_VERSION + 1}"):
        Index(path)


@pytest.mark.parametrize("jump", [timedelta(hours=2), timedelta(hours=-2)])
async def test_a_wall_clock_that_is_set_ends_nothing(service: Service, jump: timedelta) -> None:
    """As if it had been set by `jump` after the sandbox was made; the gateway may be started anew then."""
    then = datetime.now(UTC) - jump
    service.add("a", max_lifetime_s=3600.0, idle_timeout_s=3600.0, created_at=then, last_activity=then)
    again = Registry(service.registry._index, EventBus())
    again.load()
    for registry in (service.registry, again):
        assert 0 <= registry.age_s("a") < 600
    assert 0 <= service.registry.idle_s("a") < 600


async def test_after_a_boot_of_the_host_its_wall_clock_counts_once(service: Service) -> None:
    service.add("a", created_at=datetime.now(UTC) - timedelta(hours=2))
    registry = service.registry
    registry.update("a", boot_id="an earlier one")
    registry.load()
    assert 7200 <= registry.age_s("a") < 7800
