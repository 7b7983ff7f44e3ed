"""Machines and the snapshot store together, on every driver: a tiny guest counts in memory; its disk is written from
outside, by the VMM itself (QEMU's `qemu-io`)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from tests.conformance.conftest import Bench, beat, read_word
from vm_runtime.drivers.qemu import pvh
from vm_runtime.drivers.qemu.machine import QemuMachine
from vm_runtime.saving.machine import SavedMachine
from vm_runtime.saving.saver import Saver
from vm_runtime.saving.values import Description, Then
from vm_runtime.snapshots.manifest import Manifest
from vm_runtime.snapshots.store import SnapshotStore
from vm_runtime.states import RunState


@dataclass
class Place:
    """A bench with a store and a saver."""

    bench: Bench
    store: SnapshotStore
    saver: Saver

    async def template(self) -> Manifest:
        machine = await self.bench.boot()
        try:
            await beat(machine)
            return await self.saver.freeze(machine, describe(None))
        finally:
            await machine.kill()

    async def restore(self, manifest: Manifest, name: str = "clone") -> SavedMachine:
        return await self.saver.restore(manifest, place=self.bench.place(name))


def describe(sandbox_id: str | None = "s1", *, name: str | None = None) -> Description:
    return Description(
        owner="someone",
        name=name,
        sandbox_id=sandbox_id,
        template="tiny",
        image_digest="0" * 64,
        kernel=None,
        wire_marker="0" * 32,
    )


def qemu(saved: SavedMachine) -> QemuMachine:
    assert isinstance(saved.machine, QemuMachine)
    return saved.machine


async def disk_io(saved: SavedMachine, command: str) -> str:
    """Read or write the machine's disk behind the guest's back; answers what qemu-io prints."""
    machine = qemu(saved)
    # The writable disk is the last device on the command line.
    devices = [block["qdev"] for block in await machine._execute("query-block")]
    before = len(machine._stderr.data())
    line = f'qemu-io -d {devices[-1]} "{command}"'
    answer = str(await machine._execute("human-monitor-command", {"command-line": line}))
    assert answer == "", answer
    async with asyncio.timeout(10):
        while not (printed := machine._stderr.data()[before:].decode()).endswith("ops/sec)\n"):
            await machine._stderr.wait_more(machine._watcher)
    return printed


async def assert_disk(saved: SavedMachine, byte: int, offset: str) -> None:
    answer = await disk_io(saved, f"read -P {byte} {offset} 64k")
    assert "verification failed" not in answer and "65536" in answer, answer


@pytest.fixture
async def place(bench: Bench) -> AsyncIterator[Place]:
    store = SnapshotStore(bench.directory / "snapshots")
    saver = Saver(store=store, driver=bench.driver, image_files=lambda digest: bench.spec.image)
    try:
        yield Place(bench=bench, store=store, saver=saver)
    finally:
        await saver.close()
        store.close()


async def test_a_checkpoint_of_a_clone_is_restored_with_memory_and_disk(place: Place) -> None:
    template = await place.template()
    assert template.memory.layers == ()
    parent = await place.restore(template, "first")
    child = None
    try:
        await beat(qemu(parent))
        await disk_io(parent, "write -P 0x11 1M 64k")
        taken = await parent.take(describe(name="one"), then=Then.RESUME)
        counted = read_word(qemu(parent), pvh.COUNTER_ADDRESS)
        await disk_io(parent, "write -P 0x22 1M 64k")
        assert parent.machine.state is RunState.RUNNING
        assert taken.manifest.parents == (template.id,)
        assert len(taken.manifest.memory.layers) == 1
        assert [disk.format for disk in taken.manifest.disks] == ["raw", "qcow2"]
        assert place.store.verify(taken.manifest.id) == []

        child = await place.restore(taken.manifest, "second")
        assert read_word(qemu(child), pvh.COUNTER_ADDRESS) > 0
        await beat(qemu(child))
        await assert_disk(child, 0x11, "1M")
        await assert_disk(parent, 0x22, "1M")
        assert counted
    finally:
        await parent.kill()
        if child is not None:
            await child.kill()
    assert place.store.pins() == {}
    assert not place.bench.place("first").disk_dir.exists()
    assert not place.bench.place("first").run_dir.exists()


async def test_sleep_and_wake_keep_the_state_and_the_chain_grows_only_with_the_disk(place: Place) -> None:
    manifest = await place.template()
    counted = 0
    for round_number in range(4):
        saved = await place.restore(manifest)
        await beat(qemu(saved))
        await saved.machine.pause()
        assert read_word(qemu(saved), pvh.COUNTER_ADDRESS) > counted
        if round_number == 1:
            await disk_io(saved, "write -P 0x33 2M 64k")
        await saved.machine.resume()
        manifest = (await saved.take(describe(), then=Then.STOP)).manifest
        assert saved.machine.state is RunState.PAUSED
        counted = read_word(qemu(saved), pvh.COUNTER_ADDRESS)
        await saved.kill()
    assert len(manifest.disks) == 2
    assert len(manifest.memory.layers) == 4
    saved = await place.restore(manifest)
    try:
        await assert_disk(saved, 0x33, "2M")
    finally:
        await saved.kill()
