"""Snapshots page by page, and disks: a tiny guest counts in memory; its disk is written from outside, by the VMM itself
(QEMU's `qemu-io`)."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pytest

from tests.conformance import pvh
from tests.conformance.conftest import Bench, beat, describe, qemu, read_word
from vm_runtime.drivers.qemu import disk_merge
from vm_runtime.drivers.qemu.driver import QemuDriver
from vm_runtime.errors import MachineGoneError
from vm_runtime.paged import chains
from vm_runtime.paged.chains import LONG_CHAIN, MANY_DISKS
from vm_runtime.saving import machine as saving
from vm_runtime.saving.hooks import SnapshotHooks
from vm_runtime.saving.machine import SavedMachine
from vm_runtime.saving.values import AfterCapture, Description, Taken
from vm_runtime.snapshots.errors import BrokenSnapshotError, ChainTooLongError, SnapshotError, StoreFullError
from vm_runtime.snapshots.injection import can_inject
from vm_runtime.snapshots.manifest import Manifest, Part, PartKind
from vm_runtime.snapshots.memory import PAGE_SIZE
from vm_runtime.snapshots.pages import PAGES_NAME, PageBuffer, write_pages
from vm_runtime.states import RunState


def maps_shared_pages(saved: SavedMachine) -> bool:
    return PAGES_NAME in Path(f"/proc/{saved.machine.pid}/maps").read_text()


async def disk_io(saved: SavedMachine, command: str, *, printed: bool = True) -> str:
    """Read or write the machine's disk behind the guest's back; answers what qemu-io prints, which is not to be seen
    of a machine that was adopted."""
    machine = qemu(saved)
    # The writable disk is the last device on the command line.
    devices = [block["qdev"] for block in await machine._execute("query-block")]
    before = len(machine._stderr.data())
    line = f'qemu-io -d {devices[-1]} "{command}"'
    answer = str(await machine._execute("human-monitor-command", {"command-line": line}))
    assert answer == "", answer
    if not printed:
        return ""
    async with asyncio.timeout(60):
        while not (text := machine._stderr.data()[before:].decode()).endswith("ops/sec)\n"):
            await machine._stderr.wait_more(machine._watcher)
    return text


async def assert_disk(saved: SavedMachine, byte: int, offset: str) -> None:
    answer = await disk_io(saved, f"read -P {byte} {offset} 64k")
    assert "verification failed" not in answer and "65536" in answer, answer


@contextmanager
def small_file_system(directory: Path) -> Iterator[None]:
    """Put a file system without room over a directory."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k,mode=0700", "tmpfs", directory], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", directory], check=True)


async def test_a_checkpoint_of_a_clone_is_restored_with_memory_and_disk(qemu_bench: Bench) -> None:
    template = await qemu_bench.template()
    assert layers_of(template) == ()
    parent = await qemu_bench.restore(template, "first")
    child = None
    try:
        await beat(qemu(parent))
        await disk_io(parent, "write -P 0x11 1M 64k")
        taken = await parent.take(describe(name="one"), then=AfterCapture.RESUME)
        counted = read_word(qemu(parent), pvh.COUNTER_ADDRESS)
        await disk_io(parent, "write -P 0x22 1M 64k")
        assert parent.machine.state is RunState.RUNNING
        assert taken.manifest.parents == (template.id,)
        assert len(layers_of(taken.manifest)) == 1
        assert len(disks_of(taken.manifest)) == 2
        assert qemu_bench.store.verify(taken.manifest.id) == []

        child = await qemu_bench.restore(taken.manifest, "second")
        assert read_word(qemu(child), pvh.COUNTER_ADDRESS) > 0
        await beat(qemu(child))
        await assert_disk(child, 0x11, "1M")
        await assert_disk(parent, 0x22, "1M")
        assert counted
    finally:
        await parent.kill()
        if child is not None:
            await child.kill()
    assert qemu_bench.store.pins() == {}
    assert not qemu_bench.paths("first").disk_dir.exists()
    assert not qemu_bench.paths("first").run_dir.exists()


class Failing(SnapshotHooks):
    """Its snapshot is captured, and cannot be stored."""

    def described(self, description: Description) -> Description:
        raise SnapshotError("not this one")


class Watched(SnapshotHooks):
    """Says when its snapshot is captured, and when it is stored holds the next one up."""

    def __init__(self) -> None:
        self.is_captured = asyncio.Event()
        self.may_end = asyncio.Event()

    async def captured(self) -> None:
        self.is_captured.set()

    async def stored(self, manifest: Manifest) -> None:
        await self.may_end.wait()


# Before the next snapshot is captured, or after that.
@pytest.mark.parametrize("late", [False, True])
async def test_what_a_snapshot_that_could_not_be_stored_held_is_in_the_next_one(
    qemu_bench: Bench, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    monkeypatch.setattr(saving, "_MOST_CAPTURED", 3)
    saved = await qemu_bench.restore(await qemu_bench.template(), "first")
    machine = qemu(saved)
    mapping = machine.memory_mapping()
    page = PageBuffer(1)

    def write(number: int) -> None:
        page.memory[:] = bytes([number]) * PAGE_SIZE
        write_pages(machine.pid, mapping.address, [(page.address, mapping.length // PAGE_SIZE - number, 1)])

    try:
        before = Watched()
        taking = [asyncio.create_task(saved.take(describe(), then=AfterCapture.RESUME, hooks=[before]))]
        await before.is_captured.wait()
        write(1)
        await disk_io(saved, "write -P 0x11 1M 64k")
        failing = Watched()
        taking.append(asyncio.create_task(saved.take(describe(), then=AfterCapture.RESUME, hooks=[failing, Failing()])))
        await failing.is_captured.wait()
        if not late:
            before.may_end.set()
            await asyncio.wait(taking)
        write(2)
        await disk_io(saved, "write -P 0x22 2M 64k")
        last = Watched()
        last.may_end.set()
        taking.append(asyncio.create_task(saved.take(describe(), then=AfterCapture.RESUME, hooks=[last])))
        await last.is_captured.wait()
        before.may_end.set()
        first, failed, second = await asyncio.gather(*taking, return_exceptions=True)
        assert isinstance(failed, SnapshotError)
        assert isinstance(first, Taken) and isinstance(second, Taken)
        assert second.manifest.parents == (first.manifest.id,)
    finally:
        await saved.kill()
    child = await qemu_bench.restore(second.manifest, "second")
    try:
        for number, byte, offset in ((1, 0x11, "1M"), (2, 0x22, "2M")):
            assert read_word(qemu(child), mapping.length - number * PAGE_SIZE) == number * 0x01010101
            await assert_disk(child, byte, offset)
    finally:
        await child.kill()


# One of the two has enough children for them to share more than each alone.
@pytest.mark.parametrize("count", [3, 5])
async def test_a_fork_runs_children_with_the_parents_memory_and_disk(qemu_bench: Bench, count: int) -> None:
    parent = await qemu_bench.restore(await qemu_bench.template(), "first")
    machines = [parent]
    try:
        await beat(qemu(parent))
        await disk_io(parent, "write -P 0x11 1M 64k")
        names = tuple(f"clone-{number}" for number in range(count))
        forked = await qemu_bench.saver.fork(parent, describe(), child_paths=[qemu_bench.paths(name) for name in names])
        children = [child for child in forked.children if isinstance(child, SavedMachine)]
        machines += children
        assert len(children) == len(names)
        await disk_io(parent, "write -P 0x22 1M 64k")
        for child in children:
            await beat(qemu(child))
            await assert_disk(child, 0x11, "1M")
            assert child.snapshot == forked.taken.manifest
            assert child.machine.state is RunState.RUNNING
            assert maps_shared_pages(child) == (count == 5 and can_inject())
        # A child is a machine like any other: of the second generation, with a disk of its own.
        await disk_io(children[0], "write -P 0x33 1M 64k")
        again = await qemu_bench.saver.fork(children[0], describe("s2"), child_paths=[qemu_bench.paths("second")])
        (grandchild,) = again.children
        assert isinstance(grandchild, SavedMachine)
        machines.append(grandchild)
        await assert_disk(grandchild, 0x33, "1M")
        await assert_disk(children[1], 0x11, "1M")
        await assert_disk(parent, 0x22, "1M")
        assert again.taken.manifest.parents == (forked.taken.manifest.id,)
        assert qemu_bench.store.verify(again.taken.manifest.id) == []
    finally:
        await asyncio.gather(*(machine.kill() for machine in machines))
    assert qemu_bench.store.pins() == {}


async def test_a_child_sees_what_was_written_to_the_disk_after_its_vmm_was_started(qemu_bench: Bench) -> None:
    parent = await qemu_bench.restore(await qemu_bench.template(), "first")
    child = None
    try:
        for first_write in ("write -P 0x10 0 64k", ""):
            if first_write:
                await disk_io(parent, first_write)

            class Writing(SnapshotHooks):
                async def before_pause(self) -> None:
                    await disk_io(parent, "write -P 0x44 4M 64k")
                    await disk_io(parent, "write -P 0x55 40M 64k")

            forked = await qemu_bench.saver.fork(
                parent, describe(), child_paths=[qemu_bench.paths("clone")], hooks=[Writing()]
            )
            (child,) = forked.children
            assert isinstance(child, SavedMachine), child
            await assert_disk(child, 0x44, "4M")
            await assert_disk(child, 0x55, "40M")
            await assert_disk(child, 0x10, "0")
            await beat(qemu(child))
            await child.kill()
    finally:
        await parent.kill()
        if isinstance(child, SavedMachine):
            await child.kill()


async def test_a_full_store_fails_the_snapshot_and_leaves_the_machine_running(qemu_bench: Bench) -> None:
    """Real ENOSPC: the store lies on a file system of a few MB."""
    machine = await qemu_bench.restore(await qemu_bench.template(), "first")
    try:
        await beat(qemu(machine))
        await disk_io(machine, "write -P 0x11 1M 64k")
        drafts = qemu_bench.store.directory / "drafts"
        with small_file_system(drafts):
            for then in AfterCapture:
                with pytest.raises(StoreFullError):
                    await machine.take(describe(), then=then)
                assert machine.machine.state is RunState.RUNNING
            with pytest.raises(StoreFullError):
                await qemu_bench.saver.fork(machine, describe(), child_paths=[qemu_bench.paths("clone")])
            assert list(drafts.iterdir()) == []
        assert not qemu_bench.paths("clone").disk_dir.exists()
        before = qemu(machine).serial_tail().count(".")
        await beat(qemu(machine), before + 1)
        assert len(qemu_bench.store.ls()) == 1
        # Room again: nothing of what was not stored then is missing now.
        taken = await machine.take(describe(), then=AfterCapture.STOP)
        assert qemu_bench.store.verify(taken.manifest.id) == []
    finally:
        await machine.kill()
    woken = await qemu_bench.restore(taken.manifest)
    try:
        await assert_disk(woken, 0x11, "1M")
        await beat(qemu(woken))
    finally:
        await woken.kill()


async def test_a_machine_whose_last_snapshot_cannot_be_noted_down_runs_on(qemu_bench: Bench) -> None:
    machine = await qemu_bench.restore(await qemu_bench.template(), "first")
    manifests = qemu_bench.store.directory / "manifests"
    try:
        manifests.rename(manifests.with_name("away"))
        manifests.touch()  # no directory: the manifest, which comes last, cannot be written
        with pytest.raises((SnapshotError, OSError)):
            await machine.take(describe(), then=AfterCapture.STOP)
        manifests.unlink()
        manifests.with_name("away").rename(manifests)
        states = [machine.machine.state]
        await machine.take(describe(), then=AfterCapture.STOP)
        states.append(machine.machine.state)
        assert states == [RunState.RUNNING, RunState.PAUSED]
        # One that stood before stands afterwards.
        await machine.take(describe(), then=AfterCapture.RESUME)
        assert machine.machine.state is RunState.PAUSED
    finally:
        await machine.kill()


async def test_a_machine_is_adopted_with_what_lies_under_it(qemu_bench: Bench) -> None:
    machine = await qemu_bench.restore(await qemu_bench.template(), "first")
    await beat(qemu(machine))
    await disk_io(machine, "write -P 0x11 1M 64k")
    first = (await machine.take(describe(), then=AfterCapture.RESUME)).manifest
    await disk_io(machine, "write -P 0x22 2M 64k")
    await machine.detach()
    await qemu_bench.saver.close()

    later = qemu_bench.new_saver()
    try:
        adopted = await later.adopt(qemu_bench.paths("first"))
        assert adopted.snapshot == first
        await beat(qemu(adopted))
        taken = await adopted.take(describe(), then=AfterCapture.STOP)
        assert taken.manifest.parents == (first.id,)
        await adopted.kill()
        woken = await later.restore(taken.manifest, paths=qemu_bench.paths("second"))
        await assert_disk(woken, 0x11, "1M")
        await assert_disk(woken, 0x22, "2M")
        await woken.kill()
        with pytest.raises(MachineGoneError):
            await later.adopt(qemu_bench.paths("first"))
        assert qemu_bench.store.pins() == {}
    finally:
        await later.close()


# The command of a disk's freeze that the VMM had just done when the gateway was killed.
@pytest.mark.parametrize("done", [[], ["add-fd"], ["blockdev-add"], ["blockdev-snapshot"]], ids=str)
async def test_a_machine_whose_gateway_was_killed_while_it_froze_the_disk_is_adopted_whole(
    qemu_bench: Bench, done: list[str]
) -> None:
    machine = await qemu_bench.restore(await qemu_bench.template(), "first")
    await disk_io(machine, "write -P 0x11 1M 64k")
    left = qemu(machine)
    execute, killed = left._execute, asyncio.Event()

    async def until_killed(command: str, arguments: Any = None, *, descriptors: Any = ()) -> Any:
        answer = await execute(command, arguments, descriptors=descriptors) if done else None
        if not done or command in done:
            killed.set()
            await asyncio.Event().wait()
        return answer

    left._execute = until_killed  # type: ignore[method-assign]
    freezing = asyncio.create_task(left.freeze_disk(qemu_bench.paths("first").disk_dir / "disk-new.qcow2"))
    waiting = asyncio.create_task(killed.wait())
    await asyncio.wait([freezing, waiting], return_when=asyncio.FIRST_COMPLETED)
    # Nothing of the killed gateway runs on: not even what it would clean up.
    record = (qemu_bench.paths("first").run_dir / "machine.json").read_bytes()
    overlay, kept = (qemu_bench.paths("first").disk_dir / name for name in ("disk-new.qcow2", "kept"))
    kept.hardlink_to(overlay)
    left._execute = execute  # type: ignore[method-assign]
    freezing.cancel()
    waiting.cancel()
    await asyncio.gather(freezing, waiting, return_exceptions=True)
    (qemu_bench.paths("first").run_dir / "machine.json").write_bytes(record)
    overlay.unlink(missing_ok=True)
    kept.rename(overlay)
    await machine.detach()
    await qemu_bench.saver.close()

    later = qemu_bench.new_saver()
    try:
        adopted = await later.adopt(qemu_bench.paths("first"))
        await disk_io(adopted, "write -P 0x22 2M 64k", printed=False)
        await adopted.take(describe(), then=AfterCapture.RESUME)
        await disk_io(adopted, "write -P 0x33 3M 64k", printed=False)
        taken = await adopted.take(describe(), then=AfterCapture.STOP)
        await adopted.kill()
        woken = await later.restore(taken.manifest, paths=qemu_bench.paths("second"))
        for byte, offset in ((0x11, "1M"), (0x22, "2M"), (0x33, "3M")):
            await assert_disk(woken, byte, offset)
        await woken.kill()
        assert qemu_bench.store.pins() == {}
        assert not qemu_bench.paths("first").disk_dir.exists()
    finally:
        await later.close()


async def test_long_chains_are_shortened_for_restores_and_for_the_running_machine(qemu_bench: Bench) -> None:
    # The template's disk is one; layers are shortened on the way.
    count = MANY_DISKS - 1
    machine = await qemu_bench.restore(await qemu_bench.template(), "first")
    try:
        for number in range(count):
            await disk_io(machine, f"write -P {number + 1} {number}M 64k")
            await beat(qemu(machine), qemu(machine).serial_tail().count(".") + 1)
            taken = await machine.take(describe(), then=AfterCapture.RESUME)
        await qemu_bench.saver.settled()
        flat = qemu_bench.store.flattened(taken.manifest.id)
        assert flat is not None
        assert len(layers_of(flat)) < LONG_CHAIN
        assert len(disks_of(flat)) < MANY_DISKS // 2
        assert qemu_bench.store.verify(flat.id) == []
        assert flat.id not in {manifest.id for manifest in qemu_bench.store.ls()}
        after = (await machine.take(describe(), then=AfterCapture.STOP)).manifest
        assert len(layers_of(after)) <= LONG_CHAIN
        for manifest in (taken.manifest, after):
            woken = await qemu_bench.restore(manifest, "second")
            for number in range(count):
                await assert_disk(woken, number + 1, f"{number}M")
            await beat(qemu(woken))
            await woken.kill()
        qemu_bench.store.rm(taken.manifest.id)
        assert qemu_bench.store.flattened(taken.manifest.id) is None
        assert qemu_bench.store.verify(after.id) == []
    finally:
        await machine.kill()


async def test_chains_stay_short_however_many_snapshots_a_running_machine_takes(qemu_bench: Bench) -> None:
    """Flattening goes on working on what the VMM opens and writes after its disk was shortened, again and again."""
    count = 40
    machine = await qemu_bench.restore(await qemu_bench.template(), "first")
    try:
        for number in range(count):
            await disk_io(machine, f"write -P {number + 1} {number}M 64k")
            taken = await machine.take(describe(), then=AfterCapture.RESUME)
            if number % 3 == 0:  # so that some shortenings meet a machine that has gone further meanwhile
                await qemu_bench.saver.settled()
        await qemu_bench.saver.settled()
        assert qemu_bench.saver.flattening().failures == 0
        after = await machine.take(describe(), then=AfterCapture.RESUME)
        for manifest in (qemu_bench.store.flattened(taken.manifest.id) or taken.manifest, after.manifest):
            assert len(layers_of(manifest)) <= 24
            assert len(disks_of(manifest)) <= 24
            assert qemu_bench.store.verify(manifest.id) == []
        assert len(qemu(machine).disk_chain) <= 24
        nodes = [node for node in await qemu(machine)._execute("query-named-block-nodes", {"flat": True})]
        assert len(nodes) <= 2 * 24 + 2  # each file has two, and the root file system
        for part in qemu_bench.store.directory.joinpath("parts/disk").iterdir():
            header = part.read_bytes()[:104]
            if header.startswith(b"QFI"):
                assert header[8:20] == bytes(12), f"{part} names a backing file"
        woken = await qemu_bench.restore(taken.manifest, "second")
        for number in range(count):
            await assert_disk(machine, number + 1, f"{number}M")
            await assert_disk(woken, number + 1, f"{number}M")
        await beat(qemu(woken))
        await woken.kill()
    finally:
        await machine.kill()


# The last command that the VMM had done when the gateway was killed.
@pytest.mark.parametrize("done", ["add-fd", "blockdev-add", "blockdev-reopen", "blockdev-del", "query-fdsets"])
async def test_a_machine_whose_gateway_was_killed_while_it_got_a_shorter_chain_is_adopted_whole(
    qemu_bench: Bench, done: str
) -> None:
    machine = await qemu_bench.restore(await qemu_bench.template(), "first")
    left = qemu(machine)
    execute, killed = left._execute, asyncio.Event()

    async def until_killed(command: str, arguments: Any = None, *, descriptors: Any = ()) -> Any:
        if killed.is_set():  # nothing of the killed gateway runs on: not even what it would clean up
            raise MachineGoneError("killed")
        answer = await execute(command, arguments, descriptors=descriptors)
        if command == done:
            killed.set()
            await asyncio.Event().wait()
        return answer

    for number in range(MANY_DISKS - 2):
        await disk_io(machine, f"write -P {number + 1} {number}M 64k")
        await machine.take(describe(), then=AfterCapture.RESUME)
    await qemu_bench.saver.settled()
    assert len(left.disk_chain) == MANY_DISKS
    assert machine.snapshot is not None
    lower = [qemu_bench.store.part_path(PartKind.DISK, disk.digest) for disk in disks_of(machine.snapshot)]
    record = qemu_bench.paths("first").run_dir / "machine.json"
    merged = qemu_bench.directory / "merged"
    assert isinstance(qemu_bench.driver, QemuDriver)
    await qemu_bench.driver.merge_disks(lower[1:], merged)
    left._execute = until_killed  # type: ignore[method-assign]
    shortening = asyncio.create_task(left.rebase_disk([lower[0], merged], keep=1))
    async with asyncio.timeout(30):
        await killed.wait()
    kept = record.read_bytes()
    shortening.cancel()
    await asyncio.gather(shortening, return_exceptions=True)
    record.write_bytes(kept)
    left._execute = execute  # type: ignore[method-assign]
    await machine.detach()
    await qemu_bench.saver.close()

    later = qemu_bench.new_saver()
    try:
        adopted = await later.adopt(qemu_bench.paths("first"))
        for number in range(MANY_DISKS - 2, 2 * MANY_DISKS):
            await disk_io(adopted, f"write -P {number + 1} {number}M 64k", printed=False)
            taken = await adopted.take(describe(), then=AfterCapture.RESUME)
        await later.settled()
        assert later.flattening().failures == 0
        assert len(qemu(adopted).disk_chain) <= MANY_DISKS
        await adopted.kill()
        woken = await later.restore(taken.manifest, paths=qemu_bench.paths("second"))
        for number in range(2 * MANY_DISKS):
            await assert_disk(woken, number + 1, f"{number}M")
        await woken.kill()
        assert qemu_bench.store.pins() == {}
        assert not qemu_bench.paths("first").disk_dir.exists()
    finally:
        await later.close()


async def test_a_chain_at_its_limit_is_refused_before_the_pause(
    qemu_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chains, "MAX_CHAIN", MANY_DISKS + 1)
    monkeypatch.setattr(chains, "CROWDED", MANY_DISKS)
    monkeypatch.setattr(disk_merge, "PROGRAM", "qemu-img-that-is-not-installed")
    machine = await qemu_bench.restore(await qemu_bench.template(), "first")
    try:
        for number in range(MANY_DISKS - 1):
            await disk_io(machine, f"write -P {number + 1} {number}M 64k")
            await machine.take(describe(), then=AfterCapture.RESUME)
        await disk_io(machine, "write -P 9 9M 64k")
        paused = AsyncMock(wraps=machine.machine.pause)
        monkeypatch.setattr(machine.machine, "pause", paused)
        with pytest.raises(ChainTooLongError, match=f"open disks of at most {MANY_DISKS + 1}"):
            await machine.take(describe(), then=AfterCapture.RESUME)
        paused.assert_not_called()
        assert machine.machine.state is RunState.RUNNING
        assert "not installed" in qemu_bench.saver.flattening().failing[0].reason
        # The disks can be merged again: the snapshot waits for that, and is taken.
        monkeypatch.setattr(disk_merge, "PROGRAM", "qemu-img")
        taken = await machine.take(describe(), then=AfterCapture.RESUME)
        assert len(disks_of(taken.manifest)) < MANY_DISKS
        await assert_disk(machine, 9, "9M")
        await assert_disk(machine, 1, "0M")
    finally:
        await machine.kill()


async def test_a_machine_that_cannot_be_controlled_any_more_is_ended(qemu_bench: Bench) -> None:
    machine = await qemu_bench.restore(await qemu_bench.template(), "first")
    try:
        control = qemu(machine)._qmp
        assert control is not None
        # The VMM lives on: it waits for another client.
        control._socket.shutdown(socket.SHUT_RDWR)
        async with asyncio.timeout(30):
            death = await machine.machine.wait_dead()
        assert "could not be controlled any more" in death.reason
    finally:
        await machine.kill()


async def test_a_family_base_is_mapped_itself_and_a_changed_one_refused(
    qemu_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("chains", "flattening"):
        monkeypatch.setattr(f"vm_runtime.paged.{module}.LARGE_LAYERS_BYTES", 1)
    machine = await qemu_bench.restore(await qemu_bench.template(), "first")
    await beat(qemu(machine))
    manifest = (await machine.take(describe(), then=AfterCapture.STOP)).manifest
    await machine.kill()
    await qemu_bench.saver.settled()
    flat = qemu_bench.store.flattened(manifest.id)
    assert flat is not None
    assert layers_of(flat) == ()
    woken = await qemu_bench.restore(manifest)
    await beat(qemu(woken))
    assert qemu_bench.store.verify(flat.id) == []
    await woken.kill()
    with qemu_bench.store.part_path(PartKind.BASE, flat.state.of_kind(PartKind.BASE)[0].digest).open("r+b") as base:
        base.seek(pvh.COUNTER_ADDRESS)
        base.write(b"????")
    with pytest.raises(BrokenSnapshotError, match="changed"):
        await qemu_bench.restore(manifest)
    assert qemu_bench.store.verify(flat.id) != []


async def test_sleep_and_wake_keep_the_state_and_the_chain_grows_only_with_the_disk(qemu_bench: Bench) -> None:
    manifest = await qemu_bench.template()
    counted = 0
    for round_number in range(4):
        saved = await qemu_bench.restore(manifest)
        await beat(qemu(saved))
        await saved.machine.pause()
        assert read_word(qemu(saved), pvh.COUNTER_ADDRESS) > counted
        if round_number == 1:
            await disk_io(saved, "write -P 0x33 2M 64k")
        await saved.machine.resume()
        manifest = (await saved.take(describe(), then=AfterCapture.STOP)).manifest
        assert saved.machine.state is RunState.PAUSED
        counted = read_word(qemu(saved), pvh.COUNTER_ADDRESS)
        await saved.kill()
    assert len(disks_of(manifest)) == 2
    assert len(layers_of(manifest)) == 4
    saved = await qemu_bench.restore(manifest)
    try:
        await assert_disk(saved, 0x33, "2M")
    finally:
        await saved.kill()


async def test_a_snapshot_that_an_earlier_version_has_stored_is_restored_and_continued(qemu_bench: Bench) -> None:
    sleeper = await qemu_bench.restore(await qemu_bench.template(), "first")
    await beat(qemu(sleeper))
    await disk_io(sleeper, "write -P 0x11 1M 64k")
    asleep = (await sleeper.take(describe(), then=AfterCapture.STOP)).manifest
    await sleeper.kill()
    old = as_format_1(asleep)
    path = qemu_bench.store.manifest_path(old["id"])
    path.write_text(json.dumps(old, sort_keys=True, separators=(",", ":")))
    manifest = qemu_bench.store.get(old["id"])
    woken = await qemu_bench.restore(manifest, "second")
    try:
        await beat(qemu(woken))
        await assert_disk(woken, 0x11, "1M")
        taken = (await woken.take(describe(), then=AfterCapture.RESUME)).manifest
        assert taken.parents == (old["id"],)
        assert taken.state.of_kind(PartKind.BASE) == asleep.state.of_kind(PartKind.BASE)
        assert qemu_bench.store.verify(taken.id) == []
    finally:
        await woken.kill()


def as_format_1(manifest: Manifest) -> dict[str, Any]:
    """A manifest as version 0.1 has written it."""
    values = manifest.model_dump(mode="json", exclude={"id", "state"}) | {"format_version": 1}
    (base,) = manifest.state.of_kind(PartKind.BASE)
    (device,) = manifest.state.of_kind(PartKind.DEVICE)
    layers = [layer.model_dump() for layer in layers_of(manifest)]
    values["vmm"] = {"driver": manifest.state.driver, **manifest.state.needs}
    values["memory"] = {"size_bytes": base.size_bytes, "base": base.model_dump(), "layers": layers}
    values["device"] = device.model_dump()
    values["disks"] = []
    for disk in disks_of(manifest):
        backing = values["disks"][-1]["digest"] if values["disks"] else None
        disk_format = "raw" if backing is None else "qcow2"
        values["disks"].append(disk.model_dump() | {"format": disk_format, "backing": backing})
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return values | {"id": hashlib.sha256(text.encode()).hexdigest()[:32]}


def layers_of(manifest: Manifest) -> tuple[Part, ...]:
    return manifest.state.of_kind(PartKind.LAYER)


def disks_of(manifest: Manifest) -> tuple[Part, ...]:
    return manifest.state.of_kind(PartKind.DISK)
