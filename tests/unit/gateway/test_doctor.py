"""`hypercelld doctor` names the sandboxes whose chains could not be shortened."""

from __future__ import annotations

from pathlib import Path

from gateway.doctor import examine
from tests.unit.paged.chained import publish
from vm_runtime.snapshots.store import SnapshotStore


async def test_long_chains_are_a_problem(tmp_path: Path) -> None:
    with SnapshotStore(tmp_path / "snapshots") as store:
        publish(store, layers=2, disks=3)
    report = await examine(tmp_path, driver="fake")
    assert (report.chains.layers, report.chains.disks) == (2, 3)
    assert not any("not merged" in problem.what for problem in report.problems)
    with SnapshotStore(tmp_path / "snapshots") as store:
        publish(store, layers=30, disks=3)
    report = await examine(tmp_path, driver="fake")
    assert report.chains.layers == 30
    (problem,) = [problem for problem in report.problems if "not merged" in problem.what]
    assert "s1 lies on 30" in problem.what
    assert not problem.blocking
