"""What a capture leaves: disk files, while the next one is being taken, and memory."""

from __future__ import annotations

import gc
import mmap
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path, PosixPath
from types import SimpleNamespace
from typing import cast

import pytest

from tests.unit.paged.chained import MEMORY_BYTES, publish
from vm_runtime.confinement.cgroups import Cgroup
from vm_runtime.confinement.process import Process
from vm_runtime.drivers.base import MachinePaths
from vm_runtime.drivers.qemu.machine import QemuMachine
from vm_runtime.drivers.qemu.record import MachineRecord
from vm_runtime.paged.backing import BackingChain
from vm_runtime.paged.bases import Bases
from vm_runtime.paged.capture import OpenBacking, PageCapture, Tools
from vm_runtime.paged.machine import PagedVmm
from vm_runtime.snapshots.manifest import PartKind
from vm_runtime.snapshots.memory import BaseMemory
from vm_runtime.snapshots.pages import PageBuffer, mapped_address
from vm_runtime.snapshots.store import SnapshotStore
from vm_runtime.snapshots.tracking import CumulativeTracker


class Captured(QemuMachine):
    """Without a VMM, and writes nothing. freezes: another capture freezes its disk whenever one has looked at it."""

    freezes = False

    @property
    def disk_chain(self) -> tuple[Path, ...]:
        chain = self._record.disk_chain
        if self.freezes:
            target = self.paths.disk_dir / f"disk-{len(chain)}.qcow2"
            target.touch()
            self._record = self._record.model_copy(update={"disk_chain": (*chain, target)})
        return chain

    @property
    def disk_written(self) -> bool:
        return False

    async def device_state(self) -> int:
        return os.memfd_create("device", os.MFD_CLOEXEC)


@dataclass
class Bench:
    store: SnapshotStore
    tools: Tools
    machine: Captured
    open_backing: OpenBacking


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    """A machine whose disk has been frozen once since its last snapshot."""
    paths = MachinePaths(id="m1", run_dir=tmp_path / "run", disk_dir=tmp_path / "disk")
    paths.disk_dir.mkdir()
    files = tuple(paths.disk_dir / name for name in ("overlay.qcow2", "disk-1.qcow2"))
    for path in files:
        path.write_text(path.name)
    record = MachineRecord(
        id="m1", pid=os.getpid(), start_time=0, boot_id="", memory_mib=1, vcpus=1, disk_mib=64, image_digest="0" * 64,
        vmlinux=tmp_path, initramfs=tmp_path, rootfs=tmp_path, memory_inode=0, memory_fd=None, disk_chain=files,
        disk_node="disk1", overlay=files[-1], cgroups=(),
    )  # fmt: skip
    machine = Captured(
        paths=paths, record=record, process=cast(Process, None), cgroup=Cgroup(directories=()), memory_fd=None
    )
    with SnapshotStore(tmp_path / "store") as store:
        backing = BackingChain.of(publish(store, layers=1, disks=1).state)
        base_path = store.part_path(PartKind.BASE, backing.base.digest)
        base = BaseMemory.open_file(base_path, digest=backing.base.digest, size_bytes=MEMORY_BYTES)
        memory = mmap.mmap(base.fd, MEMORY_BYTES, access=mmap.ACCESS_COPY)
        tracker = CumulativeTracker(os.getpid(), address=mapped_address(memory), size_bytes=MEMORY_BYTES)
        open_backing = OpenBacking(backing=backing, base=base, tracker=tracker)
        vmm = cast(PagedVmm, SimpleNamespace(name="qemu", state_format="f", needs={}))
        tools = Tools(store=store, vmm=vmm, bases=Bases(store, seal=False), on_loaded=lambda backing, loaded: None)
        try:
            yield Bench(store, tools, machine, open_backing)
        finally:
            open_backing.close()


async def test_a_disk_that_the_next_capture_freezes_stays_until_it_is_stored(bench: Bench) -> None:
    machine = bench.machine
    first, second = machine.disk_chain
    async with PageCapture(bench.tools, machine, bench.open_backing, children=0, last=False).opened() as capture:
        await capture.prepare()
        await capture.take()
        with bench.store.begin() as draft:
            state = await capture.store(draft)
            assert len(BackingChain.of(state).disks) == 2
            machine.freezes = True
            await capture.commit(state)
    assert not first.exists()
    assert second.exists()


async def test_a_frozen_disk_may_be_stored_and_removed_while_another_capture_looks_for_it(bench: Bench) -> None:
    class Removed(PosixPath):
        def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
            found = super().stat(follow_symlinks=follow_symlinks)
            self.unlink()
            return found

    machine = bench.machine
    first, second = machine.disk_chain
    machine._record = machine._record.model_copy(update={"disk_chain": (Removed(first), second)})
    assert bench.tools.frozen_disks(machine, bench.open_backing.backing) in ([], [first])


async def test_a_capture_that_is_given_up_before_the_pause_leaves_no_copies_in_memory(bench: Bench) -> None:
    def buffers() -> int:
        return sum(isinstance(each, PageBuffer) for each in gc.get_objects())

    before = buffers()
    async with PageCapture(bench.tools, bench.machine, bench.open_backing, children=0, last=False).opened() as capture:
        await capture.prepare()
        assert buffers() > before
    assert buffers() == before
