"""Flattening, with a real store and the real `qemu-img`: memory and disks each for itself; what becomes of failures."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.unit.paged.chained import publish
from vm_runtime.confinement.host import find_confinement
from vm_runtime.confinement.process import Spawner
from vm_runtime.drivers.base import Failure, Shorter
from vm_runtime.drivers.qemu import disk_merge
from vm_runtime.paged import flattening
from vm_runtime.paged.backing import BackingChain
from vm_runtime.paged.bases import Bases
from vm_runtime.paged.chains import LONG_CHAIN, MANY_DISKS
from vm_runtime.paged.flattening import Flattener
from vm_runtime.snapshots.manifest import Manifest, PartKind
from vm_runtime.snapshots.memory import PAGE_SIZE
from vm_runtime.snapshots.store import SnapshotStore

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-utils is not installed")


@dataclass
class Bench:
    store: SnapshotStore
    flattener: Flattener
    shortened: list[Shorter] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    store = SnapshotStore(tmp_path / "store")
    spawner = Spawner()
    host = await find_confinement(spawner, devices=())

    async def merge_disks(overlays: object, target: Path) -> None:
        await disk_merge.merge_overlays(overlays, target, spawner=spawner, host=host)  # type: ignore[arg-type]

    async def on_shortened(shortened: Shorter) -> None:
        made.shortened.append(shortened)

    bases = Bases(store, seal=False)
    flattener = Flattener(
        store,
        bases,
        merge_disks=merge_disks,
        on_shortened=on_shortened,
        on_failed=lambda failure: made.failed.append(failure),
    )
    made = Bench(store=store, flattener=flattener)
    try:
        yield made
    finally:
        await flattener.close()
        bases.close()
        await spawner.close()
        store.close()


async def until_failed(bench: Bench, count: int) -> None:
    async with asyncio.timeout(60):
        while len(bench.failed) < count:
            await bench.flattener.settled()
            await asyncio.sleep(0.01)


async def test_memory_and_disks_get_shorter_forms(bench: Bench) -> None:
    manifest = publish(bench.store, layers=LONG_CHAIN, disks=MANY_DISKS)
    bench.flattener.want(manifest, stopped=False)
    await bench.flattener.settled()
    flat = bench.store.flattened(manifest.id)
    assert flat is not None
    assert _lengths(flat) == (1, 2)
    assert bench.store.verify(flat.id) == []
    assert bench.shortened[-1](manifest.state) == flat.state
    status = bench.flattener.status()
    assert (status.waiting, status.failures, status.failing) == (0, 0, ())
    assert status.merged_bytes > 0


async def test_disks_that_cannot_be_merged_do_not_keep_memory_long_and_are_tried_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flattening, "RETRY_S", (0.05,))
    monkeypatch.setattr(disk_merge, "PROGRAM", "qemu-img-that-is-not-installed")
    manifest = publish(bench.store, layers=LONG_CHAIN, disks=MANY_DISKS)
    bench.flattener.want(manifest, stopped=False)
    await until_failed(bench, 2)
    flat = bench.store.flattened(manifest.id)
    assert flat is not None
    assert _lengths(flat) == (1, MANY_DISKS)
    (failing,) = bench.flattener.status().failing
    assert "not installed" in failing.reason
    assert (failing.snapshot_id, failing.sandbox_id) == (manifest.id, "s1")
    # A later snapshot of the sandbox does not make it try sooner, nor forget that it failed.
    attempts = bench.flattener.status().failures
    bench.flattener.want(manifest, stopped=False)
    assert bench.flattener.status().failing
    assert attempts >= 2
    monkeypatch.setattr(disk_merge, "PROGRAM", "qemu-img")
    await bench.flattener.hurried(limit_s=20)
    flat = bench.store.flattened(manifest.id)
    assert flat is not None
    assert _lengths(flat) == (1, 2)
    assert bench.flattener.status().failing == ()


async def test_memory_that_cannot_be_merged_does_not_keep_disks_long(bench: Bench) -> None:
    manifest = publish(bench.store, layers=LONG_CHAIN, disks=MANY_DISKS)
    bench.store.part_path(PartKind.LAYER, manifest.state.of_kind(PartKind.LAYER)[0].digest).write_bytes(
        bytes(2 * PAGE_SIZE)
    )
    bench.flattener.want(manifest, stopped=False)
    await bench.flattener.settled()
    flat = bench.store.flattened(manifest.id)
    assert flat is not None
    assert _lengths(flat) == (LONG_CHAIN, 2)
    assert len(bench.failed) == 1


async def test_what_was_removed_is_no_failure(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    manifest = publish(bench.store, layers=LONG_CHAIN, disks=MANY_DISKS)
    bench.store.rm(manifest.id)
    bench.flattener.want(manifest, stopped=False)
    await bench.flattener.settled()
    assert bench.failed == []
    assert bench.flattener.status().waiting == 0
    assert caplog.records == []


async def test_snapshots_that_are_being_taken_all_the_time_do_not_stop_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flattening, "PATIENCE_S", 0.1)
    manifest = publish(bench.store, layers=LONG_CHAIN, disks=MANY_DISKS)
    with bench.flattener.quiet():
        bench.flattener.want(manifest, stopped=False)
        async with asyncio.timeout(60):
            await bench.flattener.settled()
    assert bench.store.flattened(manifest.id) is not None


async def test_it_gives_up_when_it_is_closed(bench: Bench) -> None:
    manifest = publish(bench.store, layers=LONG_CHAIN, disks=MANY_DISKS)
    with bench.flattener.quiet():
        bench.flattener.want(manifest, stopped=False)
        await bench.flattener.close()
    assert bench.store.flattened(manifest.id) is None
    assert list((bench.store.directory / "drafts").iterdir()) == []


def _lengths(manifest: Manifest) -> tuple[int, int]:
    """Of its chains of layers and of disks."""
    backing = BackingChain.of(manifest.state)
    return len(backing.layers), len(backing.disks)
